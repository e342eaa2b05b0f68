"""Errors that say that a GPU's memory is full, by who raises them."""

import torch

SHORTAGES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),  # torch's allocator
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    torch.AcceleratorError(
        "CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"
    ),  # cudaMalloc of others
    RuntimeError("CUDA driver error: out of memory"),  # expandable segments
    RuntimeError("Triton Error [CUDA]: out of memory"),
)
