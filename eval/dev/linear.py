"""Times one linear layer by number of rows, over at least 1 GB of different weights, against torch and the bandwidth.

    python -m specdec.eval.dev.linear [--dtype bfloat16] [--size 4096] [--architecture native]

Repeating one matrix would measure the cache, so every call reads another one. Medians; torch's fp32 product of 256
rows is in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch.nn.functional import linear

from specdec.eval.speed.roofline import read_bandwidth
from specdec.kernels.cpu import CpuKernels

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 256)
LEAST_BYTES = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def median_s(calls: Iterable[Callable[[], object]]) -> float:
    """Returns the median seconds of these calls, each made once."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--architecture", default="native", help="the compiler's -march; haswell is AVX2")
    args = parser.parse_args()
    kernels = CpuKernels(DTYPES[args.dtype], torch.float32, args.architecture)
    weight = torch.randn(args.size, args.size)
    packed = [kernels.pack(weight)]
    num_bytes = kernels.num_bytes(packed[0])
    packed += [kernels.pack(weight) for _ in range(LEAST_BYTES // num_bytes)]
    bandwidth = read_bandwidth(kernels)
    print(f"{args.size} x {args.size} {args.dtype}, {args.architecture}, {torch.get_num_threads()} threads, ", end="")
    print(f"{len(packed)} matrices of {num_bytes / 1e6:.1f} MB; read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print("| rows | ms | x one row | of bandwidth | GFLOP/s |\n|---|---|---|---|---|")
    one_row_s = 0.0
    for rows in ROWS:
        x = torch.randn(rows, args.size)
        seconds = median_s(partial(kernels.linear, x, matrix) for matrix in packed)
        one_row_s = one_row_s or seconds
        rate = 2 * rows * args.size**2 / seconds / 1e9
        share = num_bytes / seconds / bandwidth
        print(f"| {rows} | {seconds * 1e3:.3f} | {seconds / one_row_s:.2f} | {share:.0%} | {rate:.0f} |")
    x = torch.randn(256, args.size)
    seconds = median_s([partial(linear, x, weight)] * 7)
    print(f"torch fp32, 256 rows: {2 * 256 * args.size**2 / seconds / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
