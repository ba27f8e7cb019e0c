"""What the C++ library is handed: every address leads to the values that it stands for."""

from __future__ import annotations

from array import array
from ctypes import c_int64

import pytest
import torch

from specdec.kernels import AttentionMetadata
from specdec.kernels.cpu.structs import VerificationCall, batch_struct, one_array
from specdec.kernels.decisions import Drafts, VerifyBatch
from support.sampled_rows import mixed_rows

LISTS: dict[str, list[list[int]]] = {
    "one": [[1, 2, 3]],
    "several": [[1], [-2, 3], [1 << 62, 5, 6]],
    "empty ones": [[], [1, 2], [], [3], []],
    "nothing": [[], []],
}


def values_at(address: int, size: int) -> list[int]:
    return list((c_int64 * size).from_address(address))


def reuse_freed_memory() -> list[array[int]]:
    return [array("q", [-77] * size) for size in range(1, 64) for _ in range(20)]


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_each_list_lies_at_its_address_in_one_array(lists: list[list[int]]) -> None:
    copies = [list(part) for part in lists]
    values, addresses = one_array(*lists)
    assert lists == copies
    assert values.tolist() == sum(lists, [])  # noqa: RUF017
    assert [values_at(a, len(part)) for a, part in zip(addresses, lists, strict=True)] == lists


def test_a_batch_points_to_its_lists_as_long_as_it_lives() -> None:
    batch = batch_struct(AttentionMetadata([2, 1, 4], [7, 3, 4], [[5, 9], [], [8]], 4))
    _others = reuse_freed_memory()
    assert batch.num_sequences == 3
    assert values_at(batch.query_starts, 4) == [0, 2, 3, 7]
    assert values_at(batch.kv_lens, 3) == [7, 3, 4]
    assert values_at(batch.page_starts, 4) == [0, 2, 2, 3]
    assert values_at(batch.pages, 3) == [5, 9, 8]


@pytest.mark.parametrize("keep_logits", [False, True])
def test_a_verification_points_to_its_lists_and_reads_its_tokens_back(keep_logits: bool) -> None:
    probs = torch.zeros(2, 5, 20)
    drafts = Drafts([[11, 12], [], [13]], [1, -1, 0], probs)
    batch = VerifyBatch([0, 3, 4], drafts, [2, 0, 1], mixed_rows(3, [0]), [None] * 3, keep_logits)
    call = VerificationCall(batch, vocab_size=20)
    _others = reuse_freed_memory()
    assert values_at(call.struct.rules, 3) == [2, 0, 1]
    assert values_at(call.struct.first_rows, 3) == [0, 3, 4]
    assert values_at(call.struct.starts, 4) == [0, 2, 2, 3]
    assert values_at(call.struct.prob_rows, 3) == [1, -1, 0]
    assert values_at(call.struct.drafts, 3) == [11, 12, 13]
    assert (call.struct.draft_probs, call.struct.prob_steps) == (probs.data_ptr(), 5)
    for logits, address in ((call.raw, call.struct.raw), (call.processed, call.struct.processed)):
        assert address == (logits.data_ptr() if logits is not None else None)
        assert (tuple(logits.shape) if logits is not None else None) == ((6, 20) if keep_logits else None)
    (c_int64 * 6).from_address(call.struct.tokens)[:] = [11, 40, -1, 50, 13, 60]
    (c_int64 * 3).from_address(call.struct.num_tokens)[:] = [2, 1, 2]
    assert call.token_ids() == [[11, 40], [50], [13, 60]]
