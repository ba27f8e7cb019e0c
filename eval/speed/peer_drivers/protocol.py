"""The driver's side of the conversation: settings as the only argument, then JSON lines on stdin and stdout.

    started:   {"version": "llama.cpp b1234"}
    request:   {"prompts": [[token ids], ...], "max_tokens": N}
    answer:    {"seconds": wall time of the whole batch, "token_ids": [[N ids], ...],
                "num_draft_tokens": int or null, "num_accepted_tokens": int or null}

Decoding is greedy, end tokens do not end it, and the prompts of a request run together. The end of stdin ends the
driver; whatever goes wrong ends it with a traceback on stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Settings:
    """What is fixed while the engine is loaded."""

    checkpoint: str
    """Absolute path of the checkpoint's folder."""
    work_folder: str
    """Absolute path of an existing folder for files that outlive the driver, such as a converted checkpoint."""
    dtype: str
    """Dtype of the weights, "bfloat16" or "float32"."""
    num_threads: int
    """CPU threads."""
    num_speculative_tokens: int
    """K; 0 is plain decoding."""
    max_num_seqs: int
    """The most prompts of one request."""
    max_model_len: int
    """The most tokens of prompt and output together."""


@dataclass(frozen=True)
class Answer:
    """The answer to a request."""

    seconds: float
    """Wall time of the whole batch."""
    token_ids: list[list[int]]
    """[B]: the tokens that were generated."""
    num_draft_tokens: int | None = None
    """Drafts in all; None where the engine does not tell."""
    num_accepted_tokens: int | None = None
    """Drafts accepted; None where the engine does not tell."""


Generate = Callable[[list[list[int]], int], Answer]


def serve(load: Callable[[Settings], tuple[str, Generate]]) -> None:
    """Loads the engine and answers until stdin ends. load: returns the engine's version and a function that generates.

    Whatever the engine itself prints goes to stderr: file descriptor 1 points there from here on.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    version, generate = load(Settings(**json.loads(sys.argv[1])))

    def reply(content: dict[str, object]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    reply({"version": version})
    for line in sys.stdin:
        request = json.loads(line)
        reply(asdict(generate(request["prompts"], request["max_tokens"])))
