"""Compares draft length "auto" with every fixed one on the wall clock, paired and interleaved.

    python -m specdec.eval.dev.auto_length [--model bundled] [--planted 0.3,0.7,1 --size tiny] [--batch-sizes 1,4,16]
                                       [--temperatures 0,1] [--max-tokens 128] [--repeats 5] [--threads N]

Each repeat completes the same prompts with every length before the next repeat begins, in an order of its own. Decode
time is that of max_tokens per prompt less that of one. A cell is tokens per second relative to K = 0, the median of the
repeats' own ratios with its 95 % bootstrap interval. "of best" compares "auto" with the fixed length that has the
highest median, likewise in pairs: the best is chosen with hindsight, so even an equal contender falls short of 1 by the
noise. "error": the median relative error of predicted step times. "chosen": the share of each length under "auto".

What "auto" has learnt stays between repeats, as in a server; a repeat that is not counted comes first.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.config import AUTO, NumSpeculativeTokens
from specdec.eval.prompts import load_stdlib
from specdec.eval.speed.planted import SIZES, planted_prompts, write_planted_checkpoint
from specdec.step.draft_length import DraftLengthStats

LENGTHS: tuple[NumSpeculativeTokens, ...] = (0, 1, 2, 3, 4, 5, AUTO)
PROMPT_TOKENS, NUM_RESAMPLES = 64, 2000


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios."""

    median: float
    """The median."""
    low: float
    """The lower limit of its 95 % bootstrap interval."""
    high: float
    """The upper limit."""

    @classmethod
    def of(cls, rates: list[float], baseline: list[float]) -> Ratio:
        """Returns the median of rates[i] / baseline[i]."""
        ratios = np.array(rates) / np.array(baseline)
        chosen = np.random.default_rng(0).integers(len(ratios), size=(NUM_RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(ratios[chosen], axis=1), [0.025, 0.975])
        return cls(float(np.median(ratios)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Comparison:
    """What one engine did with all lengths."""

    rates: dict[NumSpeculativeTokens, list[float]]
    """[repeats]: tokens per second of each length, in the same order of repeats."""
    chosen: list[int]
    """How often "auto" chose each length."""
    step_error: float | None
    """Median relative error of the predicted step times."""

    @property
    def best_fixed(self) -> NumSpeculativeTokens:
        """The fixed length that has the highest median."""
        return max((k for k in self.rates if k != AUTO), key=lambda k: float(np.median(self.rates[k])))

    def row(self) -> list[str]:
        """Returns the cells of the table."""
        plain, best, total = self.rates[0], self.best_fixed, max(1, sum(self.chosen))
        cells = [f"{np.median(plain):.0f}", *(str(Ratio.of(self.rates[k], plain)) for k in LENGTHS if k != 0)]
        chosen = " ".join(f"{k}: {100 * n / total:.0f}%" for k, n in enumerate(self.chosen) if n >= 0.005 * total)
        error = "" if self.step_error is None else f"{100 * self.step_error:.0f}%"
        return [*cells, f"{Ratio.of(self.rates[AUTO], self.rates[best])} (K = {best})", chosen, error]


def compare(
    engine: Engine, prompts: list[list[int]], temperature: float, max_tokens: int, num_repeats: int
) -> Comparison:
    """Completes the prompts with every length, `num_repeats` times after one that is not counted."""

    def repeat(number: int) -> dict[NumSpeculativeTokens, float]:
        lengths = random.Random(number).sample(LENGTHS, len(LENGTHS))
        return {k: _rate(engine, prompts, k, temperature, max_tokens, seed=number) for k in lengths}

    repeat(0)
    before = _stats(engine).chosen
    repeats = [repeat(number) for number in range(1, num_repeats + 1)]
    rates = {k: [of[k] for of in repeats] for k in LENGTHS}
    stats = _stats(engine)
    chosen = [after - earlier for after, earlier in zip(stats.chosen, before)]
    return Comparison(rates, chosen, stats.times.median_relative_error)


def _stats(engine: Engine) -> DraftLengthStats:
    stats = engine.stats().draft_length
    assert stats is not None, "the checkpoint has no MTP layer"
    return stats


def _rate(
    engine: Engine, prompts: list[list[int]], k: NumSpeculativeTokens, temperature: float, max_tokens: int, seed: int
) -> float:
    seconds = []
    for count in (1, max_tokens):
        params = [
            SamplingParams(
                max_tokens=count, temperature=temperature, seed=seed * len(prompts) + i, ignore_eos=True,
                speculation=SpeculationParams(k),
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        start = time.perf_counter()
        engine.generate(prompts, params)
        seconds.append(time.perf_counter() - start)
    return len(prompts) * (max_tokens - 1) / (seconds[1] - seconds[0])


@contextmanager
def _checkpoints(model: str, acceptances: list[float], size: str) -> Iterator[list[tuple[str, str]]]:
    """Yields names and folders; planted checkpoints exist while the context is entered."""
    with tempfile.TemporaryDirectory(prefix="specdec-planted-") as folder:
        found = [(model, model)]
        for acceptance in acceptances:
            path = Path(folder) / f"{acceptance:g}"
            write_planted_checkpoint(path, SIZES[size], acceptance=acceptance)
            found.append((f"planted {size}, {acceptance:g}", str(path)))
        yield found


def _prompts(engine: Engine, count: int, planted: bool) -> list[list[int]]:
    if planted:
        return planted_prompts(engine.checkpoint.config.vocab_size, count, PROMPT_TOKENS)
    texts = [p.prompt for p in load_stdlib()]
    return [engine.checkpoint.encode(texts[i % len(texts)])[-PROMPT_TOKENS:] for i in range(count)]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--planted", default="", help="acceptances of planted checkpoints to compare as well")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--batch-sizes", default="1,4,16")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    batch_sizes = [int(size) for size in _numbers(args.batch_sizes)]
    names = [f"K = {k}" if k != AUTO else "auto" for k in LENGTHS if k != 0]
    columns = ["checkpoint", "temperature", "batch", "plain, tokens/s", *names, "auto, of best", "chosen", "error"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    with _checkpoints(args.model, _numbers(args.planted), args.size) as checkpoints:
        for (name, folder), temperature in ((c, t) for c in checkpoints for t in _numbers(args.temperatures)):
            for size in batch_sizes:
                # an engine of its own: nothing learnt elsewhere
                engine = Engine.from_pretrained(folder, max_num_seqs=max(batch_sizes), prefix_caching=False)
                prompts = _prompts(engine, size, planted=folder != args.model)
                cells = compare(engine, prompts, temperature, args.max_tokens, args.repeats).row()
                print(f"| {name} | {temperature:g} | {size} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
