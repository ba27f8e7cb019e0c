"""What the CUDA backend needs, and what of it is missing here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def missing() -> str:
    """Why the backend cannot run, with the remedy; empty where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (install a CUDA build of torch on a machine with a GPU)"
    try:
        version("flashinfer-python")
    except PackageNotFoundError:
        return "flashinfer-python is not installed (pip install 'specdec[gpu]')"
    return ""
