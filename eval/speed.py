"""Tokens per second with and without speculation, in one interleaved run.

    python -m specdec.eval.speed [--model bundled] [--kernels cpu,reference] [--repeats 5]

One request at a time from the `stdlib` prompts, greedy and at temperature 1, K = 0 to 5. Every repeat goes
through all settings before the next one begins, so a slow moment of the machine meets all of them alike.
Decoding only: the first commit and what precedes it is not counted.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, field

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.eval.prompts import load_stdlib

NUM_PROMPTS, MAX_TOKENS, MOST_DRAFTS = 12, 96, 5


@dataclass
class Cell:
    """One setting: tokens per second of each repeat, and the mean acceptance length (bonus included)."""

    rates: list[float] = field(default_factory=list)
    acceptance_length: float = 1.0


def measure(engine: Engine, prompts: list[str], temperature: float, num_draft_tokens: int, cell: Cell) -> None:
    speculation = SpeculationParams(num_draft_tokens)
    stats = []
    for seed, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=MAX_TOKENS, temperature=temperature, seed=seed, ignore_eos=True, speculation=speculation
        )
        stats.append(engine.generate(prompt, params)[0].stats)
    tokens = sum(s.num_output_tokens - s.num_first_tokens for s in stats)
    cell.rates.append(tokens / sum(s.decode_s for s in stats))
    if num_draft_tokens:
        cell.acceptance_length = 1 + sum(s.num_accepted_tokens for s in stats) / sum(s.num_drafts for s in stats)


def table(cells: dict[tuple[str, float, int], Cell]) -> str:
    lines = [
        "| kernels | temperature | K | tokens/s (quartiles) | against K = 0 | mean acceptance length |",
        "|---|---|---|---|---|---|",
    ]
    for (kernels, temperature, k), cell in cells.items():
        low, median, high = statistics.quantiles(cell.rates, n=4)
        plain = statistics.median(cells[kernels, temperature, 0].rates)
        lines.append(
            f"| {kernels} | {temperature:g} | {k} | {median:.0f} ({low:.0f} to {high:.0f}) | {median / plain:.2f} "
            f"| {cell.acceptance_length:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--kernels", default="cpu,reference")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error(f"--repeats {args.repeats}: quartiles need at least 2")
    engines = {name: Engine.from_pretrained(args.model, kernels=name) for name in args.kernels.split(",")}
    settings = [
        (name, temperature, k) for name in engines for temperature in (0.0, 1.0) for k in range(MOST_DRAFTS + 1)
    ]
    cells = {setting: Cell() for setting in settings}
    prompts = [p.prompt for p in load_stdlib()[:NUM_PROMPTS]]
    for _ in range(args.repeats):
        for name, temperature, k in settings:
            measure(engines[name], prompts, temperature, k, cells[name, temperature, k])
    print(table(cells))


if __name__ == "__main__":
    main()
