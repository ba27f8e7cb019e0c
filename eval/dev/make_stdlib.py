"""Makes stdlib.jsonl from the held-out modules: python -m specdec.eval.dev.make_stdlib

Run it with the Python whose standard library the bundled checkpoint was trained on (its card says).
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from specdec.eval.prompts import FOLDER, Prompt
from specdec.model.bundled.corpus import Document, load_documents

PER_CATEGORY = 32
PROMPT_CHARACTERS = 480
MIN_CHARACTERS = 2000


def excerpts(document: Document, count: int) -> Iterator[str]:
    """Yields `count` excerpts of whole lines, evenly spaced, each with at least as much text again after it."""
    usable = len(document.text) - PROMPT_CHARACTERS
    for i in range(count):
        end = (
            document.text.rfind("\n", 0, PROMPT_CHARACTERS + (usable - PROMPT_CHARACTERS) * (i + 1) // (count + 1)) + 1
        )
        start = document.text.find("\n", max(0, end - PROMPT_CHARACTERS - 1)) + 1
        yield document.text[start:end]


def stdlib_prompts() -> list[Prompt]:
    """Returns the set, categories in turn."""
    held_out = [d for d in load_documents() if d.held_out and len(d.text) >= MIN_CHARACTERS and d.text.isascii()]
    by_category: dict[str, list[Prompt]] = {}
    for kind in ("module", "package", "test"):
        documents = [d for d in held_out if d.kind == kind]
        share = -(-PER_CATEGORY // len(documents))
        prompts = [Prompt((text,), kind, d.name) for d in documents for text in excerpts(d, share)]
        step = len(prompts) / PER_CATEGORY
        by_category[kind] = [prompts[int(i * step)] for i in range(PER_CATEGORY)]
    return [prompt for group in zip(*by_category.values(), strict=True) for prompt in group]


def as_line(prompt: Prompt) -> str:
    """Returns a prompt as a line of JSONL."""
    return json.dumps({"prompt": prompt.prompt, "category": prompt.category, "source": prompt.source}) + "\n"


def main() -> None:
    prompts = stdlib_prompts()
    (FOLDER / "stdlib.jsonl").write_text("".join(map(as_line, prompts)), encoding="utf-8")
    print(f"{len(prompts)} prompts of {len({p.source for p in prompts})} modules")


if __name__ == "__main__":
    main()
