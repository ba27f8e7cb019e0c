"""What verification itself costs: from logits to tokens, by rule and parameters.

    python -m specdec.eval.verification [--model bundled] [--batch-size 16] [-k 3] [--vocab-size 151552] [--json]

Two tables, medians of many: the share of an engine step at a batch size (all threads), and milliseconds per row of
logits with a large vocabulary on one thread, logits drawn at random with a standard deviation of 4.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.config import Verification
from specdec.kernels import Kernels
from specdec.kernels.interface import RowSampling
from specdec.rng import Stream
from specdec.verify import Proposal, verify_by_rejection

RULES: tuple[Verification, ...] = ("coupled", "token", "block")
PARAMETERS: dict[str, dict[str, Any]] = {
    "temperature 0.8": {},
    "and top_k 50, top_p 0.95, min_p 0.05": {"top_k": 50, "top_p": 0.95, "min_p": 0.05},
    "and three penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1},
}
MAX_TOKENS, NUM_REPEATS = 128, 15


@dataclass(frozen=True)
class Share:
    """Medians in seconds: of a step, and of its part from logits to tokens."""

    rule: str
    parameters: str
    step_s: float
    verification_s: float


@dataclass(frozen=True)
class RowCost:
    """Median seconds per row of logits, for one iteration of k drafts."""

    rule: str
    parameters: str
    row_s: float


class Stopwatch:
    """Times every call of a function, in its place if it is an object's method."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds: list[float] = []

    @classmethod
    def on(cls, owner: Any, name: str) -> Stopwatch:
        watch = cls(getattr(owner, name))
        setattr(owner, name, watch)
        return watch

    def __call__(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self.function(*args)
        self.seconds.append(time.perf_counter() - start)
        return result


def shares(model: str, batch_size: int, k: int) -> list[Share]:
    engine = Engine.from_pretrained(model, max_num_seqs=batch_size)
    prompts = [f"def f{i}(x):\n" for i in range(batch_size)]
    step, rules = Stopwatch.on(engine, "_step"), Stopwatch.on(engine._verifier, "_apply_rules")
    head = Stopwatch.on(engine.runtime.model.target, "compute_logits")
    found = []
    for rule in RULES:
        for name, fields in PARAMETERS.items():
            params = SamplingParams(temperature=0.8, max_tokens=MAX_TOKENS, ignore_eos=True, **fields)
            params = replace(params, speculation=SpeculationParams(k, rule))
            for watch in (step, rules, head):
                watch.seconds.clear()
            engine.generate(prompts, [replace(params, seed=seed) for seed in range(batch_size)])
            logits_to_tokens = [r - h for r, h in zip(rules.seconds, head.seconds, strict=True)]
            found.append(Share(rule, name, statistics.median(step.seconds), statistics.median(logits_to_tokens)))
    return found


def row_costs(kernels: Kernels, vocab_size: int, k: int) -> list[RowCost]:
    torch.set_num_threads(1)
    num_rows = k + 1
    generator = torch.Generator().manual_seed(0)
    p, q = (4 * torch.randn(n, vocab_size, generator=generator) for n in (num_rows, k))
    sampling = RowSampling(
        [1 / 0.8] * num_rows, [0] * num_rows, [1.0] * num_rows, [0.0] * num_rows, [1] * num_rows,
        [Stream.TARGET] * num_rows, list(range(num_rows)), [0] * num_rows,
    )  # fmt: skip
    cut = replace(sampling, top_k=[50] * num_rows, top_p=[0.95] * num_rows, min_p=[0.05] * num_rows)
    draft_probs = kernels.softmax(q, [1 / 0.8] * k)[None]
    drafts = q.argmax(-1).tolist()
    found = []
    for rule in RULES:
        for name, rows in zip(PARAMETERS, (sampling, cut)):
            decide = partial(_decide, kernels, rule, rows, draft_probs, Proposal(drafts, 0, 0, rule == "block", 1, 10))
            watch = Stopwatch(decide)
            for _ in range(NUM_REPEATS):
                watch(p.clone())
            found.append(RowCost(rule, name, statistics.median(watch.seconds) / num_rows))
    return found


def _decide(
    kernels: Kernels, rule: str, rows: RowSampling, draft_probs: torch.Tensor, proposal: Proposal, logits: torch.Tensor
) -> None:
    kernels.truncate_(logits, rows)
    if rule == "coupled":
        kernels.choose(logits, rows)
    else:
        verify_by_rejection(kernels, kernels.softmax(logits, rows.scales), draft_probs, [proposal])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("-k", "--num-speculative-tokens", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=151_552)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    args = parser.parse_args()
    with torch.inference_mode():
        of_steps = shares(args.model, args.batch_size, args.num_speculative_tokens)
        kernels = Engine.from_pretrained(args.model).runtime.model.target.kernels
        of_rows = row_costs(kernels, args.vocab_size, args.num_speculative_tokens)
    if args.json:
        print(json.dumps({"steps": [vars(s) for s in of_steps], "rows": [vars(r) for r in of_rows]}, indent=2))
        return
    print(f"| rule | parameters | step, batch {args.batch_size}, us | logits to tokens, us | share |")
    print("|---|---|---|---|---|")
    for s in of_steps:
        share = s.verification_s / s.step_s
        print(f"| {s.rule} | {s.parameters} | {s.step_s * 1e6:.0f} | {s.verification_s * 1e6:.0f} | {share:.1%} |")
    print(f"\n| rule | parameters | ms per row, vocabulary {args.vocab_size:,}, one thread |\n|---|---|---|")
    for r in of_rows:
        print(f"| {r.rule} | {r.parameters} | {r.row_s * 1e3:.2f} |")


if __name__ == "__main__":
    main()
