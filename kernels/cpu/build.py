"""Compiles the C++ sources beside this file, once per source, compiler and processor, into the user's cache."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from specdec.errors import KernelsUnavailableError
from specdec.kernels.progress import Progress, silent

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
FLAGS = ["-O3", "-ffp-contract=off", "-fopenmp", "-std=c++17", "-shared", "-fPIC"]
COMPILERS = ("g++", "clang++")


def library_path(architecture: str = "native", progress: Progress = silent) -> Path:
    """Returns the path of the compiled library, and compiles it where the cache does not hold it yet.

    The environment's SPECDEC_CXXFLAGS are added to the compiler's flags.

    architecture: the compiler's -march.
    progress: hears of a compilation.

    Raises KernelsUnavailableError without a compiler, where the cache cannot be written and where compiling fails.
    """
    compiler = _find_compiler()
    flags = [*FLAGS, f"-march={architecture}", *os.environ.get("SPECDEC_CXXFLAGS", "").split()]
    path = cache_folder() / f"specdec-{_key(compiler, flags)}.so"
    if path.exists():
        log.debug("the C++ kernels are %s", path)
    else:
        _compile(compiler, flags, path, progress)
    return path


def cache_folder() -> Path:
    """Returns the folder for compiled libraries: below SPECDEC_CACHE, XDG_CACHE_HOME or ~/.cache, the first that is
    set."""
    base = os.environ.get("SPECDEC_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "specdec" / "kernels"


def _find_compiler() -> str:
    for name in (os.environ.get("CXX"), *COMPILERS):
        if name and (found := shutil.which(name)):
            return found
    raise KernelsUnavailableError(f"no C++ compiler was found ({' or '.join(COMPILERS)}, or the one CXX names)")


def _key(compiler: str, flags: list[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    for part in (compiler, version, *flags, _processor()):
        digest.update(part.encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Returns a text that changes whenever -march=native could mean something else."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "".join(
        next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Features")
    )


def _compile(compiler: str, flags: list[str], path: Path, progress: Progress) -> None:
    """Compiles the sources into a file of its own and renames it: several processes that compile at once each end with
    a whole library."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    except OSError as error:
        raise KernelsUnavailableError(
            f"the cache {path.parent} cannot be written: {error} (SPECDEC_CACHE moves it)"
        ) from error
    os.close(handle)
    command = [compiler, *flags, str(SOURCES / "api.cpp"), "-o", temporary]
    log.info("compiling the C++ kernels, once, into %s", path)
    log.debug("%s", " ".join(command))
    start_s = time.perf_counter()
    progress("compiling the C++ kernels", 0, 1)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KernelsUnavailableError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    progress("compiling the C++ kernels", 1, 1)
    log.info("compiled the C++ kernels in %.1f s", time.perf_counter() - start_s)
