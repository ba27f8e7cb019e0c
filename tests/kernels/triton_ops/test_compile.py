"""The interpreter runs much that the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
KERNELS = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, str(KERNELS)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = {name.rpartition(".")[0].rpartition(".")[2] for name in done.stdout.split()}
    assert compiled == {"edits", "truncate", "choose", "softmax", "rules", "residual", "draft", "noise"}
    assert len(done.stdout.split()) == 21
