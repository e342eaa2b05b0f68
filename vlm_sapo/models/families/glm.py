"""GLM-4.1V and GLM-4.6V-Flash: full attention, three rotary positions, a tower like Qwen2-VL's."""

from __future__ import annotations

from transformers import (
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
)

from vlm_sapo.models.families.family import Chat, Family, Shape, rotary, tower

TOKENS = {"image_token": "<|image|>", "video_token": "<|video|>"}
IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}
{%- if message.content is string or message.role == 'assistant' %}{{- message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|begin_of_image|><|image|><|end_of_image|>' }}
{%- else %}{{- part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""
"""As in published ones no token ends a turn, the next turn's first does; an assistant's text is no list."""
CHAT = Chat(
    template=TEMPLATE,
    tokens=TOKENS,
    others=(
        "<|endoftext|>",
        *IDS.values(),
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ),
    ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ids=IDS,
)


def text(shape: Shape) -> dict:
    """All heads together are as wide as the model; half of each is rotated. vLLM leaves the biases of the
    attention out unless the config says that they are there."""
    heads, dims = shape.hidden // shape.head_dim, max(8, shape.head_dim // 2)
    return rotary(dims, partial_rotary_factor=dims / shape.head_dim) | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 or 1,
        "attention_bias": True,
    }


def vision(shape: Shape) -> dict:
    """`intermediate_size` is the merger's; a block's feed-forward part is as wide as the language model."""
    return tower(shape) | {
        "hidden_size": shape.tower,
        "out_hidden_size": shape.hidden,
        "intermediate_size": shape.vision_ratio * shape.tower,
        "image_size": 8 * shape.patch,
    }


COMMON = {
    "coordinates": "thousand",
    "text": text,
    "vision": vision,
    "chat": CHAT,
    "frames_per_image": 2,
    "thinks": True,
}
GLM = {
    "glm4v": Family(
        "GLM-4.1V", Glm4vProcessor, Glm4vVideoProcessor, image_processor=Glm4vImageProcessor, **COMMON
    ),
    "glm46v": Family(
        "GLM-4.6V-Flash",
        Glm46VProcessor,
        Glm46VVideoProcessor,
        image_processor=Glm46VImageProcessor,
        languages=("glm4v_text",),
        **COMMON,
    ),
}
