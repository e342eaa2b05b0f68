"""LFM2-VL: short convolutions between layers of attention, patches of images whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Lfm2VlImageProcessor, Lfm2VlProcessor, PreTrainedConfig, PreTrainedTokenizerFast

from vlm_sapo.models.families.family import (
    CHATML,
    CHATML_ENDS,
    Chat,
    LlavaFamily,
    Shape,
    encode,
    layered_tower,
    resize_to_patches,
)

ENGINE_PATCHES = 1024
"""vLLM takes images that are padded to equal numbers of patches; these are multiples of this."""
ENCLOSING = ("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>")
CHAT = Chat(
    template="<|startoftext|>" + CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>"),
    tokens={"image_token": "<image>", "image_start_token": ENCLOSING[0], "image_end_token": ENCLOSING[1]},
    others=("<|endoftext|>", "<|startoftext|>", "<|im_start|>", "<|im_end|>", *ENCLOSING),
    ends=CHATML_ENDS,
    ids={"image_token_id": "<image>"},
    unlisted=ENCLOSING,
)


class Lfm2Vl(LlavaFamily):
    """An image stays whole. Published processors split one of more than twice the largest area into tiles;
    here it is made smaller, as with their `do_image_splitting=False`, and `model.max_pixels` allows more."""

    def pixel_bounds(self, image_processor) -> tuple[int, int]:
        area = _token_area(image_processor)
        return image_processor.min_image_tokens * area, image_processor.max_image_tokens * area

    def resize(self, image: Image, image_processor, bounds: tuple[int, int]) -> Image:
        return resize_to_patches(image, image_processor.encoder_patch_size, bounds)

    def process(
        self, processor, text: str, images: Sequence[Image], bounds: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if not images:
            return encode(processor, text)["input_ids"][0], None, None
        area = _token_area(processor.image_processor)
        encoded = encode(
            processor,
            text,
            images=[list(images)],
            do_image_splitting=False,
            min_image_tokens=bounds[0] // area,
            max_image_tokens=max(1, bounds[1] // area),
        )
        shapes = encoded["spatial_shapes"]
        grid = torch.cat([torch.ones_like(shapes[:, :1]), shapes], dim=1)
        return (
            encoded["input_ids"][0],
            encoded["pixel_values"][encoded["pixel_attention_mask"].bool()],
            grid,
        )

    def patches_per_token(self, config: PreTrainedConfig) -> int:
        return config.downsample_factor**2

    def blank_image(self, config: PreTrainedConfig, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        side, vision = config.downsample_factor * max(1, int(tokens**0.5)), config.vision_config
        size = vision.num_channels * vision.patch_size**2
        return torch.zeros(side**2, size), torch.tensor([[1, side, side]])

    def features(self, model: nn.Module, pixels: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
        padded, lengths = _padded(pixels, grid)
        steps = torch.arange(padded.shape[1], device=lengths.device)
        output = model.model.get_image_features(
            padded,
            spatial_shapes=grid[:, 1:],
            pixel_attention_mask=(steps < lengths[:, None]).int(),
        )
        return [torch.cat(output.pooler_output)]

    def vision_blocks(self, model: nn.Module) -> nn.ModuleList:
        return model.model.vision_tower.encoder.layers

    def engine_processing(self, config: PreTrainedConfig, max_pixels: int | None) -> dict[str, Any]:
        tokens = {"max_image_tokens": max_pixels // self.pixels_per_token(config)} if max_pixels else {}
        return {"do_image_splitting": False} | tokens

    def engine_tensors(
        self, config: PreTrainedConfig, pixels: torch.Tensor, grid: torch.Tensor
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        padded, _ = _padded(pixels, grid)
        padded = pad(padded, (0, 0, 0, -padded.shape[1] % ENGINE_PATCHES))
        one = torch.ones(len(grid), dtype=torch.long)
        return {"pixel_values": padded, "spatial_shapes": grid[:, 1:], "num_patches": one}, one

    def small_processor(self, shape: Shape, tokenizer: PreTrainedTokenizerFast):
        area = 4 * shape.patch**2
        return self.processor(
            image_processor=self.image_processor(
                encoder_patch_size=shape.patch,
                min_image_tokens=4,
                max_image_tokens=max(4, shape.max_pixels // area),
                tile_size=8 * shape.patch,
            ),
            tokenizer=tokenizer,
            chat_template=self.chat.template,
        )


def _token_area(image_processor) -> int:
    """Area in pixels that becomes one image token."""
    return (image_processor.encoder_patch_size * image_processor.downsample_factor) ** 2


def _padded(pixels: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [I, N, D] of each image, padded, and their numbers [I]."""
    lengths = grid.prod(-1)
    return pad_sequence(list(pixels.split(lengths.tolist())), batch_first=True), lengths


def text(shape: Shape) -> dict:
    """Every third layer and the last have attention, others short convolutions."""
    full = [(shape.layers - layer) % 3 == 1 for layer in range(shape.layers)]
    return {
        "layer_types": ["full_attention" if attends else "conv" for attends in full],
        "block_auto_adjust_ff_dim": False,
        "conv_dim": shape.hidden,
        "block_dim": shape.hidden,
        "block_ff_dim": 3 * shape.hidden,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def vision(shape: Shape) -> dict:
    return layered_tower(shape) | {
        "num_patches": 64,
        "vision_use_head": False,
    }


LFM2 = {
    "lfm2_vl": Lfm2Vl(
        "LFM2-VL",
        Lfm2VlProcessor,
        None,
        "thousand",
        text,
        vision,
        whole={"projector_hidden_size": 64},
        image_processor=Lfm2VlImageProcessor,
        chat=CHAT,
        enclosed_by=(1, 1),
        languages=("lfm2",),
    )
}
