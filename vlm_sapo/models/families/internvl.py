"""InternVL 3 and 3.5 in transformers' format: images in tiles, a language model of Qwen2.5 or Qwen3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from vlm_sapo.models.families.family import (
    CHATML,
    CHATML_ENDS,
    Chat,
    LlavaFamily,
    Shape,
    check_tiles,
    encode,
    layered_tower,
)

MOST_TILES = 256
"""Of an image, whatever its bounds: to compare the layouts of more takes long. Published models have 12."""
MERGED = 2
"""Patches along each side of the square that becomes one token; `check_processor` refuses others."""
CHAT = Chat(
    template=CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n"),
    tokens={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    others=("<|im_start|>", *CHATML_ENDS),
    ends=CHATML_ENDS,
    ids={"image_token_id": "<IMG_CONTEXT>"},
    unlisted=("<img>", "</img>", "<video>"),
)


class InternVL(LlavaFamily):
    """An image becomes tiles of equal size, of a number that fits its shape, and if there are several a small
    copy of the whole.

    The bounds of an image's area are those of its tiles without the copy. Its grid counts the tiles, and the
    patches of one.
    """

    def check_processor(self, config: PreTrainedConfig, processor) -> None:
        """Raises ValueError for a processor whose tiles are not the model's."""
        own = processor.image_processor.size["height"], processor.image_seq_length
        model = config.vision_config.image_size[0], _side(config) ** 2 // self.patches_per_token(config)
        check_tiles(own, model)

    def pixel_bounds(self, image_processor) -> tuple[int, int]:
        area = _tile_area(image_processor)
        return image_processor.min_patches * area, image_processor.max_patches * area

    def resize(self, image: Image, image_processor, bounds: tuple[int, int]) -> Image:
        tile = image_processor.size["height"]
        limits = _tile_limits(image_processor, bounds)
        columns, rows, before = 0, 0, None
        size = (image.height, image.width)
        while (columns, rows) != before:  # until the whole tiles become the same tiles again
            before = columns, rows
            columns, rows = get_optimal_tiled_canvas(size, (tile, tile), *limits)
            size = (rows * tile, columns * tile)
        return image.convert("RGB").resize((columns * tile, rows * tile), Resampling.BICUBIC)

    def process(
        self, processor, text: str, images: Sequence[Image], bounds: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not images:
            return encode(processor, text)["input_ids"][0], None, None
        least, most = _tile_limits(processor.image_processor, bounds)
        options = {"crop_to_patches": True, "min_patches": least, "max_patches": most}
        encoded = encode(processor, text, images=list(images), do_resize=False, **options)
        area, side = _tile_area(processor.image_processor), MERGED * math.isqrt(processor.image_seq_length)
        tiles = [image.width * image.height // area for image in images]
        grid = torch.tensor([[count + (count > 1), side, side] for count in tiles])
        assert int(grid[:, 0].sum()) == len(encoded["pixel_values"]), "tiles became other tiles"
        return encoded["input_ids"][0], encoded["pixel_values"], grid

    def patches_per_token(self, config: PreTrainedConfig) -> int:
        return MERGED**2

    def attended_patches(self, config: PreTrainedConfig) -> int:
        return _side(config) ** 2

    def pixels_per_token(self, config: PreTrainedConfig) -> int:
        return config.vision_config.patch_size[0] ** 2 * self.patches_per_token(config)

    def most_image_tokens(self, config: PreTrainedConfig, max_pixels: int) -> int:
        vision = config.vision_config
        tiles = min(MOST_TILES, max(1, max_pixels // vision.image_size[0] ** 2))
        return (tiles + (tiles > 1)) * _side(config) ** 2 // self.patches_per_token(config)

    def blank_image(self, config: PreTrainedConfig, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        side, size = _side(config), config.vision_config.image_size[0]
        count = max(1, tokens * self.patches_per_token(config) // side**2)
        return torch.zeros(count, 3, size, size), torch.tensor([[count, side, side]])

    def features(self, model: nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        return [model.model.get_image_features(pixels).pooler_output.flatten(0, 1)]

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        return model.model.vision_tower.encoder.layer

    def engine_processing(self, config: PreTrainedConfig, max_pixels: int | None) -> dict[str, Any]:
        tiles = max(1, (max_pixels or 0) // config.vision_config.image_size[0] ** 2)
        return {"do_resize": False, "crop_to_patches": True} | ({"max_patches": tiles} if max_pixels else {})

    def engine_tensors(
        self, config: PreTrainedConfig, pixels: torch.Tensor, grid: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        counts = grid[:, 0]
        token = torch.full_like(counts, config.image_token_id)
        return {"pixel_values": pixels, "image_num_patches": counts, "image_token_id": token}, counts

    def small_processor(self, shape: Shape, tokenizer: PreTrainedTokenizerFast):
        tile = 8 * shape.patch
        return self.processor(
            image_processor=GotOcr2ImageProcessor(
                size={"height": tile, "width": tile}, max_patches=max(1, shape.max_pixels // tile**2)
            ),
            tokenizer=tokenizer,
            video_processor=self.video_processor(size={"height": tile, "width": tile}),
            image_seq_length=16,
            chat_template=self.chat.template,
        )


def _side(config: PreTrainedConfig) -> int:
    """Patches along a side of a tile."""
    return config.vision_config.image_size[0] // config.vision_config.patch_size[0]


def _tile_area(image_processor) -> int:
    return image_processor.size["height"] * image_processor.size["width"]


def _tile_limits(image_processor, bounds: tuple[int, int]) -> tuple[int, int]:
    """Fewest and most tiles of an image whose area has these bounds."""
    least, most = (min(MOST_TILES, max(1, bound // _tile_area(image_processor))) for bound in bounds)
    return least, most


def text(shape: Shape) -> dict:
    """InternVL 3.5's; 3 has `qwen2`."""
    return {"model_type": "qwen3", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def vision(shape: Shape) -> dict:
    return layered_tower(shape) | {
        "image_size": 8 * shape.patch,
    }


INTERNVL = {
    "internvl": InternVL(
        "InternVL 3, 3.5",
        InternVLProcessor,
        InternVLVideoProcessor,
        "thousand",
        text,
        vision,
        chat=CHAT,
        thinks=True,
        fixed_minimum=True,
        enclosed_by=(1, 1),
        languages=("qwen2", "qwen3"),
        whole={"image_seq_length": 16},
    )
}
