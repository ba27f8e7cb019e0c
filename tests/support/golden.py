"""Token ids that no refactoring may change, and how they were recorded.

`python -m support.golden` (with tests/ on PYTHONPATH) writes them anew. Do that only where a change of tokens is meant,
and say so in the commit.

What is recorded does not depend on the machine: the C++ kernels have the same bits on every CPU, and the reference
kernels compute in float64, where rounding is far below every margin.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.cost import CostTable
from support.fakes import EXACT_DTYPES, tiny_config, write_checkpoint, write_planted_checkpoint

PATH = Path(__file__).parent / "golden.json"
PROMPTS = [
    "import os\n", "class Stack:\n    def push(", "x = [", "for i in range(10):\n", "def f(a, b):\n    return", "#",
    "a" * 40, "if",
]  # fmt: skip
LENGTHS: list[int | str] = [0, 1, 3, 8, "auto"]
BACKENDS = {name: {"kernels": name, "dtype": dtype} for name, dtype in EXACT_DTYPES.items()}
NUM_TOKENS = 12
# Given, so that what "auto" chooses depends on no clock; drafts pay at some batch sizes and not at others.
COSTS = CostTable(
    {1: 1.0e-3, 2: 1.1e-3, 4: 1.3e-3, 8: 1.7e-3, 16: 3e-3, 64: 9e-3}, {1: 2e-4, 16: 4e-4, 64: 9e-4}, {1: 2e-4, 8: 3e-4}
)
RULES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "coupled": {"temperature": 0.8},
    "coupled, greedy drafts": {"temperature": 1.2, "draft_sampling": "greedy"},
    "block": {"temperature": 1.0, "verification": "block"},
    "token": {"temperature": 0.7, "verification": "token", "min_draft_confidence": 0.05},
    "token, greedy drafts": {"temperature": 1.0, "verification": "token", "draft_sampling": "greedy"},
    "edits": {
        "temperature": 0.9, "verification": "token", "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1,
        "presence_penalty": 0.3, "logit_bias": {5: 1.5}, "min_tokens": 4,
    },
}  # fmt: skip
SLOW = "bundled", "reference"  # of which only some cases are recorded
SLOW_CASES = [("greedy", 0), ("greedy", 3), ("coupled", 3), ("block", 3), ("token", "auto")]
OF_SPECULATION = ("verification", "draft_sampling", "min_draft_confidence")


def write_checkpoints(folder: Path) -> dict[str, str]:
    """Names -> folders: the bundled checkpoint, one whose drafts are hardly ever accepted, one where they often are,
    with expert groups and no bias."""
    grouped = tiny_config(attention_bias=False, n_group=4, topk_group=2, routed_scaling_factor=1.5)
    return {
        "bundled": "bundled",
        "random": str(write_checkpoint(folder / "random", seed=7)),
        "planted": str(write_planted_checkpoint(folder / "planted", grouped, seed=3)),
    }


def params_of(rule: str, length: int | str, number: int) -> SamplingParams:
    """number: of the prompt; its seed is one of 64 bits."""
    fields = RULES[rule]
    speculation = SpeculationParams(length, **{k: v for k, v in fields.items() if k in OF_SPECULATION})  # type: ignore[arg-type]
    of_sampling = {k: v for k, v in fields.items() if k not in OF_SPECULATION}
    return SamplingParams(max_tokens=NUM_TOKENS, seed=2**63 + 1000 * number + 1, speculation=speculation, **of_sampling)


def cases(name: str, backend: str) -> list[tuple[str, int | str]]:
    return SLOW_CASES if (name, backend) == SLOW else [(rule, length) for rule in RULES for length in LENGTHS]


def outputs(folders: dict[str, str], name: str, backend: str) -> Iterator[tuple[str, list[list[int]]]]:
    """By case, the output's token ids of one prompt alone and of all of them in one batch."""
    engine = _engine(folders[name], backend)
    for rule, length in cases(name, backend):
        params = [params_of(rule, length, number) for number in range(len(PROMPTS))]
        alone = engine.generate(PROMPTS[0], params[0])
        together = engine.generate(PROMPTS, params)
        yield f"{rule}, K = {length}", [output.token_ids for output in (*alone, *together)]


def _engine(checkpoint: str, backend: str) -> Engine:
    return Engine.from_pretrained(checkpoint, cost_table=COSTS, max_model_len=96, num_pages=64, **BACKENDS[backend])  # type: ignore[arg-type]


def record(folder: Path) -> dict[str, dict[str, list[list[int]]]]:
    folders = write_checkpoints(folder)
    return {f"{n}, {b}": dict(outputs(folders, n, b)) for n in folders for b in BACKENDS}


def _lines(of: dict[str, list[list[int]]]) -> str:
    """One engine's cases as JSON, a line each."""
    return "{\n" + ",\n".join(f"{json.dumps(c)}: {json.dumps(t, separators=(',', ':'))}" for c, t in of.items()) + "\n}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder))
    PATH.write_text("{\n" + ",\n".join(f"{json.dumps(engine)}: {_lines(of)}" for engine, of in found.items()) + "\n}\n")
    print(f"{PATH}: {sum(map(len, found.values()))} cases", file=sys.stderr)


if __name__ == "__main__":
    main()
