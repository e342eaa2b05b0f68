"""Gemma 4, dense: layers with a window, in which an image's tokens may see each other both ways, further
embeddings for each layer, and layers that take the keys of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma4.image_processing_gemma4 import get_aspect_ratio_preserving_size

from vlm_sapo.models.attention import window_mask
from vlm_sapo.models.families.family import Chat, LlavaFamily, Shape, encode, layered_tower

TOKEN_LIMITS = (70, 140, 280, 560, 1120)
"""Numbers of tokens that the processor accepts as an image's largest."""
TOKENS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "audio_token_id": "<|audio|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "boa_token_id": "<|audio>",
    "eoa_token_index": "<audio|>",
}
TEMPLATE = """\
<bos>
{%- for message in messages %}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|image|>' }}
{%- else %}{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<turn|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\\n' }}{%- endif %}
"""
CHAT = Chat(
    template=TEMPLATE,
    tokens=TOKENS,
    others=("<|endoftext|>", *IDS.values(), "<bos>", "<|turn>", "<turn|>"),
    ends=("<turn|>", "<|endoftext|>"),
    ids=IDS,
)


class Gemma4(LlavaFamily):
    """An image is enlarged or made smaller to as many tokens as the largest number allows: the largest of
    TOKEN_LIMITS within the bounds of its area."""

    def check(self, config: PreTrainedConfig) -> None:
        """Raises ValueError for a mixture of experts, or text that sees itself both ways."""
        super().check(config)
        if config.text_config.use_bidirectional_attention == "all":
            raise ValueError(
                "text_config.use_bidirectional_attention of model.path (all) must be vision or null; use a "
                "model that generates text"
            )
        if config.text_config.enable_moe_block:
            raise ValueError(
                "text_config.enable_moe_block of model.path must be false: mixtures of experts of "
                "Gemma 4 are not supported; use a dense model"
            )

    def pixel_bounds(self, image_processor) -> tuple[int, int]:
        area = _token_area(image_processor)
        return TOKEN_LIMITS[0] * area, image_processor.max_soft_tokens * area

    def resize(self, image: Image, image_processor, bounds: tuple[int, int]) -> Image:
        limit = _token_limit(bounds[1], _token_area(image_processor))
        merged = image_processor.pooling_kernel_size
        height, width = get_aspect_ratio_preserving_size(
            image.height, image.width, image_processor.patch_size, limit * merged**2, merged
        )
        return image.convert("RGB").resize((width, height), Resampling.BICUBIC)

    def process(
        self, processor, text: str, images: Sequence[Image], bounds: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not images:
            return encode(processor, text)["input_ids"][0], None, None
        limit = _token_limit(bounds[1], _token_area(processor.image_processor))
        encoded = encode(processor, text, images=list(images), do_resize=False, max_soft_tokens=limit)
        positions = encoded["image_position_ids"]
        width, height = (positions.amax(1) + 1).T
        grid = torch.stack([torch.ones_like(width), height, width], dim=1)
        return encoded["input_ids"][0], encoded["pixel_values"][positions[..., 0] >= 0], grid

    def patches_per_token(self, config: PreTrainedConfig) -> int:
        return config.vision_config.pooling_kernel_size**2

    def most_image_tokens(self, config: PreTrainedConfig, max_pixels: int) -> int:
        return _token_limit(max_pixels, self.pixels_per_token(config))

    def blank_image(self, config: PreTrainedConfig, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        vision = config.vision_config
        side = vision.pooling_kernel_size * max(1, int(tokens**0.5))
        return torch.zeros(side**2, 3 * vision.patch_size**2), torch.tensor([[1, side, side]])

    def packed_inputs(self, model: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
        single = ids.shape[1] == 1
        numbers = {} if single or not _sees_images(model) else {"image_numbers": _image_numbers(model, ids)}
        return self._layer_inputs(model, ids) | numbers

    def padded_inputs(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        inputs = self._layer_inputs(model, ids)
        if not _sees_images(model):
            return inputs
        tokens, window = ids.shape[1], model.config.text_config.sliding_window
        own = torch.eye(tokens, dtype=torch.bool, device=ids.device)  # for padding, which has nothing else
        images = {"full_attention": None, "sliding_attention": _image_numbers(model, ids)}
        masks = {
            kind: (
                window_mask(tokens, window if numbers is not None else tokens, numbers, device=ids.device)
                & mask[:, None].bool()
                | own
            )[:, None]
            for kind, numbers in images.items()
        }
        return inputs | {"attention_mask": masks}

    def _layer_inputs(self, model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The further embeddings of tokens [B, L] for each layer, in models that have them."""
        config = model.config.text_config
        if not config.hidden_size_per_layer_input:
            return {}
        ids = ids.masked_fill(ids == model.config.image_token_id, config.pad_token_id)
        return {"per_layer_inputs": model.model.language_model.get_per_layer_inputs(ids, None)}

    def features(self, model: nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        lengths = grid.prod(-1).tolist()
        output = model.model.get_image_features(
            pad_sequence(list(pixels.split(lengths)), batch_first=True),
            pad_sequence(_patch_positions(grid), batch_first=True, padding_value=-1),
        )
        return [torch.cat(output.pooler_output)]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        return [model.model.vision_tower, model.model.embed_vision]

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        return model.model.vision_tower.encoder.layers

    def engine_processing(self, config: PreTrainedConfig, max_pixels: int | None) -> dict[str, Any]:
        area = self.pixels_per_token(config)
        limit = {"max_soft_tokens": _token_limit(max_pixels, area)} if max_pixels else {}
        return {"do_resize": False} | limit

    def engine_tensors(
        self, config: PreTrainedConfig, pixels: torch.Tensor, grid: torch.Tensor
    ) -> tuple[dict[str, list[torch.Tensor]], None]:
        tensors = {
            "pixel_values": list(pixels.split(grid.prod(-1).tolist())),
            "pixel_position_ids": _patch_positions(grid),
        }
        return tensors, None

    def small_processor(self, shape: Shape, tokenizer: PreTrainedTokenizerFast):
        sizes = {name: vision(shape)[name] for name in ("patch_size", "pooling_kernel_size")}
        limit = vision(shape)["default_output_length"]
        return self.processor(
            feature_extractor=Gemma4AudioFeatureExtractor(),
            image_processor=self.image_processor(max_soft_tokens=limit, **sizes),
            tokenizer=tokenizer,
            video_processor=self.video_processor(**sizes),
            chat_template=self.chat.template,
        )


def _token_area(image_processor) -> int:
    """Area in pixels that becomes one image token."""
    return (image_processor.patch_size * image_processor.pooling_kernel_size) ** 2


def _token_limit(pixels: int, area: int) -> int:
    """The largest of TOKEN_LIMITS for an image of so many pixels, of which `area` become a token; at least
    the first."""
    return max([TOKEN_LIMITS[0], *(limit for limit in TOKEN_LIMITS if limit * area <= pixels)])


def _sees_images(model: nn.Module) -> bool:
    """Whether an image's tokens attend to each other."""
    return model.config.text_config.use_bidirectional_attention == "vision"


def _image_numbers(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[B, L] the number in its row of the image that a token belongs to; -1 for none."""
    image = ids == model.config.image_token_id
    first = image.clone()
    first[:, 1:] &= ~image[:, :-1]
    return (first.cumsum(1) - 1).masked_fill(~image, -1)


def _patch_positions(grid: torch.Tensor) -> list[torch.Tensor]:
    """Column and row [N, 2] of each patch, for each image of a grid [I, 3]."""
    positions = []
    for _, height, width in grid.tolist():
        rows, columns = torch.arange(height, device=grid.device), torch.arange(width, device=grid.device)
        positions.append(torch.stack([columns.repeat(height), rows.repeat_interleave(width)], dim=-1))
    return positions


def text(shape: Shape) -> dict:
    """All that models of this family have: images that see themselves as in 26B and 31B, embeddings for each
    layer and layers without keys as in E2B and E4B. The second half of the layers has no keys."""
    period = 2 if shape.layers < 12 else 6
    full = [layer % period == period - 1 or layer == shape.layers - 1 for layer in range(shape.layers)]
    return {
        "layer_types": ["full_attention" if attends else "sliding_attention" for attends in full],
        "num_kv_shared_layers": min(shape.layers // 2, max(0, shape.layers - period)),
        "global_head_dim": 2 * shape.head_dim,
        "sliding_window": 32 if shape.layers < 12 else 512,
        "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": max(8, shape.hidden // 8),
        "final_logit_softcapping": 30.0,
    }


def vision(shape: Shape) -> dict:
    """Of `default_output_length` transformers knows nothing; vLLM needs it, and published models have it."""
    patch, merged = shape.patch // 2, 3
    return layered_tower(shape) | {
        "num_key_value_heads": shape.heads,
        "head_dim": shape.tower // shape.heads,
        "patch_size": patch,
        "pooling_kernel_size": merged,
        "default_output_length": _token_limit(shape.max_pixels, (patch * merged) ** 2),
        "position_embedding_size": 1024,
    }


GEMMA = {
    "gemma4": Gemma4(
        "Gemma 4",
        Gemma4Processor,
        Gemma4VideoProcessor,
        "thousand_yx",
        text,
        vision,
        vocabularies=("vocab_size", "vocab_size_per_layer_input"),
        image_processor=Gemma4ImageProcessor,
        chat=CHAT,
        fixed_minimum=True,
        enclosed_by=(1, 1),
    )
}
