"""CUDA kernels: FlashInfer's attention, norms, RoPE, activation and experts, behind `specdec.kernels.backend`.

`backend.FlashInferKernels` needs FlashInfer to be imported and a GPU to run; `requirements` says whether both are.
None of this has run on a GPU: its tests run FlashInfer's own Python over kernels written in torch.
"""
