"""Computes acceptance on given text, without generating: what every rule and every K would give.

At contexts all over the texts a chain of K drafts is drawn from the MTP layer's distributions, and the target's
distributions before each draft are computed; `specdec.eval.acceptance.laws` has what follows from them. Averages are
over positions of the texts. An engine's own iterations start elsewhere, after rejections, and in text of its own: its
figures are others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from specdec import Engine
from specdec.config import DraftMode
from specdec.errors import CheckpointError
from specdec.eval.acceptance.plan import Settings, check_number, derived_seed
from specdec.eval.acceptance.replay import Chains, Context, Reader
from specdec.eval.acceptance.results import provenance, utc_now
from specdec.eval.acceptance.tally import Proposal, Row, Tally, proposals
from specdec.eval.prompts import Prompt, load_prompts
from specdec.kernels.progress import Progress, silent

SCHEMA, VERSION = "specdec.teacher_forced", 1


@dataclass(frozen=True)
class TeacherOptions(Settings):
    """What to compute. Texts are the prompts' first turns, cut at the context's length."""

    draft_sampling: tuple[DraftMode, ...] = ("sampled", "greedy")
    """Ways of drafting."""
    stride: int = 4
    """Contexts are those of every so many positions."""
    max_contexts: int | None = None
    """The most contexts, evenly spaced; None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("stride", self.stride, 1, 2**20)
        if self.max_contexts is not None:
            check_number("max_contexts", self.max_contexts, 1, 2**40)

    @property
    def num_drafts(self) -> int:
        """Drafts of a chain: the largest K."""
        return max(self.num_speculative_tokens)


@dataclass(frozen=True)
class ForcedAcceptance:
    """What was found."""

    provenance: dict[str, Any]
    """What was measured, on what, by what; see docs/results.md."""
    options: dict[str, Any]
    """The options."""
    prompts: dict[str, Any]
    """The prompt set; see docs/results.md."""
    num_contexts: int
    """Contexts that were looked at."""
    rows: list[Row]
    """The figures by setting."""

    def as_dict(self) -> dict[str, Any]:
        """Returns a document for JSON."""
        fields = {name: getattr(self, name) for name in ("provenance", "options", "prompts", "num_contexts")}
        return {"schema": SCHEMA, "version": VERSION, **fields, "rows": [row.as_dict() for row in self.rows]}


def teacher_forced(options: TeacherOptions, *, command: str = "", progress: Progress = silent) -> ForcedAcceptance:
    """Computes acceptance at all contexts.

    options: what to compute.
    command: as typed.
    progress: hears of loading and of the contexts.

    Raises ValueError for options that do not fit the checkpoint, CheckpointError for a checkpoint at fault.
    """
    started, teacher = utc_now(), Teacher(options, progress)
    tally, texts = Tally(len(teacher.texts), options.num_drafts), np.array([place.text for place in teacher.places])
    for proposal, chosen, chains in teacher.chains(progress):
        tally.add(proposal, chains, texts[chosen.start : chosen.stop], options.verification, teacher.reader.operations)
    return ForcedAcceptance(
        provenance=provenance(teacher.engine, command, started),
        options=json.loads(json.dumps(asdict(options))),
        prompts=teacher.prompts.as_dict(),
        num_contexts=len(teacher.places),
        rows=tally.rows(options.num_speculative_tokens),
    )


@dataclass(frozen=True)
class Place:
    """A context: the first tokens of a text."""

    text: int
    """Number of the text."""
    start: int
    """How many tokens."""


class Teacher:
    """The texts of a prompt set, and the contexts to look at, in order."""

    def __init__(self, options: TeacherOptions, progress: Progress = silent) -> None:
        self.options = options
        self.engine = Engine.from_pretrained(
            options.model, kernels=options.kernels, dtype=options.dtype, num_threads=options.num_threads,
            max_num_seqs=1, mtp_recycling=options.mtp_recycling, progress=progress,
        )  # fmt: skip
        if self.engine.runtime.model.mtp is None:
            folder = self.engine.checkpoint.folder
            raise CheckpointError(f"{folder} has no MTP layer: there are no drafts whose acceptance could be computed")
        self.reader = Reader(self.engine, options.num_drafts)
        self.proposals = proposals(options.temperatures, options.draft_sampling)
        self.prompts = load_prompts(options.prompts, skip_bad=options.skip_bad).up_to(options.num_prompts)
        self.texts = [self._encode(prompt) for prompt in self.prompts.prompts]
        self.places = self._places()

    def chains(self, progress: Progress) -> Iterator[tuple[Proposal, range, Chains]]:
        """Yields the chains of every proposal at some contexts at a time; the range has the numbers of these
        contexts."""
        numbers = sorted({place.text for place in self.places})
        texts = np.array([place.text for place in self.places])
        for group in self.reader.groups([self.texts[number] for number in numbers]):
            chosen = [numbers[i] for i in group]
            read = dict(zip(chosen, self.reader.read([self.texts[number] for number in chosen])))
            first, end = np.searchsorted(texts, [chosen[0], chosen[-1] + 1]).tolist()
            for start in range(first, end, self.reader.max_contexts):
                progress("contexts", start, len(self.places))
                some = range(start, min(start + self.reader.max_contexts, end))
                contexts = [Context(read[self.places[i].text], self.places[i].start) for i in some]
                seeds = [derived_seed(self.options.seed, self.places[i].text) for i in some]
                for proposal in self.proposals:
                    rows = proposal.drawing(max(proposal.temperatures)).rows(seeds, [c.start for c in contexts])
                    yield proposal, some, self.reader.chains(contexts, rows, self.options.num_drafts)

    def _encode(self, prompt: Prompt) -> list[int]:
        text = self.engine.tokenizer.apply_chat_template(prompt.messages()) if self.options.chat else prompt.prompt
        return self.engine.checkpoint.encode(text)[: self.engine.max_model_len]

    def _places(self) -> list[Place]:
        options, last = self.options, self.engine.max_model_len - self.options.num_drafts
        places = [
            Place(number, start)
            for number, text in enumerate(self.texts)
            for start in range(2, min(len(text), last) + 1, options.stride)
        ]
        if not places:
            raise ValueError(
                f"no text of {self.prompts.name} has a context to look at: texts need 2 tokens, and the model's "
                f"{self.engine.max_model_len} positions room for {options.num_drafts} drafts after them"
            )
        wanted = min(options.max_contexts or len(places), len(places))
        return [places[i * len(places) // wanted] for i in range(wanted)]
