"""Requests of one batch, each with a speculation of its own: draft lengths, rules, none at all.

With coupled verification the tokens of a seed are the same whatever the draft length is; only the number of target
forwards differs.

python examples/per_request_speculation.py [--model bundled] [--max-tokens 64]
"""

from __future__ import annotations

import argparse

from specdec import Engine, SamplingParams, SpeculationParams

SPECULATION = {
    "off": SpeculationParams(num_speculative_tokens=0),
    "coupled, K = 1": SpeculationParams(1),
    "coupled, K = 5": SpeculationParams(5),
    "block, K = 3": SpeculationParams(3, verification="block"),
    "token, K = 3, greedy drafts": SpeculationParams(3, verification="token", draft_sampling="greedy"),
    "coupled, until it is unsure": SpeculationParams(8, min_draft_confidence=0.4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    engine = Engine.from_pretrained(args.model)
    params = [
        SamplingParams(max_tokens=args.max_tokens, temperature=0.8, seed=7, ignore_eos=True, speculation=speculation)
        for speculation in SPECULATION.values()
    ]
    outputs = engine.generate(["def main():\n"] * len(params), params)
    for name, output in zip(SPECULATION, outputs):
        length = output.stats.mean_acceptance_length
        shown = "no drafts" if length is None else f"{length:.2f} tokens per verification"
        is_same = output.token_ids == outputs[0].token_ids
        same = "the same tokens" if is_same else "other tokens, of the same distribution"
        print(f"{name:28} {output.stats.num_target_forwards:3} target forwards, {shown}, {same}")


if __name__ == "__main__":
    main()
