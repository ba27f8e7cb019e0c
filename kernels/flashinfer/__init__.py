"""CUDA kernels on FlashInfer."""
