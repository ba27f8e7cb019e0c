"""Describes what a measurement ran on and with: processor, versions, kernels, source."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

import specdec
from specdec import Engine


def processor() -> str:
    """Returns the processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe_machine(engine: Engine) -> dict[str, str]:
    """Returns what the speed of an engine depends on, beside the checkpoint. "weights" is their dtype."""
    kernels = engine.runtime.model.target.kernels
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "logical processors": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": version("torch"),
        "kernels": kernels.name,
        "weights": str(getattr(kernels, "weight_dtype", kernels.dtype)).removeprefix("torch."),
    }


def git_revision(folder: Path = Path(specdec.__file__).parent) -> str | None:
    """Returns the commit of the files in `folder`, with "-dirty" where tracked ones were changed; None where git tracks
    none of them, in an installed package for one."""
    if not _git(folder, "ls-files", "--", "*.py"):
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*") or None


def _git(folder: Path, *arguments: str) -> str:
    """Returns git's standard output; empty where there is no git or it refuses."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
