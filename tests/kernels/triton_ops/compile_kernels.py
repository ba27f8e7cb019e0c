"""Compiles every Triton kernel for sm_90, as a step launches it, and prints their names; that needs no GPU.

Run by test_compile.py in a process of its own: where kernels are interpreted they cannot be compiled.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from specdec.kernels.decisions import BLOCK_VERIFICATION, TOKEN_REJECTION, Drafts, VerifyBatch
from specdec.kernels.triton import Batch, Decider, Drawer, TritonSampling
from support.sampled_rows import random_edits, sampling

V, B, K = 151_552, 2, 3
CPU = torch.device("cpu")
OPTIONS = {"enable_fp_fusion", "num_warps"}

Launch = tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]


def launches() -> list[Launch]:
    """Of a verification, a draft step and some uniforms."""
    recorded: list[Launch] = []

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorded.append((self, args, kwargs))

    JITFunction.run = run
    decider = Decider(Batch(B, K, CPU, edit_words=1000), V)
    verification = VerifyBatch(
        first_rows=[0, K + 1],
        drafts=Drafts([[1, 2, 3], [4]], [0, -1], torch.zeros(1, K, V)),
        rules=[TOKEN_REJECTION, BLOCK_VERIFICATION],
        rows=sampling(B, top_p=0.9),
        edits=[random_edits(50, 1), None],
    )
    decider.batch.pack_verification(verification, verification.first_rows)
    decider.decide(torch.zeros(B * (K + 1), V), decider.batch.drafts, verification.drafts.probs)
    Drawer(decider.batch, V).draw(torch.zeros(B, V), 1, verification.drafts.probs)
    kernels = TritonSampling()
    kernels.device = CPU
    kernels.uniforms([1, 2], 2, [3, 4], [5, 6])
    return recorded


def signature(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(signature, value))
    return "i32" if isinstance(value, int) else mangle_type(value)


def main() -> None:
    done = set()
    for kernel, args, kwargs in launches():
        constants = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        key = (kernel, *constants.items())
        if key in done or constants.get("PASS", 0) > 1:  # later passes differ in shifts only
            continue
        done.add(key)
        names = [parameter.name for parameter in kernel.params]
        types = dict(zip(names, map(signature, args))) | dict.fromkeys(constants, "constexpr")
        options = {name: value for name, value in kwargs.items() if name in OPTIONS}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(f"{kernel.fn.__module__}.{kernel.fn.__name__}")


if __name__ == "__main__":
    main()
