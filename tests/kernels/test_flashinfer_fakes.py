"""The fakes themselves: FlashInfer as installed is the one they stand for, and they see what would go wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: make test-flashinfer")

import flashinfer

from support import flashinfer_fakes
from support.flashinfer_fakes import FakeDevice, signatures
from support.flashinfer_fakes.device import CPU, on_device

PAGE_SIZE = 16


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return flashinfer_fakes.install(monkeypatch)


def test_the_installed_flashinfer_has_the_committed_signatures() -> None:
    assert signatures.installed() == signatures.COMMITTED["signatures"]
    assert flashinfer.__version__ == signatures.COMMITTED["version"]


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def decode_wrapper() -> Any:
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(1024, dtype=torch.uint8, device=CPU), "NHD", use_tensor_cores=True, backend="fa2"
    )


BFLOAT16 = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}


def plan(wrapper: Any, kv_len: int = 20, **how: Any) -> None:
    num_pages = -(-kv_len // PAGE_SIZE)
    pages = integers(0, num_pages), on_device(integers(*range(num_pages))), integers(kv_len - (num_pages - 1) * 16)
    wrapper.plan(*pages, 4, 2, 64, PAGE_SIZE, **(BFLOAT16 | how))


def test_a_plan_and_its_run(fake: FakeDevice) -> None:
    wrapper, cache = decode_wrapper(), torch.randn(2, 2, PAGE_SIZE, 2, 64).bfloat16()
    plan(wrapper, q_len_per_req=4)
    assert wrapper.run(torch.randn(4, 4, 64).bfloat16(), cache).isfinite().all()


def test_the_default_dtype_is_float16_and_is_seen(fake: FakeDevice) -> None:
    with pytest.raises(AssertionError, match=r"kernels for torch\.float16"):
        plan(decode_wrapper(), q_data_type="float16")


def test_misspelt_keywords_are_seen(fake: FakeDevice) -> None:
    with pytest.raises(TypeError, match="q_len_per_request"):
        plan(decode_wrapper(), q_len_per_request=4)


def test_too_few_keys_are_seen(fake: FakeDevice) -> None:
    with pytest.raises(ValueError, match="requires kv_len >= q_len_per_req"):
        plan(decode_wrapper(), kv_len=3, q_len_per_req=4)


def test_lengths_on_the_device_are_seen(fake: FakeDevice) -> None:
    wrapper = decode_wrapper()
    with fake.waiting() as waits:
        lengths = on_device(integers(0, 2)), on_device(integers(0, 1)), on_device(integers(4))
        with pytest.raises(AssertionError, match="on the device"):
            wrapper.plan(*lengths, 4, 2, 64, PAGE_SIZE, **BFLOAT16)
    assert waits


def test_a_plan_before_the_last_one_was_copied_is_seen(fake: FakeDevice) -> None:
    wrapper = decode_wrapper()
    plan(wrapper)
    with pytest.raises(AssertionError, match="planned before"):
        plan(wrapper)
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    plan(wrapper)


def test_keys_of_another_dtype_or_sequence_are_seen(fake: FakeDevice) -> None:
    cache, keys = torch.zeros(2, 2, PAGE_SIZE, 2, 64).bfloat16(), torch.randn(1, 2, 64)
    pages = integers(0, 1), integers(0, 2), integers(PAGE_SIZE)
    append = flashinfer.append_paged_kv_cache
    append(keys.bfloat16(), keys.bfloat16(), integers(0), integers(31), cache, *pages)
    with pytest.raises(AssertionError, match=r"torch\.float32 into a torch\.bfloat16 cache"):
        append(keys, keys, integers(0), integers(3), cache, *pages)
    with pytest.raises(AssertionError, match="sequence -1"):
        append(keys.bfloat16(), keys.bfloat16(), integers(-1), integers(3), cache, *pages)
    with pytest.raises(AssertionError, match="position 32"):
        append(keys.bfloat16(), keys.bfloat16(), integers(0), integers(32), cache, *pages)


def test_waits_are_counted(fake: FakeDevice) -> None:
    x = on_device(torch.arange(4))
    for wait in (
        lambda: (x + 1).tolist(), lambda: x.sum().item(), lambda: bool(x[0] == 0), lambda: x[[0, 1]],
        lambda: x[x > 1], lambda: torch.tensor([1], device=CPU), lambda: x.cpu(), lambda: x.unique(),
    ):  # fmt: skip
        with fake.waiting() as waits:
            wait()
        assert len(waits) == 1
    with fake.waiting() as waits:
        x.index_select(0, x).clamp(min=2)[1:].contiguous().to(torch.float32)
    assert waits == []


def capture(fake: FakeDevice, run: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
        run()
    return graph


def test_a_replay_computes_again_from_what_its_buffers_hold(fake: FakeDevice) -> None:
    x, out = torch.tensor([1.0, 2.0]), []
    graph = capture(fake, lambda: out.append((x * 2)[1:] + 1))
    assert out[0].tolist() == [5]
    x.copy_(torch.tensor([3.0, 4.0]))
    graph.replay()
    assert out[0].tolist() == [9]
    assert x.untyped_storage().data_ptr() in graph.external


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda: torch.ones(2).nonzero(),
        lambda: torch.ones(1).item(),
        lambda: torch.tensor([1.0]) + 1,
        lambda: plan(decode_wrapper()),
        lambda: on_device(torch.ones(2)).tolist(),
    ],
)
def test_what_a_capture_must_not_do(fake: FakeDevice, forbidden: Any) -> None:
    with pytest.raises(AssertionError, match="in a capture"):
        capture(fake, forbidden)
    assert fake.capturing is None
