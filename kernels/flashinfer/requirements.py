"""Finds what the CUDA backend needs and what of it is there, without importing FlashInfer; which kernels a GPU gets.

FlashInfer compiles its kernels at first use, so that a compiler and headers are needed at run time.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from specdec.kernels.fp8 import Fp8Kind

Capability = tuple[int, int]

LEAST_CAPABILITY: Capability = (8, 0)
LEAST_FLASHINFER = (0, 7, 2)
HEADERS = {"cublasLt.h": "libcublas-dev", "curand.h": "libcurand-dev"}
GIB = 2**30


@dataclass(frozen=True)
class Requirement:
    """Something that the CUDA backend needs."""

    name: str
    """What is needed."""
    found: str
    """What is there."""
    ok: bool
    """Whether that will do."""
    remedy: str
    """What to do where it will not."""


def requirements(environ: Mapping[str, str] = os.environ) -> list[Requirement]:
    """Returns all requirements, in the order in which they are best met. environ: environment variables to look at."""
    cuda_home = _cuda_home(environ)
    flags = shlex.split(environ.get("FLASHINFER_EXTRA_CUDAFLAGS", ""))
    includes = [cuda_home / "include", *(Path(flag[2:]) for flag in flags if flag.startswith("-I"))]
    return [
        _torch(),
        _triton(),
        *_device(),
        _flashinfer(),
        _nvcc(cuda_home),
        *(_header(name, includes) for name in HEADERS),
    ]


def missing(found: list[Requirement] | None = None) -> str:
    """Returns why the backend cannot run, with the remedies; empty where it can. found: None looks now."""
    lacking = [r for r in (requirements() if found is None else found) if not r.ok]
    return "; ".join(f"{r.name}: {r.found} ({r.remedy})" for r in lacking)


def visible_capability() -> Capability | None:
    """Returns the compute capability of the current CUDA device; None where torch sees none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _torch() -> Requirement:
    cuda = torch.version.cuda
    return Requirement(
        "torch with CUDA",
        f"torch {torch.__version__}, " + ("without CUDA" if cuda is None else f"CUDA {cuda}"),
        cuda is not None,
        "install a CUDA build of torch",
    )


def _triton() -> Requirement:
    there = util.find_spec("triton") is not None
    found = "installed" if there else "not installed"
    return Requirement("triton", found, there, "it comes with torch's CUDA builds for Linux: pip install triton")


def _device() -> list[Requirement]:
    least = ".".join(map(str, LEAST_CAPABILITY))
    name, remedy = "CUDA device", f"a GPU of compute capability {least} or more and its driver are needed"
    capability = visible_capability()
    if capability is None:
        return [Requirement(name, "none is visible", False, remedy)]
    free, total = torch.cuda.mem_get_info()
    found = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    return [
        Requirement(name, found, capability >= LEAST_CAPABILITY, remedy),
        Requirement("device memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB free", True, ""),
    ]


def _flashinfer() -> Requirement:
    least = ".".join(map(str, LEAST_FLASHINFER))
    try:
        version = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        version = ""
    return Requirement(
        "flashinfer-python",
        version or "not installed",
        _release(version) >= LEAST_FLASHINFER,
        f"{least} or newer is needed: pip install 'flashinfer-python>=0.7.2'",
    )


def _release(version: str) -> tuple[int, ...]:
    """Returns (0, 7, 2) for "0.7.2" and "0.7.2.post1". Pre-releases count as older than any: ()."""
    match = re.fullmatch(r"(\d+(?:\.\d+)*)(?:\.post\d+)?(?:\+.*)?", version)
    return tuple(map(int, match[1].split("."))) if match else ()


def _cuda_home(environ: Mapping[str, str]) -> Path:
    """Returns the folder where FlashInfer looks for the CUDA toolkit."""
    named = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc", path=environ.get("PATH", ""))
    return Path("/usr/local/cuda") if nvcc is None else Path(nvcc).parent.parent


def _nvcc(cuda_home: Path) -> Requirement:
    nvcc = cuda_home / "bin" / "nvcc"
    there = nvcc.is_file()
    remedy = "install the CUDA toolkit (cuda-nvcc) and set CUDA_HOME to its folder"
    return Requirement("nvcc", str(nvcc) if there else f"no {nvcc}", there, remedy)


def _header(name: str, includes: list[Path]) -> Requirement:
    there = [folder / name for folder in includes if (folder / name).is_file()]
    remedy = f"install the CUDA toolkit's {HEADERS[name]}, or set FLASHINFER_EXTRA_CUDAFLAGS=-I... to where it is"
    return Requirement(name, str(there[0]) if there else f"no {includes[0] / name}", bool(there), remedy)


@dataclass(frozen=True)
class Paths:
    """Names of the kernels that run on a GPU, by operation; fa2 and cutlass_fused_moe are FlashInfer's."""

    attention: str
    """Paged attention."""
    norm_rope_silu: str
    """Norms, RoPE and the activation."""
    experts: str
    """Routed experts in bf16."""
    fp8_linear: str
    """Linear layers of an FP8 checkpoint."""
    fp8_experts: str
    """Routed experts of an FP8 checkpoint."""


def paths(capability: Capability) -> Paths:
    """Returns the kernels that a GPU of this compute capability gets. Raises ValueError for one that is too old."""
    if capability < LEAST_CAPABILITY:
        raise ValueError(f"compute capability {capability[0]}.{capability[1]}: 8.0 or more is needed")
    kept = fp8_kinds(capability)
    return Paths(
        attention="fa2, tensor cores",
        norm_rope_silu="FlashInfer",
        experts="cutlass_fused_moe" if has_fused_moe(capability) else "grouped matrix product",
        fp8_linear="torch._scaled_mm" if "linear" in kept else DEQUANTISED,
        fp8_experts="torch._scaled_grouped_mm" if "experts" in kept else DEQUANTISED,
    )


DEQUANTISED = "dequantised to bf16 at load"


def has_fused_moe(capability: Capability) -> bool:
    """Returns whether a GPU has FlashInfer's cutlass_fused_moe, in bf16. (In FP8 it takes a scale per expert and one
    for all activations, not per channel and token.)"""
    return capability in {(8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)}


def fp8_kinds(capability: Capability) -> frozenset[Fp8Kind]:
    """Returns the kinds of matrices that stay in FP8 on a GPU: those for which torch's row-wise scaled products are
    known to work there, see `specdec.kernels.fp8`."""
    kinds: dict[Capability, tuple[Fp8Kind, ...]] = {
        (8, 9): ("linear",),
        (9, 0): ("linear", "experts"),
        (10, 0): ("linear",),
    }
    return frozenset(kinds.get(capability, ()))
