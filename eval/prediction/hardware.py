"""GPUs by their maker's figures. None was measured here.

The data sheets themselves could not be opened from here: each figure was compared with the second page that is named.
Rates are dense: NVIDIA's data sheets print them with 2:4 sparsity, twice as high. A link's bandwidth is that of one
direction, half of what is printed.

- h100 (SXM5): 80 GB HBM3, 3.35 TB/s, 1,979 TFLOP/s bf16 and 3,958 fp8 with sparsity, NVLink 900 GB/s in both
  directions. https://www.nvidia.com/en-us/data-center/h100/; https://glennklockwood.com/garden/processors/h100
- h200 (SXM): the same chip, 141 GB HBM3e, 4.8 TB/s. https://www.nvidia.com/en-us/data-center/h200/;
  https://aiwiki.ai/wiki/nvidia_h200
- b200 (HGX, 1,000 W): 180 GB HBM3e, 4,500 TFLOP/s bf16 and 9,000 fp8 with sparsity, NVLink 1.8 TB/s.
  https://www.nvidia.com/en-us/data-center/dgx-b200/; https://glennklockwood.com/garden/processors/B200. The data
  sheet rounds its bandwidth to 8 TB/s; 7,680 bits at 3,996 MHz are 7.67 (https://github.com/pytorch/ao/pull/4002).
- gb200 (NVL72): 186 GB, 8 TB/s (576 TB/s for 72), 5,000 TFLOP/s bf16 and 10,000 fp8 with sparsity.
  https://www.nvidia.com/en-us/data-center/gb200-nvl72/; https://glennklockwood.com/garden/processors/B200
- rtx3090: 24 GB GDDR6X, 936 GB/s, 71 TFLOP/s bf16 with fp32 accumulation, no fp8; PCIe 4.0 x16.
  NVIDIA Ampere GA102 GPU Architecture, white paper V2.0, appendix A (its TFLOP/s not compared with another page).
"""

from __future__ import annotations

from dataclasses import dataclass

GB, TB, TFLOPS = 1e9, 1e12, 1e12


@dataclass(frozen=True)
class GPU:
    """memory: bytes. bandwidth: of that memory, bytes/s. bf16_flops, fp8_flops: dense FLOP/s, fp8 None where it has
    none. link_bandwidth: to the other GPUs, bytes/s in one direction. max_gpus: so linked."""

    name: str
    memory: float
    bandwidth: float
    bf16_flops: float
    fp8_flops: float | None
    link_bandwidth: float
    max_gpus: int

    def flops(self, dtype: str) -> float:
        """FLOP/s of matrices in `dtype`, "bf16" or "fp8". ValueError where the GPU has no units for it."""
        rate = self.fp8_flops if dtype == "fp8" else self.bf16_flops
        if rate is None:
            raise ValueError(f"dtype = {dtype!r}: {self.name} has no {dtype} units, choose bf16")
        return rate


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("h100", 80 * GB, 3.35 * TB, 989.4 * TFLOPS, 1978.9 * TFLOPS, 450 * GB, 8),
        GPU("h200", 141 * GB, 4.8 * TB, 989.4 * TFLOPS, 1978.9 * TFLOPS, 450 * GB, 8),
        GPU("b200", 180 * GB, 7.67 * TB, 2250 * TFLOPS, 4500 * TFLOPS, 900 * GB, 8),
        GPU("gb200", 186 * GB, 8 * TB, 2500 * TFLOPS, 5000 * TFLOPS, 900 * GB, 72),
        GPU("rtx3090", 24 * GB, 0.936 * TB, 71 * TFLOPS, None, 31.5 * GB, 8),
    )
}


def find_gpu(name: str) -> GPU:
    """ValueError for an unknown name."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ValueError(f"gpu = {name!r} is unknown: choose one of {', '.join(GPUS)}") from None
