"""`python -m specdec.kernels.flashinfer.compile_check FOLDER [NAME ...]`: compiles the FlashInfer modules that we use
for an H100 (sm_90a, bf16, head_dim 128), and loads them; needs nvcc, but no GPU.

What is built goes below FOLDER. Without names: all but `experts`, which take hours on a few cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _attention() -> Any:
    from flashinfer.jit.attention.modules import _gen_batch_prefill_primary_module

    bf16, head_dim, no_position_encoding = torch.bfloat16, 128, 0
    return _gen_batch_prefill_primary_module(
        "fa2", bf16, bf16, bf16, torch.int32, head_dim, head_dim, no_position_encoding, False, False, False
    )


def _activation() -> Any:
    from flashinfer.jit.activation import gen_act_and_mul_module

    return gen_act_and_mul_module("silu")


def _page() -> Any:
    from flashinfer.jit.page import gen_page_module

    return gen_page_module()


def _rope() -> Any:
    from flashinfer.jit.rope import gen_rope_module

    return gen_rope_module()


def _norm() -> Any:
    from flashinfer.jit.norm import gen_norm_module

    return gen_norm_module()


def _experts() -> Any:
    from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

    return gen_cutlass_fused_moe_sm90_module()


MODULES: dict[str, Callable[[], Any]] = {
    "activation": _activation,
    "page": _page,
    "rope": _rope,
    "attention": _attention,
    "norm": _norm,  # the CUDA one, which FlashInfer takes where CuTe DSL does not know the GPU
    "experts": _experts,
}
# What must be found in a loaded module.
FUNCTIONS = {
    "activation": ["silu_and_mul"],
    "page": ["append_paged_kv_cache"],
    "rope": ["apply_rope_pos_ids_cos_sin_cache"],
    "attention": ["plan", "paged_run"],
    "norm": ["rmsnorm", "fused_add_rmsnorm"],
    "experts": ["init"],
}


def build(name: str) -> None:
    """Compiles a module and loads it, in a process that has the variables of `environment`. Raises what either raises,
    AttributeError for a function that is not there."""
    module = MODULES[name]().build_and_load()
    for function in FUNCTIONS[name]:
        getattr(module, function)


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment variables to build below `folder` in.

    Modules are linked against libcuda, which comes with a driver; an empty one, which is made here, will do to load
    them.
    """
    stub = folder / "stub"
    stub.mkdir(parents=True, exist_ok=True)
    library = stub / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    link = stub / "libcuda.so"
    link.unlink(missing_ok=True)
    link.symlink_to(library.name)
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    paths = [str(stub), f"{cuda}/lib64", os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        "MAX_JOBS": "1",
        **os.environ,
        "CUDA_HOME": cuda,
        "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
        "FLASHINFER_EXTRA_LDFLAGS": f"-L{stub}",
        "FLASHINFER_WORKSPACE_BASE": str(folder),
        "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
    }


def main(arguments: list[str]) -> int:
    if not arguments or not set(arguments[1:]) <= MODULES.keys():
        print(f"usage: compile_check FOLDER [{' | '.join(MODULES)} ...]", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).absolute()
    names, environ, num_failed = (
        arguments[1:] or [name for name in MODULES if name != "experts"],
        environment(folder),
        0,
    )
    for name in names:
        start = time.perf_counter()
        code = f"from {__spec__.name} import build; build({name!r})"
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
        took_s = time.perf_counter() - start
        print(f"{name}: {'compiled and loaded' if done.returncode == 0 else 'FAILED'}, {took_s:.0f} s", flush=True)
        if done.returncode != 0:
            num_failed += 1
            print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
