"""Fused kernels (Liger) in place of the layers' norms and SwiGLU.

Each replaces the module of one instance and keeps its parameters and their names. Liger's own functions for
whole models are not used: they also replace functions and classes of transformers for the whole process, and
the forward pass of the head. Its rotary kernels need that, so rotary stays as it is.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

NORMS = ("Qwen2VLRMSNorm", "Qwen2_5_VLRMSNorm", "Qwen3VLTextRMSNorm", "Qwen3VLMoeTextRMSNorm")
"""Norms that scale by their weight after rounding to the input's dtype, which is Liger's default. Qwen3.5's
differ."""
MLPS = ("Qwen2MLP", "Qwen3VLTextMLP", "Qwen3VLMoeTextMLP")
"""SwiGLU without biases. Experts of a mixture are one tensor, and have a kernel of their own."""


def should_fuse(choice: bool | None) -> bool:
    """Whether to fuse, from `model.fused`. Raises ValueError where it is asked for and not possible."""
    installed, device = find_spec("liger_kernel") is not None, torch.cuda.is_available()
    if choice and not installed:
        raise ValueError(
            "model.fused (true) must be false or null without liger-kernel; install the extra fused "
            "(docs/install.md)"
        )
    if choice and not device:
        raise ValueError("model.fused (true) must be false or null without a GPU; its kernels run on no CPU")
    return installed and device if choice is None else choice


def fuse(model: nn.Module) -> int:
    """Replaces the norms and SwiGLU of a model in place. Returns how many modules
    were replaced: none for a family without."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP  # an extra, which imports Triton

    count = 0
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            kind = type(module).__name__
            if kind in NORMS:
                with torch.device("meta"):  # the parameters come from the old module
                    # In place it would overwrite a gradient that the residual stream may still need.
                    fused = LigerRMSNorm(len(module.weight), eps=module.variance_epsilon, in_place=False)
                fused.weight = module.weight
            elif kind in MLPS:
                with torch.device("meta"):
                    fused = LigerSwiGLUMLP(module.config, module.intermediate_size)
                for part, layer in module.named_children():
                    if part in fused._modules:
                        setattr(fused, part, layer)
            else:
                continue
            setattr(parent, name, fused)
            count += 1
    return count
