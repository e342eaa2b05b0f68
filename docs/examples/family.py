"""A family as an entry of FAMILIES (vlm_sapo/models/families): a made-up model with images in patches and
three rotary positions, like Qwen2.5-VL, that writes boxes from 0 to 1000 and has a token of its own."""

from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

from vlm_sapo.models.families.family import CHATML, Chat, Family, Shape, rotary, tower


def text(shape: Shape) -> dict:
    """What `text_config` of a small model needs beside sizes: here as many heads as fit its width."""
    heads = shape.hidden // shape.head_dim
    return rotary(shape.head_dim) | {"num_attention_heads": heads, "num_key_value_heads": heads // 2 or 1}


def vision(shape: Shape) -> dict:
    """What its `vision_config` needs."""
    return tower(shape) | {
        "hidden_size": shape.tower,
        "intermediate_size": 2 * shape.tower,
        "out_hidden_size": shape.hidden,
        "window_size": 8 * shape.patch,
        "fullatt_block_indexes": [shape.vision_layers - 1],
    }


CHAT = Chat(
    template=CHATML.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|look|><|image_pad|>"),
    ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
    unlisted=("<|look|>",),
    others=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|look|>"),
)
MADE_UP = {
    "made_up_vl": Family(
        "Made-up-VL",
        processor=Qwen2_5_VLProcessor,
        video_processor=Qwen2VLVideoProcessor,
        coordinates="thousand",
        text=text,
        vision=vision,
        chat=CHAT,
    )
}
