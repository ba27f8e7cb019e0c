"""Tests on a real GPU (make test-gpu). Without one, and without FlashInfer, they are skipped and say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.kernels import AnyBackend, select
from specdec.kernels.flashinfer.requirements import missing

CUDA = torch.device("cuda")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = missing()
    if why:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"not run on a GPU: {why}"))


@pytest.fixture(scope="session")
def kernels() -> Any:
    chosen: AnyBackend = select(CUDA, torch.bfloat16, "flashinfer")
    return chosen
