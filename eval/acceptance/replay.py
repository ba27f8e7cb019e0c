"""Computes the model's distributions after given contexts, without generating: the target's p and the MTP layer's q of
chains of drafts.

Where the engine has no MTP layer, or another drafter in its place, drafts are given, and there is p alone.

A text is run once through target and MTP layer, with true hidden states, into a cache of its own whose pages hold one
token each (on row-invariant kernels the page size changes no bit). A context, the first `start` tokens of a text,
shares the pages of the rows before its last token and has its own for the rows of that token and the drafts. So any
number of contexts of one text can be looked at together, as if the engine stood at each of them:

    MTP layer    pair start - 2 -> q_1; then q_2.. from single rows at positions start - 1, .. fed with drafts 1, ..
    target       rows of the last token and the drafts, at positions start - 1, .. -> p_1, p_2, ..

Shapes: n contexts, K drafts, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec import Engine
from specdec.cache.pages import allocate_kv_cache, page_bytes
from specdec.errors import ModelError
from specdec.kernels.data import DecoderOutput
from specdec.kernels.decisions import RowSampling
from specdec.kernels.operations import operations_of
from specdec.step.batch import Extend, build_batch

PREFILL_ROWS = 1024
CACHE_BYTES = 2**28
LOGITS_ELEMENTS = 2**22  # the most logits of one chunk of contexts


@dataclass(frozen=True, eq=False)
class Text:
    """A text that was read, whose rows lie in the reader's pages."""

    token_ids: list[int]
    """Its tokens."""
    first_page: int
    """The page of its first token; those of the others follow."""
    pairs: DecoderOutput | None
    """[len - 1, H]: the MTP layer's outputs; None without that layer."""


@dataclass(frozen=True, eq=False)
class Context:
    """The first tokens of a text."""

    text: Text
    """The text."""
    start: int
    """How many tokens, at least 2. Draft 1 is a guess for token number `start`, counted from 0."""


@dataclass(frozen=True, eq=False)
class Chains:
    """Chains of K drafts after n contexts."""

    target: Tensor
    """[n, K, V]: the target's logits before each draft, in at least fp32."""
    draft: Tensor | None
    """[n, K, V]: the MTP layer's logits before each draft, in at least fp32; None without that layer."""
    drafts: Tensor
    """[n, K]: the drafts."""
    choices: Tensor | None
    """[n, K]: what the MTP layer drafts after the drafts before; equal to `drafts` unless those were given.
    None without that layer."""


