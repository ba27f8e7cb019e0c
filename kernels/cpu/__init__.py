"""C++ kernels for the CPU: each weight is read once for all rows, and a row's bits do not depend on its neighbours.

Weights are fp32, bf16 or int8, packed once at load; activations and accumulation are fp32.
"""

from specdec.kernels.cpu.backend import CpuKernels

__all__ = ["CpuKernels"]
