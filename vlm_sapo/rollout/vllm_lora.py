"""Adapters that vLLM serves as such, beside the base model: merged into weights of half precision, the
changes of the first updates would be rounded away."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.vlm import VLM, part_of

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank."""


def why_merged(vlm: VLM) -> str:
    """Why the model's adapters can't be served beside their base; empty if they can."""
    layers = adapters.layers(vlm.model)
    if not layers:
        return "the model has no adapters"
    if other := sorted({part_of(name) for name in layers} - {"language"}):
        return f"vLLM takes adapters of the language model only, and these change {', '.join(other)}"
    if adapters.bits(vlm.model) is not None:
        return "vLLM would add them to the checkpoint's weights and not to those of 4 bits"
    if vlm.routers or not vlm.attends_fully:
        return "it is untested with experts and linear attention"
    if adapters.rank(vlm.model) > MAX_RANKS[-1]:
        return f"vLLM takes ranks up to {MAX_RANKS[-1]}"
    return ""


def lora_arguments(vlm: VLM) -> dict[str, Any]:
    """Arguments of vLLM for the model's adapters."""
    rank = adapters.rank(vlm.model)
    return {"enable_lora": True, "max_lora_rank": next(size for size in MAX_RANKS if size >= rank)}


class ServedAdapter:
    """The adapters that an `LLM` of this process samples with: those of the last `update`."""

    def __init__(self) -> None:
        self.number = 0
        self.folder: Path | None = None
        self.request: Any = None

    def update(self, llm: Any, vlm: VLM) -> None:
        """Gives vLLM the present adapters, under a new name, since it caches prompts by the name. All
        processes must call this."""
        from vllm.lora.request import LoRARequest

        weights = vlm.adapter_weights()
        size = sum(weight.nbytes for weight in weights.values())
        folder = Path(tempfile.mkdtemp(prefix="adapter_", dir=memory_folder(size)))
        vlm.save_adapter(folder, weights)
        previous, self.number = self.request, self.number + 1
        self.request = LoRARequest(f"policy-{self.number}", self.number, str(folder))
        if previous is not None:
            llm.llm_engine.remove_lora(previous.lora_int_id)
        llm.llm_engine.add_lora(self.request)
        self.close()
        self.folder = folder  # vLLM may read it again

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)
            self.folder = None


def memory_folder(size: int) -> str | None:
    """A folder in memory with room for `size` bytes, if the system has one."""
    folder = Path("/dev/shm")
    return str(folder) if folder.is_dir() and shutil.disk_usage(folder).free > size else None
