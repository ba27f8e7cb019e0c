"""What a planted checkpoint's own files say about it: its recipe, and the text that every correct engine gives."""

from __future__ import annotations

import json
from pathlib import Path

from specdec.eval.speed.planted import RECIPE_NAME, Recipe, successors


def load_recipe(folder: Path) -> Recipe:
    return Recipe(**json.loads((folder / RECIPE_NAME).read_text()))


def greedy_text(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """The `num_tokens` tokens that any correct engine adds to `prompt` under greedy decoding, ignoring end tokens."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    following = successors(vocab_size, load_recipe(folder).seed).tolist()
    tokens = prompt[-1:]
    for _ in range(num_tokens):
        tokens.append(following[tokens[-1]])
    return tokens[1:]
