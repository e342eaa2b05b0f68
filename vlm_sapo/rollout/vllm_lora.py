"""Adapters that vLLM serves as such, beside the base model: merged into weights of half precision, the
changes of the first updates would be rounded away."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vlm_sapo.models import lora as adapters
from vlm_sapo.models.linear import FULL
from vlm_sapo.models.vlm import VLM, part_of

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as the largest rank."""
NO_FOLDER = "an adapter goes through a folder that both sides see, and rollout.engine.weights is nccl"


@dataclass(frozen=True)
class AdapterShape:
    """What a model's adapters change."""

    parts: frozenset[str]
    rank: int
    bits: int | None = None
    """Of the weights beside them."""

    @classmethod
    def of(cls, vlm: VLM) -> AdapterShape | None:
        """That of a model, None without adapters."""
        layers = adapters.layers(vlm.model)
        if not layers:
            return None
        return cls(frozenset(map(part_of, layers)), adapters.rank(vlm.model), adapters.bits(vlm.model))

    @classmethod
    def read(cls, folder: Path) -> AdapterShape:
        """That of a folder in peft's format."""
        with safe_open(folder / adapters.FILE, framework="pt") as file:
            names = list(file.keys())
            ranks = [file.get_slice(name).get_shape()[0] for name in names if ".lora_A." in name]
        return cls(frozenset(map(part_of, names)), max(ranks))

    def why_merged(self, vlm: VLM) -> str:
        """Why vLLM can't serve them beside the base; empty if it can. `vlm` may be an outline."""
        if other := sorted(self.parts - {"language"}):
            return f"vLLM takes adapters of the language model only, and these change {', '.join(other)}"
        if self.bits is not None:
            return "vLLM would add them to the checkpoint's weights and not to those of 4 bits"
        if vlm.routers or vlm.layer_kinds != {FULL}:
            return "it is untested with experts and linear attention"
        if self.rank > MAX_RANKS[-1]:
            return f"vLLM takes ranks up to {MAX_RANKS[-1]}"
        return ""

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of vLLM for them."""
        return {"enable_lora": True, "max_lora_rank": next(size for size in MAX_RANKS if size >= self.rank)}


def served_beside(
    choice: str,
    shape: AdapterShape | None,
    vlm: VLM,
    dtype: str,
    *,
    obstacle: str = "",
    warn: Callable[[str], None] | None = None,
) -> bool:
    """Whether vLLM serves adapters beside the base rather than merged. `choice` is `rollout.engine.adapter`;
    `obstacle` is a further reason to merge them. `warn` hears where merging into half
    precision rounds them away.

    Raises ValueError if they shall be served and can't.
    """
    if shape is None or choice == "merged":
        return False
    reason = shape.why_merged(vlm) or obstacle
    if choice == "native":
        if reason:
            raise ValueError(f"rollout.engine.adapter (native) must be merged here: {reason}")
        return True
    if dtype == "float32":
        return False  # merged weights are faster, and round nothing away
    if reason and warn is not None:
        warn(
            f"vLLM gets the adapters merged into {dtype} weights, which round small changes away, so that "
            f"it follows the first updates late ({reason}); see `policy/mismatch`, or set algo.correction"
        )
    return not reason


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
        number = self.number + 1
        try:
            vlm.save_adapter(folder, weights)
            request = LoRARequest(f"policy-{number}", number, str(folder))
            if self.request is not None:
                llm.llm_engine.remove_lora(self.request.lora_int_id)
            llm.llm_engine.add_lora(request)
        except BaseException:
            shutil.rmtree(folder)
            raise
        self.close()
        self.number, self.request = number, request
        self.folder = folder  # vLLM may read it again

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)
            self.folder = None


def memory_folder(size: int) -> str | None:
    """A folder in memory with room for `size` bytes, if the system has one."""
    folder = Path("/dev/shm")
    return str(folder) if folder.is_dir() and shutil.disk_usage(folder).free > size else None
