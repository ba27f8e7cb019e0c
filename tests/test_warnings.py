"""A warning points at the user's line, however deep inside the package its cause lies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specdec import AsyncEngine, Engine, SpecdecWarning
from specdec.kernels import select
from specdec.kernels.flashinfer import requirements
from support.fakes import write_checkpoint


def check(call: Callable[[], object], message: str) -> None:
    """A lambda of one line gives one warning, which points at it."""
    with pytest.warns(SpecdecWarning) as caught:
        call()
    (warning,) = caught.list
    assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno)
    assert message in str(warning.message)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Its checkpoint recommends what is not supported."""
    folder = write_checkpoint(tmp_path_factory.mktemp("recommends"))
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 2, "typical_p": 0.9}))
    return Engine.from_pretrained(folder, kernels="reference")


def test_a_checkpoint_without_an_mtp_layer(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path, with_mtp=False)
    check(lambda: Engine.from_pretrained(plain, kernels="reference"), "has no MTP layer")
    check(lambda: AsyncEngine.from_pretrained(plain, kernels="reference"), "has no MTP layer")


def test_recommendations_that_are_ignored(engine: Engine) -> None:
    message = "recommends {'typical_p': 0.9}, which is not supported"
    check(lambda: engine.generate("abc"), message)
    check(lambda: engine.stream("abc").close(), message)
    check(lambda: engine.chat([{"role": "user", "content": "abc"}]), message)
    check(lambda: engine.default_sampling_params(), message)


def test_a_request_from_an_event_loop(engine: Engine) -> None:
    async def work() -> None:
        served = AsyncEngine(engine)
        check(lambda: served.generate("abc"), "typical_p")
        await served.shutdown(drain=False)

    asyncio.run(work())


def test_a_backend_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "missing", lambda: "no nvcc")
    check(lambda: select(torch.device("cuda"), None), "using the slow reference kernels")
