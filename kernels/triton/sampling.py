"""The single operations (`specdec.kernels.operations`) from logits on, by the Triton kernels."""

from __future__ import annotations

from array import array
from math import fsum
from typing import Any

import torch
from torch import Tensor

from specdec.kernels.decisions import GREEDY, LogitEdits, Residuals, RowSampling
from specdec.kernels.triton import layout
from specdec.kernels.triton.choose import Choice
from specdec.kernels.triton.edits import edit_
from specdec.kernels.triton.layout import Batch
from specdec.kernels.triton.noise import uniform_numbers
from specdec.kernels.triton.residual import Laws, Residual
from specdec.kernels.triton.slots import UNFUSED, Slots, Tiling, verified_slots
from specdec.kernels.triton.softmax import Softmax
from specdec.kernels.triton.truncate import Truncation


class TritonSampling:
    """One half of a backend: the operations from logits on. The other half has `device` and `linear`; see `Operations`
    for the contracts.

    Each call packs its arguments and allocates its buffers; a step that repeats has `Decider` and `Drawer` instead.
    """

    device: torch.device
    """Where tensors are."""

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def head_argmax(self, x: Tensor, head: Any) -> Tensor:
        logits = self.linear(x, head).contiguous()
        best = self.choose(logits, _greedy(len(logits)))
        return best.where(logits.isfinite().all(-1), -1)

    def edit_(self, logits: Tensor, edits: list[LogitEdits | None], drafts: list[list[int]]) -> None:
        if not any(edits):
            return
        room = layout.edit_words(edits)
        batch = Batch(len(edits), max(map(len, drafts)), self.device, room)
        batch.pack_edits(edits, drafts)
        edit_(logits, verified_slots(batch, batch.drafts))

    def truncate_(self, logits: Tensor, sampling: RowSampling) -> None:
        slots, tiling = self._rows(logits, sampling)
        Truncation(tiling).run_(logits, slots, cuts=sampling.cuts)

    def choose(self, logits: Tensor, sampling: RowSampling) -> Tensor:
        slots, tiling = self._rows(logits, sampling)
        return Choice(tiling).run(logits.contiguous(), slots)[: len(logits)]

    def softmax(self, logits: Tensor, scales: list[float]) -> Tensor:
        probs = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        slots, tiling = self._rows(probs, _greedy(len(scales), scales), laws=True)
        Softmax(tiling).normalise_(probs, slots)
        return probs

    def residual_mass(self, laws: Residuals) -> list[float]:
        if not laws.p_rows:
            return []
        described, tiling = self._laws(laws)
        return [fsum(sums) for sums in Residual(tiling).survey(described).tolist()]

    def sample_residual(self, laws: Residuals, uniforms: list[float]) -> list[int]:
        if not laws.p_rows:
            return []
        described, tiling = self._laws(laws)
        numbers = torch.tensor(uniforms, dtype=torch.float64).to(self.device)
        tokens = torch.empty(len(uniforms), dtype=torch.int64, device=self.device)
        residual = Residual(tiling)
        residual.survey(described)
        residual.sample(described, numbers, tokens)
        return tokens.tolist()

    def uniforms(self, seeds: list[int], stream: int, positions: list[int], starts: list[int]) -> list[float]:
        if not seeds:
            return []
        keys, _ = layout.device_words([*array("q", array("Q", seeds).tobytes()), *positions, *starts], [], self.device)
        numbers = torch.empty(len(seeds), dtype=torch.float64, device=self.device)
        uniform_numbers[(len(seeds),)](keys, stream, len(seeds), numbers, **UNFUSED)
        return numbers.tolist()

    def _rows(self, logits: Tensor, sampling: RowSampling, *, laws: bool = False) -> tuple[Slots, Tiling]:
        batch = Batch(max(1, len(logits)), 0, self.device)
        batch.pack_rows(sampling, laws=laws)
        return verified_slots(batch, batch.drafts), Tiling(batch.size, logits.shape[-1], self.device)

    def _laws(self, laws: Residuals) -> tuple[Laws, Tiling]:
        num, vocab_size = len(laws.p_rows), laws.p.shape[-1]
        places = range(num)
        ints, scales = layout.device_words(
            [*laws.p_rows, *laws.q_rows, *laws.excluded, *places], laws.scales, self.device
        )
        q = laws.p if laws.q is None else laws.q
        return Laws(laws.p, q, ints, scales, num), Tiling(num, vocab_size, self.device)


def _greedy(num: int, scales: list[float] | None = None) -> RowSampling:
    zeros = [0] * num
    return RowSampling(
        scales=scales or [1.0] * num, top_k=zeros, top_p=[1.0] * num, min_p=[0.0] * num, seeds=zeros,
        streams=[GREEDY] * num, positions=zeros, starts=zeros,
    )  # fmt: skip
