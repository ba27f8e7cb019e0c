"""Tokens per iteration of every verification rule, with sampled and with greedy drafts, by temperature.

    python -m specdec.eval.rules [--model bundled] [--temperatures 0.3,0.6,1,1.5] [-k 3] [--max-tokens 128] [--seeds 4]

From the `stdlib` prompts; every request runs under each rule with the same seeds. Intervals are 95 % bootstrap
intervals over requests. What `SpeculationParams` takes by default was chosen with this table.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from specdec import Engine, SamplingParams, SpeculationParams
from specdec.config import DraftSampling, Verification
from specdec.eval.prompts import load_stdlib

DRAFTS: tuple[DraftSampling, ...] = ("sampled", "greedy")
RULES: tuple[Verification, ...] = ("coupled", "token", "block")
SETTINGS = [(rule, drafts) for drafts in DRAFTS for rule in RULES]
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class TokensPerIteration:
    """Mean acceptance length, 1 + accepted / verifications, over all requests, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, accepted: np.ndarray, verifications: np.ndarray) -> TokensPerIteration:
        """Per request [n]."""
        chosen = np.random.default_rng(0).integers(len(accepted), size=(NUM_RESAMPLES, len(accepted)))
        resampled = 1 + accepted[chosen].sum(1) / verifications[chosen].sum(1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return cls(1 + accepted.sum() / verifications.sum(), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def measure(
    engine: Engine, speculation: SpeculationParams, temperature: float, max_tokens: int, num_seeds: int
) -> TokensPerIteration:
    prompts = [p.prompt for p in load_stdlib()] * num_seeds
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, speculation=speculation)
        for seed in range(len(prompts))
    ]
    stats = [output.stats for output in engine.generate(prompts, params)]
    verified = [s for s in stats if s.num_drafts > 0]
    return TokensPerIteration.of(
        np.array([s.num_accepted_tokens for s in verified]), np.array([s.num_drafts for s in verified])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--temperatures", default="0.3,0.6,1,1.5")
    parser.add_argument("-k", "--num-speculative-tokens", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=4, help="requests per prompt")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model, max_num_seqs=32)
    print("| temperature | " + " | ".join(f"{rule}, {drafts} drafts" for rule, drafts in SETTINGS) + " |")
    print("|---" * (len(SETTINGS) + 1) + "|")
    for temperature in map(float, args.temperatures.split(",")):
        cells = []
        for rule, drafts in SETTINGS:
            speculation = SpeculationParams(args.num_speculative_tokens, rule, drafts)
            cells.append(measure(engine, speculation, temperature, args.max_tokens, args.seeds))
        print(f"| {temperature:g} | " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
