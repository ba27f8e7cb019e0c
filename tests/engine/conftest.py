from __future__ import annotations

from pathlib import Path

import pytest

from support.fakes import write_planted_checkpoint


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted_checkpoint(tmp_path_factory.mktemp("planted"))
