"""Matrix operations and sizes of a model's passes, from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from vlm_sapo.models.linear import ATTENTION
from vlm_sapo.models.vlm import part_of
from vlm_sapo.tools.plan.passes import simulated_model
from vlm_sapo.tools.plan.simulate import ModelSpec, read_config

POSITIONS = ("pos_embed", "position_embedding")
"""In names of embeddings of positions, which are added."""


@dataclass(frozen=True)
class ModelWork:
    """What a token, and a patch of an image, meets in a model. Weights in elements."""

    hidden: int
    layers: int
    attention_layers: int
    """Decoder layers whose attention looks at all earlier tokens."""
    query_width: int
    """All query heads together."""
    key_width: int
    """All key heads together."""
    feed_forward: int
    """Inner width of a layer's feed-forward part, of a mixture that of the experts of one token."""
    active: int
    """Weights of the decoder layers' matrices that one token is multiplied with."""
    language: int
    """All weights of the decoder layers, experts included."""
    head: int
    """Weights of the output head: hidden size by vocabulary."""
    vocabulary: int
    vision: int
    """Weights of the vision tower that one patch is multiplied with."""
    vision_attention: int
    """Layers of the vision tower whose patches attend to the whole image or tile, times their width."""
    attended: int | None
    """Most patches that one attends to there; None for all of the image."""
    patches_per_token: int
    total: int
    """All weights, each once."""


@lru_cache(maxsize=16)
def model_work(spec: ModelSpec) -> ModelWork:
    """Counts a model's weights by where they are used."""
    _, vlm = simulated_model(spec)
    config = read_config(spec.path)
    text, vision = config.get_text_config(), config.vision_config
    fields, vision_fields = text.to_dict(), vision.to_dict()
    per_token = fields.get("num_experts_per_tok")
    kinds = fields.get("layer_types") or ["full_attention"] * text.num_hidden_layers
    size = fields.get("head_dim") or text.hidden_size // text.num_attention_heads
    inner = per_token * text.moe_intermediate_size if per_token else text.intermediate_size
    active = language = tower = merged = 0
    for name, parameter in vlm.model.named_parameters():
        matrix = parameter.numel() if parameter.dim() > 1 else 0
        part = part_of(name)
        if part == "merger":
            merged += matrix
        elif part == "vision":
            tower += 0 if any(mark in name for mark in POSITIONS) else matrix
        elif part in ("language", "router") and ".layers." in name:
            language += parameter.numel()
            active += matrix * per_token // len(parameter) if ".experts." in name else matrix
    width = vision_fields.get("embed_dim") or vision.hidden_size
    whole = len(vision_fields.get("fullatt_block_indexes") or vlm.family.vision_blocks(vlm.model))
    merge = vlm.family.patches_per_token(config)
    return ModelWork(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        attention_layers=sum(kind in ATTENTION for kind in kinds),
        query_width=text.num_attention_heads * size,
        key_width=text.num_key_value_heads * size,
        feed_forward=inner,
        active=active,
        language=language,
        head=text.hidden_size * text.vocab_size,
        vocabulary=text.vocab_size,
        vision=tower + merged // merge,
        vision_attention=whole * width,
        attended=vlm.family.attended_patches(config),
        patches_per_token=merge,
        total=_count(vlm.model),
    )


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class GroupTokens:
    """The tokens of one group: a prompt, of it the image's tokens, and `group` responses of equal length."""

    prompt: int
    image: int
    response: float
    group: int

    @property
    def row(self) -> float:
        """Tokens of the packed row."""
        return self.prompt + self.sampled

    @property
    def sampled(self) -> float:
        return self.group * self.response

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that attention compares: the prompt with itself, each response with the
        prompt and itself."""
        own = self.response**2 / 2
        return self.prompt**2 / 2 + self.group * (self.response * self.prompt + own)


def layer_operations(work: ModelWork, tokens: float) -> float:
    """Forward products of all decoder layers' matrices with so many tokens."""
    return 2 * work.active * tokens


def attention_operations(work: ModelWork, pairs: float) -> float:
    """Forward products of queries with keys and of weights with values."""
    return 4 * work.attention_layers * work.query_width * pairs


def head_operations(work: ModelWork, tokens: float) -> float:
    """Forward products of the output head."""
    return 2 * work.head * tokens


def vision_operations(work: ModelWork, image_tokens: float) -> float:
    """Forward products of the vision tower for one image."""
    patches = work.patches_per_token * image_tokens
    pairs = patches * min(patches, work.attended or patches)
    return 2 * work.vision * patches + 4 * work.vision_attention * pairs


def forward_operations(work: ModelWork, group: GroupTokens, *, vision: bool) -> float:
    """Forward products for one group whose prompt is shared; `vision` counts the tower."""
    return (
        layer_operations(work, group.row)
        + attention_operations(work, group.pairs)
        + head_operations(work, group.sampled)
        + (vision_operations(work, group.image) if vision else 0)
    )
