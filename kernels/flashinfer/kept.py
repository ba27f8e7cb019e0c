"""A cache of what decides on the device, from step to step: buffers of fixed size and address, made when first needed.

Shapes: B sequences, K draft tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from specdec.kernels.decisions import LogitEdits
from specdec.kernels.triton import Batch, Decider, Drawer, edit_words

Worker = TypeVar("Worker", Decider, Drawer)


class Kept(Generic[Worker]):
    """A cache of Deciders or Drawers, keyed by number of sequences (rounded up to a power of two), number of drafts and
    vocabulary size. One whose batch has no room for a step's edits gives way to one with twice the room they need."""

    def __init__(self, make: Callable[[Batch, int], Worker], device: torch.device) -> None:
        self._make: Callable[[Batch, int], Worker] = make
        self._device = device
        self._workers: dict[tuple[int, int, int], tuple[Worker, torch.cuda.Event]] = {}

    @contextmanager
    def packing(self, num_drafts: int, edits: Seq[LogitEdits | None], vocab_size: int) -> Iterator[Worker]:
        """Yields a worker whose batch is to be packed while the context is entered.

        Waits for the copy of what was packed before, which is done already where a step's result has been read since.

        num_drafts: the most drafts of a sequence.
        edits: [B], those of the step's sequences.
        vocab_size: of the logits.
        """
        shape, needed = (_power_of_two(len(edits)), num_drafts, vocab_size), edit_words(edits)
        if shape not in self._workers or self._workers[shape][0].batch.edit_words < needed:
            self._workers[shape] = self._new(*shape, 2 * needed), torch.cuda.Event()
        worker, copied = self._workers[shape]
        copied.synchronize()
        yield worker
        copied.record()

    @torch.inference_mode(False)  # they live on after a caller's inference mode
    def _new(self, size: int, num_drafts: int, vocab_size: int, room: int) -> Worker:
        return self._make(Batch(size, num_drafts, self._device, room), vocab_size)


def _power_of_two(num: int) -> int:
    """Returns the least power of two that is at least num."""
    return 1 << (num - 1).bit_length()
