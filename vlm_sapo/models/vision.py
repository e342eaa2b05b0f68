"""The vision tower: prompts' pictures to the features that stand in for their image tokens.

[M] image tokens of all pictures, [H] width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vlm_sapo.types import Prompt


@dataclass(frozen=True)
class Features:
    """Features of one or several prompts' pictures, in order."""

    tokens: torch.Tensor
    """[M, H]."""
    deep: tuple[torch.Tensor, ...] = ()
    """[M, H] for each of the language model's first layers (Qwen3-VL's deepstack)."""

    def to(self, device: torch.device | str) -> Features:
        return Features(self.tokens.to(device), tuple(layer.to(device) for layer in self.deep))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.tokens, *self.deep))

    @staticmethod
    def join(parts: list[Features]) -> Features:
        return Features(
            torch.cat([part.tokens for part in parts]),
            tuple(torch.cat(layers) for layers in zip(*(part.deep for part in parts), strict=True)),
        )


class Vision:
    """Looks at prompts. Where nothing of the tower and its mergers is trained, each prompt is looked at once:
    its features serve rollout, old log-probs and every update, and go when the prompt goes.

    The first `budget` bytes of kept features stay on `device`, the rest in host memory. With `always` every
    pass runs the tower, be there pictures or not: where it is sharded, all processes must.
    """

    def __init__(self, model: nn.Module, *, budget: int):
        self.model, self.budget = model, budget
        self.device = model.device
        self.always = False
        self.kept: WeakKeyDictionary[Prompt, Features] = WeakKeyDictionary()

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.model.model.visual.parameters())

    def __call__(self, prompts: list[Prompt]) -> Features | None:
        """Features of all pictures of the prompts, None where there is no picture."""
        pictured = [prompt for prompt in prompts if prompt.pixels is not None]
        if not pictured:
            return self._blank() if self.always else None
        if not self.frozen:
            return Features.join(self._look(pictured))
        new = [prompt for prompt in dict.fromkeys(pictured) if prompt not in self.kept]
        if new:
            with torch.no_grad():
                self._keep(new, self._look(new))
        return Features.join([self.kept[prompt].to(self.device) for prompt in pictured])

    def _blank(self) -> Features:
        """No features, but of a look."""
        config = self.model.config.vision_config
        patches = config.spatial_merge_size**2
        size = config.in_channels * config.temporal_patch_size * config.patch_size**2
        grid = torch.tensor([[1, config.spatial_merge_size, config.spatial_merge_size]])
        tokens, *deep = self._run(torch.zeros(patches, size), grid)
        return Features(tokens[:0], tuple(layer[:0] for layer in deep))

    def _keep(self, prompts: list[Prompt], features: list[Features]) -> None:
        used = sum(item.num_bytes for item in self.kept.values() if item.tokens.device.type != "cpu")
        for prompt, item in zip(prompts, features, strict=True):
            used += item.num_bytes
            self.kept[prompt] = item if used <= self.budget else item.to("cpu")

    def _look(self, prompts: list[Prompt]) -> list[Features]:
        """One pass of the tower over the pictures of all prompts; the features of each prompt."""
        pixels = torch.cat([prompt.pixels for prompt in prompts])
        layers = self._run(pixels, torch.cat([prompt.grid for prompt in prompts]))
        merge = self.model.config.vision_config.spatial_merge_size**2
        sizes = [int(prompt.grid.prod(-1).sum()) // merge for prompt in prompts]
        parts = zip(*(layer.split(sizes) for layer in layers), strict=True)
        return [Features(own, tuple(rest)) for own, *rest in parts]

    def _run(self, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        """Features [M, H] for the image tokens, and for each of the first layers."""
        output = self.model.model.get_image_features(
            pixels.to(self.device, self.model.dtype), grid.to(self.device)
        )
        return [torch.cat(output.pooler_output), *map(_flat, output.get("deepstack_features") or ())]


def _flat(layer: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """transformers gives a layer's features whole, or by picture since 5.20 or so."""
    return layer if isinstance(layer, torch.Tensor) else torch.cat(layer)