class Reader:
    """Reads texts and looks at their contexts; K drafts at most."""

    def __init__(self, engine: Engine, num_draft_tokens: int) -> None:
        model, cache = engine.runtime.model, engine.runtime.kv_cache
        self.target, self.mtp, self.kernels = model.target, model.mtp, model.target.kernels
        self.operations = operations_of(self.kernels)
        self.max_len, self.recycling = engine.max_model_len, engine.config.mtp_recycling
        vocab_size = model.config.vocab_size
        self.max_contexts = max(1, LOGITS_ELEMENTS // (2 * num_draft_tokens * vocab_size))
        num_layers = cache.shape[0]
        bytes_per_page = page_bytes(model.config, num_layers, 1, cache.dtype)
        self._own_pages = self.max_contexts * (num_draft_tokens + 1)
        self.capacity = max(self.max_len, CACHE_BYTES // bytes_per_page - self._own_pages)
        self.cache = allocate_kv_cache(
            model.config, num_layers, self.capacity + self._own_pages, 1, cache.dtype, cache.device
        )

    @torch.inference_mode()
    def read(self, texts: Seq[list[int]]) -> list[Text]:
        """Runs texts of 2 to `max_len` tokens, `capacity` tokens in all; texts that were read before are lost."""
        assert sum(map(len, texts)) <= self.capacity, "more tokens than pages"
        read, page = [], self._own_pages
        for token_ids in texts:
            read.append(Text(token_ids, page, self._pairs(token_ids, page)))
            page += len(token_ids)
        return read

    def groups(self, texts: Seq[list[int]]) -> Iterator[range]:
        """Yields the numbers of consecutive texts that can be read together."""
        first, used = 0, 0
        for number, token_ids in enumerate(texts):
            if used + len(token_ids) > self.capacity:
                yield range(first, number)
                first, used = number, 0
            used += len(token_ids)
        if first < len(texts):
            yield range(first, len(texts))

    @torch.inference_mode()
    def chains(self, contexts: Seq[Context], rows: RowSampling, num_drafts: int, given: Tensor | None = None) -> Chains:
        """Returns chains of drafts after contexts, with the logits before each draft.

        contexts: up to `max_contexts`.
        rows: [n], how draft 1 is drawn; positions advance by one per draft.
        num_drafts: K >= 1; start + num_drafts is at most `max_len`.
        given: [n, K], drafts to take instead, so that every distribution is that after the given drafts before. Without
            an MTP layer they must be given.

        Raises ModelError where the MTP layer's logits are not finite.
        """
        draft, drafts, choices = self._draft(contexts, rows, num_drafts, given)
        before = [[c.text.token_ids[c.start - 1], *d[:-1]] for c, d in zip(contexts, drafts.tolist())]
        target = self.target.compute_logits(self.run_target(contexts, before))
        return Chains(target.unflatten(0, (len(contexts), num_drafts)), draft, drafts, choices)

    @torch.inference_mode()
    def run_target(self, contexts: Seq[Context], token_ids: Seq[list[int]]) -> Tensor:
        """Runs one forward of the target; returns hidden states [T, H]. token_ids: [n] of up to K + 1, the tokens of
        each context from its last one on."""
        extends = [
            Extend(ids, c.start - 1, self._page_table(c, own))
            for own, (c, ids) in enumerate(zip(contexts, token_ids, strict=True))
        ]
        batch = build_batch(extends, 1)
        return self.target(batch.input_ids, batch.metadata, self.cache)

    def _draft(
        self, contexts: Seq[Context], rows: RowSampling, num_drafts: int, given: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Returns logits [n, K, V], drafts and choices [n, K]. It goes step by step, unlike the engine's fused chain:
        so drafts can be given, and each of the two is checked by the other."""
        if self.mtp is None:
            assert given is not None, "no MTP layer drafts: give drafts"
            return None, given.to(self.cache.device), None
        tables = [self._page_table(c, own) for own, c in enumerate(contexts)]
        last = _last_pairs(contexts)
        drafts = torch.empty(len(contexts), num_drafts, dtype=torch.int64, device=self.cache.device)
        logits, choices = [], []
        for step in range(num_drafts):
            if step > 0:
                tokens = drafts[:, step - 1].tolist()
                extends = [
                    Extend([token], c.start - 2 + step, table) for token, c, table in zip(tokens, contexts, tables)
                ]
                batch = build_batch(extends, 1)
                previous = last.unnormed if self.recycling == "pre_norm" else last.normed
                last = self.mtp.draft(previous, batch.input_ids, batch.metadata, self.cache[-1])
            logits.append(self.target.compute_logits(last.normed))
            choices.append(self.operations.choose(logits[-1], rows.select(list(range(len(rows))), [step] * len(rows))))
            if (choices[-1] < 0).any():
                raise ModelError.not_finite("the MTP layer")
            drafts[:, step] = choices[-1] if given is None else given[:, step]
        return torch.stack(logits, 1), drafts, torch.stack(choices, 1)

    def _pairs(self, token_ids: list[int], page: int) -> DecoderOutput | None:
        """Returns the MTP layer's outputs for all pairs of a text, None without that layer; leaves the rows of both in
        the cache."""
        table = list(range(page, page + len(token_ids)))
        outputs = []
        for start in range(0, len(token_ids), PREFILL_ROWS):
            piece = token_ids[start : start + PREFILL_ROWS]
            batch = build_batch([Extend(piece, start, table)], 1)
            hidden = self.target(batch.input_ids, batch.metadata, self.cache)
            following = token_ids[start + 1 : start + 1 + len(piece)]
            if following and self.mtp is not None:
                pairs = build_batch([Extend(following, start, table)], 1)
                previous = hidden[: len(following)]
                outputs.append(self.mtp.draft(previous, pairs.input_ids, pairs.metadata, self.cache[-1]))
        if self.mtp is None:
            return None
        return DecoderOutput(torch.cat([o.normed for o in outputs]), torch.cat([o.unnormed for o in outputs]))

    def _page_table(self, context: Context, own: int) -> list[int]:
        """Returns the text's pages before the context's last token, then those of the `own`-th context."""
        shared = context.text.first_page
        per_context = self._own_pages // self.max_contexts
        first = own * per_context
        return [*range(shared, shared + context.start - 1), *range(first, first + per_context)]


def _last_pairs(contexts: Seq[Context]) -> DecoderOutput:
    """Returns the MTP layer's outputs [n, H] for the last pair of each context."""
    normed, unnormed = [], []
    for c in contexts:
        assert c.text.pairs is not None, "the text was read without the MTP layer"
        normed.append(c.text.pairs.normed[c.start - 2])
        unnormed.append(c.text.pairs.unnormed[c.start - 2])
    return DecoderOutput(torch.stack(normed), torch.stack(unnormed))
