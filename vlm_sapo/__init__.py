"""Reinforcement learning for vision-language models with Soft Adaptive Policy Optimization.

All of it is in `vlm_sapo.api`, imported on first use so that the command line starts quickly.
"""

from importlib import import_module

__all__ = [
    "Callback",
    "Interrupted",
    "evaluate",
    "load_config",
    "load_sft_config",
    "report",
    "sft",
    "train",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("vlm_sapo.api"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
