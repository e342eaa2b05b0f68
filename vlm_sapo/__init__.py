"""Reinforcement learning for vision-language models with Soft Adaptive Policy Optimization.

`load_config`, `train` and `evaluate`, and `load_sft_config` and `sft`, are those of `vlm_sapo.api`; they are
imported when they are asked for, so that the command line starts at once.
"""

from importlib import import_module
from typing import Any

__all__ = ["evaluate", "load_config", "load_sft_config", "sft", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("vlm_sapo.api"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
