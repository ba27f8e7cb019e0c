"""What the CUDA backend needs, and what of it is missing here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch


def missing() -> str:
    """Why the backend cannot run, with the remedy; empty where it can."""
    if not torch.cuda.is_available():
        return "the CUDA kernels cannot run here. torch sees no CUDA device: install a CUDA build of it beside a GPU"
    try:
        version("flashinfer-python")
    except PackageNotFoundError:
        return "the CUDA kernels cannot run here. flashinfer-python is not installed: pip install 'specdec[gpu]'"
    return ""
