"""What a model family tells about itself: its conventions, and the config of a small model of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL.Image import Image
from qwen_vl_utils import fetch_image
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen2VLImageProcessor

from vlm_sapo.types import Coordinates

CHATML_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
CHATML_ENDS = ("<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. The defaults make the quick start's: about a million parameters."""

    hidden: int = 96
    layers: int = 3
    vision_layers: int = 2
    heads: int = 4
    head_dim: int = 32
    patch: int = 8
    max_pixels: int = 64 * 64
    init_std: float = 0.08
    """Standard deviation of the initial weights: 1 / sqrt(hidden) or so; .02 is for wide models."""
    vision_hidden: int | None = None
    """Width of the vision tower; by default the language model's."""
    vision_ratio: int = 2
    """Width of the vision tower's feed-forward layers over its own."""
    embedding_rows: int = 0
    """At least; the tokenizer may need more."""
    experts: int = 4
    """Experts of an MoE layer, of which two are active per token."""
    expert_ratio: float = 2.0
    """Width of an expert over that of the language model."""
    dtype: str = "float32"

    @property
    def tower(self) -> int:
        """Width of the vision tower."""
        return self.vision_hidden or self.hidden


@dataclass(frozen=True)
class Chat:
    """The chat layout and special tokens of a small model's processor and tokenizer."""

    template: str = CHATML
    tokens: Mapping[str, str] = field(default_factory=lambda: CHATML_TOKENS)
    """Special tokens that the processor asks the tokenizer for, by its name for them."""
    others: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    """Further special tokens."""
    ends: tuple[str, ...] = CHATML_ENDS
    """Tokens that end a response; the first is the tokenizer's end of sequence."""
    ids: Mapping[str, str] = field(
        default_factory=lambda: {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }
    )
    """Tokens whose ids the model's config has, by its name for them: those that stand for images and videos,
    and those around them. No engine may sample them."""
    unlisted: tuple[str, ...] = ()
    """Such tokens whose ids the config has not."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers, and the conventions that its models were trained with."""

    title: str
    processor: type
    video_processor: type | None
    coordinates: Coordinates
    """How it writes boxes and points; the verifiers' default."""
    text: Callable[[Shape], dict]
    """Fields of a small model's `text_config` beside the common ones."""
    vision: Callable[[Shape], dict]
    """Fields of its `vision_config` beside the common ones."""
    vocabularies: tuple[str, ...] = ("vocab_size",)
    """Fields of its `text_config` that say how many tokens there are."""
    whole: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a small model's config beside those of its two parts."""
    languages: tuple[str, ...] = ()
    """Language models that it may have; empty for its one and only."""
    image_processor: type = Qwen2VLImageProcessor
    chat: Chat = Chat()
    enclosed_by: tuple[int, int] = (0, 0)
    """How many tokens its processor, not the chat template, writes before and after an image's."""
    frames_per_image: int = 1
    """Times that the bounds of its image processor count an image's pixels."""
    fixed_minimum: bool = False
    """Whether `model.min_pixels` can't make its smallest images smaller."""
    thinks: bool = False
    """Whether it has models that think, between THOUGHT_TAGS."""
    tool_calls: Literal["json", "xml"] | None = None
    """How its chat template writes a call inside `<tool_call>`: a JSON object with name and arguments, or
    `<function=name>` with `<parameter=name>`; None if it knows no tools, or writes them in another way."""
    hermes: bool = False
    """Whether it was trained with tools that are described in the system message, and `<tool_call>` with
    JSON, though its chat template has none."""
    experts_transposed: bool = False
    """Whether checkpoints store the experts' matrices as [E, in, out]; transformers has [E, out, in]."""

    def check(self, config: PreTrainedConfig) -> None:
        """Raises ValueError for a model that this family's code is not for."""
        kind = config.get_text_config().model_type
        if self.languages and kind not in self.languages:
            raise ValueError(
                f"text_config.model_type of model.path ({kind}) must be {' or '.join(self.languages)} in a "
                f"model of {self.title}; use a checkpoint with such a language model"
            )

    def check_processor(self, config: PreTrainedConfig, processor) -> None:
        """Raises ValueError for a processor that is not the model's."""

    def vision_tokens(self, config: PreTrainedConfig, tokenizer) -> list[int]:
        """Tokens that stand for images and videos or enclose them, which no engine may sample."""
        fields = config.to_dict()
        unlisted = tokenizer.convert_tokens_to_ids(list(self.chat.unlisted)) if self.chat.unlisted else []
        listed = [fields[name] for name in self.chat.ids]
        return [token for token in (*listed, *unlisted) if token is not None]

    def placeholders(self, processor) -> list[str]:
        """The tokens that its chat template writes for an image, and for a video if it takes any."""
        return [processor.image_token, *([processor.video_token] if self.video_processor else [])]

    def pixel_bounds(self, image_processor) -> tuple[int, int]:
        """Smallest and largest area in pixels to which the model's own processor resizes an image."""
        size = image_processor.size
        return size["shortest_edge"] // self.frames_per_image, size["longest_edge"] // self.frames_per_image

    def resize(self, image: Image, image_processor, bounds: tuple[int, int]) -> Image:
        """The image in the size in which the model sees it. Raises ValueError if it can't be resized."""
        return resize_to_patches(image, image_processor.patch_size, bounds)

    def process(
        self, processor, text: str, images: Sequence[Image], bounds: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Token ids [P], patches [N, D] and grid [I, 3] of a text with one image token for each of I resized
        images."""
        encoded = encode(processor, text, images=list(images) or None, do_resize=False)
        return encoded["input_ids"][0], encoded.get("pixel_values"), encoded.get("image_grid_thw")

    def patches_per_token(self, config: PreTrainedConfig) -> int:
        """Patches that become one image token."""
        return config.vision_config.spatial_merge_size**2

    def image_tokens(self, config: PreTrainedConfig, grid: torch.Tensor) -> list[int]:
        """How many tokens each image of a grid [I, 3] has."""
        return (grid.prod(-1) // self.patches_per_token(config)).tolist()

    def attended_patches(self, config: PreTrainedConfig) -> int | None:
        """Most patches that a patch attends to in the tower; None for all of its image."""
        return None

    def pixels_per_token(self, config: PreTrainedConfig) -> int:
        """Area in pixels that becomes one image token."""
        return config.vision_config.patch_size**2 * self.patches_per_token(config)

    def most_image_tokens(self, config: PreTrainedConfig, max_pixels: int) -> int:
        """Tokens of the largest image of at most so many pixels."""
        return max_pixels // self.pixels_per_token(config)

    def blank_image(self, config: PreTrainedConfig, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches [N, D] and grid [1, 3] of a black square image of at most so many tokens, but at least
        one."""
        vision = config.vision_config
        side = vision.spatial_merge_size * max(1, int(tokens**0.5))
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return torch.zeros(side**2, size), torch.tensor([[1, side, side]])

    def positions(self, model: nn.Module, ids: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        """Rotary positions [3, P] of a prompt's tokens [P], given its images' grid [I, 3]."""
        types = (ids == model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(
            ids[None], mm_token_type_ids=types[None], image_grid_thw=grid
        )
        return positions[:, 0]

    def language_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotary positions [3, B, L] as the language model takes them."""
        return positions

    def packed_inputs(self, model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
        """What the language model takes for the tokens [1, L] of a packed row, or the next ones [B, 1] of
        branches, beside embeddings and positions."""
        return {}

    def padded_inputs(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """The same for rows [B, L] padded as a mask [B, L] says."""
        return {}

    def language_model(self, model: nn.Module) -> nn.Module:
        """The language model, without its head."""
        return model.model.language_model

    def features(self, model: nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        """Features [M, H] of the image tokens, then those for each of the first layers (deepstack)."""
        output = model.model.get_image_features(pixels, grid)
        return [torch.cat(output.pooler_output), *map(_concatenate, output.get("deepstack_features") or ())]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """What computes image features: the tower, and what maps its output to the language model's."""
        return [model.model.visual]

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        """The tower's layers."""
        return model.model.visual.blocks

    def patch_embedding(self, model: nn.Module) -> nn.Module | None:
        """The module with the convolution `proj` that embeds single patches, if the tower gets those."""
        return model.model.visual.patch_embed

    def engine_processing(self, config: PreTrainedConfig, max_pixels: int | None) -> dict[str, Any]:
        """Settings of vLLM's processor for images that arrive in their final size, of at most so many
        pixels."""
        bound = {"max_pixels": max_pixels * self.frames_per_image} if max_pixels else {}
        return {"do_resize": False} | bound

    def small_processor(self, shape: Shape, tokenizer: PreTrainedTokenizerFast):
        """The processor of a small model."""
        bounds = {
            "shortest_edge": self.frames_per_image * (4 * shape.patch) ** 2,
            "longest_edge": self.frames_per_image * shape.max_pixels,
        }
        return self.processor(
            image_processor=self.image_processor(patch_size=shape.patch, merge_size=2, size=bounds),
            tokenizer=tokenizer,
            video_processor=self.video_processor(patch_size=shape.patch, merge_size=2),
            chat_template=self.chat.template,
        )

    def engine_tensors(
        self, config: PreTrainedConfig, pixels: torch.Tensor, grid: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor | list[torch.Tensor]], torch.Tensor | None]:
        """A prompt's images as vLLM's model of this family takes them, and the rows of `pixel_values`, and of
        `pixel_attention_mask`, that belong to each; None if each has tensors of its own."""
        return {"pixel_values": pixels, "image_grid_thw": grid}, grid.prod(-1)


class LlavaFamily(Family):
    """A family built like LLaVA: `vision_tower` and `multi_modal_projector` beside the language model, whose
    tokens have one position each, as in text."""

    def positions(self, model: nn.Module, ids: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        return torch.arange(len(ids)).expand(3, -1)

    def language_positions(self, positions: torch.Tensor) -> torch.Tensor:
        return positions[0]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def patch_embedding(self, model: nn.Module) -> None:
        return None


def encode(processor, text: str, **options: Any) -> Mapping[str, Any]:
    """What a processor makes of a text that a chat template has written: one that begins with the token that
    begins a sequence gets no other."""
    first = processor.tokenizer.bos_token
    special = not (first and text.startswith(first))
    return processor(text=[text], add_special_tokens=special, return_tensors="pt", **options)


def check_tiles(own: tuple[int, int], model: tuple[int, int]) -> None:
    """Raises ValueError if a processor's tiles, of so many pixels along a side and so many tokens, are not
    the model's."""
    if own != model:
        raise ValueError(
            f"the processor of model.path has tiles of {own[0]} pixels and {own[1]} tokens, its model of "
            f"{model[0]} and {model[1]}; copy preprocessor_config.json and processor_config.json of the "
            "original checkpoint into the folder"
        )


def resize_to_patches(image: Image, patch: int, bounds: tuple[int, int]) -> Image:
    """The image with sides of whole pairs of patches of so many pixels, and its area within the bounds."""
    request = {"image": image, "min_pixels": bounds[0], "max_pixels": bounds[1]}
    return fetch_image(request, image_patch_size=patch)


def _concatenate(layer: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """transformers returns a layer's features as one tensor, since about 5.20 as one per image."""
    return layer if isinstance(layer, torch.Tensor) else torch.cat(layer)


def tower(shape: Shape) -> dict:
    """Fields of the config of a tower that gets single patches."""
    return {"depth": shape.vision_layers, "num_heads": shape.heads}


def layered_tower(shape: Shape) -> dict:
    """Fields of the config of a tower like SigLIP's."""
    return {
        "hidden_size": shape.tower,
        "intermediate_size": shape.vision_ratio * shape.tower,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.heads,
    }


def rotary(dims: int, **fields: object) -> dict:
    """Rotary positions on `dims` of a head's dimensions: half for time, a quarter each for height and
    width."""
    eighth = dims // 8
    sections = [2 * eighth, eighth, eighth]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections} | fields
    return {"rope_parameters": rope}
