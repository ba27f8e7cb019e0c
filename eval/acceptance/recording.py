"""Drafts and logits in a file, so that rules and lengths can be compared without the model.

A safetensors file. For every proposal NAME ("greedy", "sampled-0.6", ...) and n contexts:

    NAME.drafts [n, K] int32
    NAME.target, NAME.draft [n, K, V] fp16: logits before each draft, less the largest of their row; the latter only of
        sampled drafts, which are judged by their law
    texts [n] int32: the text of each context

and in the metadata, as JSON under "specdec", what was recorded. Less its largest, a logit keeps a relative precision of
2^-11 of how far below the largest it lies: the largest stays exact, argmaxes stay the same, and a probability changes
by a factor of at most exp(2^-11 gap), 1 % where it is e^-20 of the largest one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.config import Verification
from specdec.eval.acceptance.records import Ints
from specdec.eval.acceptance.replay import LOGITS_ELEMENTS, Chains
from specdec.eval.acceptance.tally import Proposal, Row, Tally
from specdec.eval.files import replacing
from specdec.kernels import select
from specdec.kernels.operations import operations_of

METADATA, VERSION = "specdec", 1
MAX_BYTES = 2**30


class Recording:
    """What is being recorded."""

    def __init__(self, num_contexts: int, num_drafts: int, vocab_size: int, proposals: Seq[Proposal]) -> None:
        """Raises ValueError where the file would be larger than `MAX_BYTES`."""
        self.proposals = list(proposals)
        num_rows = sum(1 if p.draft_sampling == "greedy" else 2 for p in proposals)
        per_context = num_drafts * (2 * vocab_size * num_rows + 4 * len(proposals)) + 4
        if num_contexts * per_context > MAX_BYTES:
            raise ValueError(
                f"the recording of {num_contexts} contexts would take {num_contexts * per_context / 2**30:.1f} GiB, "
                f"more than {MAX_BYTES / 2**30:g}: lower max_contexts to {MAX_BYTES // per_context}, or ask for fewer "
                "temperatures or drafts"
            )
        self._tensors: dict[str, Tensor] = {}
        shape = (num_contexts, num_drafts)
        for p in proposals:
            self._tensors[f"{p.name}.drafts"] = torch.empty(shape, dtype=torch.int32)
            for name in _laws(p):
                self._tensors[f"{p.name}.{name}"] = torch.empty((*shape, vocab_size), dtype=torch.float16)

    def add(self, proposal: Proposal, contexts: range, chains: Chains) -> None:
        """The proposal's chains at the contexts of these numbers."""
        chosen = slice(contexts.start, contexts.stop)
        self._tensors[f"{proposal.name}.drafts"][chosen] = chains.drafts.cpu()
        for name in _laws(proposal):
            logits = getattr(chains, name)
            self._tensors[f"{proposal.name}.{name}"][chosen] = (logits - logits.amax(-1, keepdim=True)).half().cpu()

    def save(self, path: Path, texts: Ints, num_texts: int, about: dict[str, Any]) -> None:
        """texts [n]: of each context. about: JSON that `replay` hands back."""
        self._tensors["texts"] = torch.from_numpy(texts).int()
        described = {"version": VERSION, "num_texts": num_texts, "proposals": [asdict(p) for p in self.proposals]}
        metadata = {METADATA: json.dumps(described | {"about": about})}
        with replacing(path) as partial:
            save_file(self._tensors, partial, metadata)


@dataclass(frozen=True)
class Replayed:
    """about: what was recorded; see `specdec.eval.acceptance.teacher.ForcedAcceptance`."""

    about: dict[str, Any]
    num_contexts: int
    rows: list[Row]


def replay(
    path: Path | str, rules: Seq[Verification] = ("coupled", "block", "token"), lengths: Seq[int] | None = None
) -> Replayed:
    """The same table as when the file was recorded, for any rules and any K up to the recorded one (None: all).

    Acceptances differ from those of the recorded run by rounding to fp16: by less than 0.001, of the bundled
    checkpoint by 0.00002.
    Raises ValueError for a file that is none, and for lengths that it does not have.
    """
    try:
        with safe_open(str(path), "pt") as file:
            described = _described(path, file.metadata())
            texts = file.get_tensor("texts").numpy().astype("int64")
            found = [Proposal(p["draft_sampling"], tuple(p["temperatures"])) for p in described["proposals"]]
            num_drafts = file.get_slice(f"{found[0].name}.drafts").get_shape()[1]
            wanted = _lengths(lengths, num_drafts)
            kernels = operations_of(select(torch.device("cpu"), torch.float32, "reference"))
            tally = Tally(described["num_texts"], num_drafts)
            for proposal in found:
                for chosen, chains in _chains(file, proposal):
                    tally.add(proposal, chains, texts[chosen], rules, kernels)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no recording: {error}; make one with `specdec eval teacher-forced`") from error
    return Replayed(described["about"], len(texts), tally.rows(wanted))


def _laws(proposal: Proposal) -> tuple[str, ...]:
    return ("target",) if proposal.draft_sampling == "greedy" else ("target", "draft")


def _chains(file: Any, proposal: Proposal) -> Iterator[tuple[slice, Chains]]:
    parts = {name: file.get_slice(f"{proposal.name}.{name}") for name in ("drafts", *_laws(proposal))}
    num_contexts, num_drafts, vocab_size = parts["target"].get_shape()
    step = max(1, LOGITS_ELEMENTS // (2 * num_drafts * vocab_size))
    for start in range(0, num_contexts, step):
        chosen = slice(start, min(start + step, num_contexts))
        drafts, target = parts["drafts"][chosen].long(), parts["target"][chosen].float()
        draft = parts["draft"][chosen].float() if "draft" in parts else target  # greedy drafts are judged without it
        yield chosen, Chains(target, draft, drafts, drafts)


def _described(path: Path | str, metadata: dict[str, str] | None) -> dict[str, Any]:
    if METADATA not in (metadata or {}):
        raise ValueError(f"{path} is a safetensors file, but no recording of `specdec eval teacher-forced`")
    described: dict[str, Any] = json.loads((metadata or {})[METADATA])
    if described["version"] != VERSION:
        raise ValueError(f"{path} has version {described['version']}, this specdec reads {VERSION}: record it anew")
    return described


def _lengths(lengths: Seq[int] | None, num_drafts: int) -> list[int]:
    if lengths is None:
        return list(range(1, num_drafts + 1))
    for k in lengths:
        if not 1 <= k <= num_drafts:
            raise ValueError(f"num_speculative_tokens: {k} must be from 1 to {num_drafts}, the drafts recorded")
    return list(lengths)
