"""SmolVLM and SmolVLM2: images in tiles with tokens between them, a language model like Llama's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from vlm_sapo.models.families.family import Chat, LlavaFamily, Shape, check_tiles, encode, layered_tower

MOST_TILES = 6
"""Along a side; published tokenizers have names for rows and columns up to this."""
TILE_TOKEN = re.compile(r"<row_\d+_col_\d+>")
TILE_TOKENS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
TEMPLATE = """\
<|im_start|>
{%- for message in messages %}
{{- message.role | capitalize + ': ' }}
{%- if message.content is string %}{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<image>' }}
{%- else %}{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<end_of_utterance>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}
"""
CHAT = Chat(
    template=TEMPLATE,
    tokens={
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
        "end_of_utterance_token": "<end_of_utterance>",
    },
    others=(
        "<|endoftext|>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<video>",
        *TILE_TOKENS,
        "<|im_start|>",
        "<end_of_utterance>",
    ),
    ends=("<end_of_utterance>", "<|endoftext|>"),
    ids={"image_token_id": "<image>"},
    unlisted=("<fake_token_around_image>", "<global-img>", "<video>", *TILE_TOKENS),
)


class SmolVlm(LlavaFamily):
    """An image's longer side becomes a number of tiles, the same for all images, its other as many as fit;
    if there are several, a small copy of the whole follows. Its grid counts tiles and the tokens of one.

    The largest area is that of a square of tiles, and the number of tiles the side of that square.
    """

    def check_processor(self, config: PreTrainedConfig, processor) -> None:
        """Raises ValueError for a processor whose tiles are not the model's."""
        model = config.vision_config.image_size, _side(config) ** 2 // self.patches_per_token(config)
        check_tiles((_tile(processor.image_processor), processor.image_seq_len), model)

    def vision_tokens(self, config: PreTrainedConfig, tokenizer) -> list[int]:
        listed = super().vision_tokens(config, tokenizer)
        tiles = [token for name, token in tokenizer.get_added_vocab().items() if TILE_TOKEN.fullmatch(name)]
        return [*dict.fromkeys([*listed, *sorted(tiles)])]

    def language_model(self, model: nn.Module) -> nn.Module:
        return model.model.text_model

    def pixel_bounds(self, image_processor) -> tuple[int, int]:
        return _tile(image_processor) ** 2, image_processor.size["longest_edge"] ** 2

    def resize(self, image: Image, image_processor, bounds: tuple[int, int]) -> Image:
        tile = _tile(image_processor)
        longer = _tiles_along(bounds[1], tile)
        ratio = max(image.size) / min(image.size)
        shorter = int(longer * tile / ratio)
        shorter = max(1, math.ceil((shorter + shorter % 2) / tile))
        columns, rows = (longer, shorter) if image.width >= image.height else (shorter, longer)
        return image.convert("RGB").resize((columns * tile, rows * tile), Resampling.LANCZOS)

    def process(
        self, processor, text: str, images: Sequence[Image], bounds: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not images:
            return encode(processor, text)["input_ids"][0], None, None
        options = {"do_resize": False, "do_image_splitting": True}
        encoded = encode(processor, text, images=[list(images)], **options)
        tile, side = _tile(processor.image_processor), math.isqrt(processor.image_seq_len)
        tiles = [image.width * image.height // tile**2 for image in images]
        grid = torch.tensor([[count + (count > 1), side, side] for count in tiles])
        return encoded["input_ids"][0], encoded["pixel_values"][0], grid

    def patches_per_token(self, config: PreTrainedConfig) -> int:
        return config.scale_factor**2

    def image_tokens(self, config: PreTrainedConfig, grid: torch.Tensor) -> list[int]:
        return grid.prod(-1).tolist()

    def attended_patches(self, config: PreTrainedConfig) -> int:
        return _side(config) ** 2

    def most_image_tokens(self, config: PreTrainedConfig, max_pixels: int) -> int:
        along = _tiles_along(max_pixels, config.vision_config.image_size)
        return (along**2 + (along > 1)) * _side(config) ** 2 // self.patches_per_token(config)

    def blank_image(self, config: PreTrainedConfig, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        side, size = _side(config) // config.scale_factor, config.vision_config.image_size
        count = max(1, tokens // side**2)
        return torch.zeros(count, 3, size, size), torch.tensor([[count, side, side]])

    def features(self, model: nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        """What `get_image_features` computes of tiles without padding, whose number need not be read."""
        hidden = model.model.vision_model(pixel_values=pixels).last_hidden_state
        return [model.model.connector(hidden).flatten(0, 1)]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        return [model.model.vision_model, model.model.connector]

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        return model.model.vision_model.encoder.layers

    def engine_processing(self, config: PreTrainedConfig, max_pixels: int | None) -> dict[str, Any]:
        tile = config.vision_config.image_size
        longest = {"size": {"longest_edge": tile * _tiles_along(max_pixels, tile)}} if max_pixels else {}
        return {"do_resize": False} | longest

    def engine_tensors(
        self, config: PreTrainedConfig, pixels: torch.Tensor, grid: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        whole = torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.long)
        tensors = {"pixel_values": pixels, "pixel_attention_mask": whole, "num_patches": grid[:, 0]}
        return tensors, grid[:, 0]

    def small_processor(self, shape: Shape, tokenizer: PreTrainedTokenizerFast):
        tile = 8 * shape.patch
        sizes = {
            "size": {"longest_edge": tile * _tiles_along(shape.max_pixels, tile)},
            "max_image_size": {"longest_edge": tile},
        }
        return self.processor(
            image_processor=self.image_processor(**sizes),
            tokenizer=tokenizer,
            video_processor=self.video_processor(**sizes),
            image_seq_len=16,
            chat_template=self.chat.template,
        )


def _tile(image_processor) -> int:
    """Side of a tile in pixels."""
    return image_processor.max_image_size["longest_edge"]


def _tiles_along(pixels: int, tile: int) -> int:
    """Tiles along the side of a square of so many pixels."""
    return min(MOST_TILES, max(1, math.isqrt(pixels) // tile))


def _side(config: PreTrainedConfig) -> int:
    """Patches along a side of a tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def text(shape: Shape) -> dict:
    return {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def vision(shape: Shape) -> dict:
    return layered_tower(shape) | {
        "image_size": 8 * shape.patch,
    }


SMOLVLM = {
    "smolvlm": SmolVlm(
        "SmolVLM2",
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
        "thousand",
        text,
        vision,
        whole={"scale_factor": 2},
        image_processor=SmolVLMImageProcessor,
        chat=CHAT,
        fixed_minimum=True,
        enclosed_by=(2, 1),
        languages=("llama",),
    )
}
