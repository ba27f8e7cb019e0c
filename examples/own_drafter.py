"""A drafter of one's own: prompt lookup (Saxena 2023) drafts what followed the last tokens when they came up before.

python examples/own_drafter.py [--model bundled]
specdec eval acceptance --drafter examples/own_drafter.py:NgramDrafter --verification coupled --batch-size 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from specdec import DraftRequest, Engine, SamplingParams, SpeculationParams

PROMPT = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n"


class NgramDrafter:
    """Looks for the latest earlier place of the last `longest` tokens, else of fewer, and drafts what came after it."""

    def __init__(self, longest: int = 4) -> None:
        self.longest = longest

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        return [self._continuation(list(r.token_ids), r.num_draft_tokens) for r in requests]

    def _continuation(self, tokens: list[int], most: int) -> list[int]:
        for size in range(min(self.longest, len(tokens) - 1), 0, -1):
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == tokens[-size:]:
                    return tokens[start + size : start + size + most]
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    args = parser.parse_args()

    engine = Engine.from_pretrained(args.model, drafter=NgramDrafter())
    params = SamplingParams(max_tokens=64, temperature=0.6, seed=1)
    plain = engine.generate(PROMPT, replace(params, speculation=SpeculationParams(0)))[0]
    drafted = engine.generate(PROMPT, params)[0]
    print(PROMPT + drafted.text)
    print(f"--- {drafted.stats.mean_acceptance_length or 1:.2f} tokens per verification")
    print(f"--- the same tokens as without drafts: {drafted.token_ids == plain.token_ids}")


if __name__ == "__main__":
    main()
