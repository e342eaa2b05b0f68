"""The vision tower: encodes images into the features that replace their image tokens.

[M] image tokens of all images, [H] hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vlm_sapo.models.families.family import Family
from vlm_sapo.types import ImageInputs, Prompt

Source = Prompt | ImageInputs
"""Something with images."""


@dataclass(frozen=True)
class Features:
    """Features of the images of one or several prompts, in order."""

    tokens: torch.Tensor
    """[M, H]."""
    deep: tuple[torch.Tensor, ...] = ()
    """[M, H] for each of the first layers of the language model (Qwen3-VL's deepstack)."""

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
    """Encodes images; caches features when the tower and its mergers are frozen.

    Each prompt, and each answer of an environment, is then encoded once, for rollout, old log-probs and every
    update; its features are freed with it. The first `budget` bytes of cached features stay on `device`, the
    rest in host memory. `always`: run on a dummy patch if a batch has no image, so that FSDP ranks stay in
    step.
    """

    def __init__(self, model: nn.Module, family: Family, *, budget: int):
        self.model, self.family, self.budget = model, family, budget
        self.device = model.device
        self.always = False
        self.cached: WeakKeyDictionary[Source, Features] = WeakKeyDictionary()

    @property
    def frozen(self) -> bool:
        parameters = (parameter for module in self.modules for parameter in module.parameters())
        return not any(parameter.requires_grad for parameter in parameters)

    @property
    def modules(self) -> list[nn.Module]:
        """The tower and what maps its output to the language model's."""
        return self.family.vision_modules(self.model)

    def __call__(self, sources: Sequence[Source]) -> Features | None:
        """Features of all images of the sources, or None without images."""
        with_images = [source for source in sources if source.pixels is not None]
        if not with_images:
            return self._encode_dummy() if self.always else None
        if not self.frozen:
            return Features.join(self._encode(with_images))
        new = [source for source in dict.fromkeys(with_images) if source not in self.cached]
        if new:
            with torch.no_grad():
                self._cache(new, self._encode(new))
        return Features.join([self.cached[source].to(self.device) for source in with_images])

    def _encode_dummy(self) -> Features:
        """No features, from a pass over the smallest image."""
        tokens, *deep = self._run(*self.family.blank_image(self.model.config, 1))
        return Features(tokens[:0], tuple(layer[:0] for layer in deep))

    def _cache(self, sources: list[Source], features: list[Features]) -> None:
        used = sum(item.num_bytes for item in self.cached.values() if item.tokens.device.type != "cpu")
        for source, item in zip(sources, features, strict=True):
            used += item.num_bytes
            self.cached[source] = item if used <= self.budget else item.to("cpu")

    def _encode(self, sources: list[Source]) -> list[Features]:
        """Each source's features, from one pass of the tower over all images."""
        pixels = torch.cat([source.pixels for source in sources])
        layers = self._run(pixels, torch.cat([source.grid for source in sources]))
        config = self.model.config
        sizes = [sum(self.family.image_tokens(config, source.grid)) for source in sources]
        parts = zip(*(layer.split(sizes) for layer in layers), strict=True)
        return [Features(own, tuple(rest)) for own, *rest in parts]

    def _run(self, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        """Features [M, H] of the image tokens, then those for each of the first layers."""
        return self.family.features(
            self.model, pixels.to(self.device, self.model.dtype), grid.to(self.device)
        )
