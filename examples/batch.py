"""Completes several prompts at once and says what speculation did.

python examples/batch.py [PROMPT ...] [--model bundled] [--max-tokens 48]
"""

from __future__ import annotations

import argparse

from specdec import Engine, SamplingParams

PROMPTS = ["class Stack:\n", "import os\n\ndef walk(", "def fibonacci(n):\n"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()

    engine = Engine.from_pretrained(args.model)
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.6, seed=1)
    for output in engine.generate(args.prompts, params):
        print(f"--- {output.finish_reason}, {output.stats.mean_acceptance_length or 1:.2f} tokens per verification")
        print(engine.tokenizer.decode(output.prompt_token_ids) + output.text)


if __name__ == "__main__":
    main()
