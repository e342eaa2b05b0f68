"""Attention over groups: a prompt attends to itself, each of its branches to the prompt and to itself. And
attention over packed images for the vision tower: a patch attends to its own image or window.

Registered with transformers under NAME and VISION_NAME. Prefix attention takes `segments` for packed rows
(training, prefill) or `prefix` for the next token of running branches (decoding); without either it is
transformers' SDPA attention, so that one model serves all three.

[L] tokens of a packed row, [H] query heads, [K] key heads, [D] head size, [B] prompts, [G] branches of each,
[R] tokens of the longest branch, [P] of the prompt, [S] tokens of a branch so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlm_sapo.models import flash
from vlm_sapo.models.flash import Lengths, PackedAttention, PackedRow

NAME = "vlm_sapo_prefix"
VISION_NAME = "vlm_sapo_flash_vision"
"""transformers passes cumulative lengths only to vision attention with `flash` in its name, and loops over
sequences for all others."""
LEAST_FILLED = 0.75
"""Length of a batch's shortest branch as a share of the longest one's, so that little is padding."""
ALWAYS_TOGETHER = 64
"""Tokens up to which branches of any length are one batch: linear attention computes so many at once."""


@dataclass(frozen=True)
class PackedGroup:
    """One group in a packed row: its prompt starts at `start`, its branches follow in order."""

    start: int
    prompt: int
    branches: tuple[int, ...]

    @cached_property
    def even(self) -> bool:
        """Whether all branches are equally long, so that they need no padding."""
        return len(set(self.branches)) == 1

    @cached_property
    def padded(self) -> torch.Tensor:
        """[G * R] index of each padded branch's tokens among the tokens of all branches; padding repeats the
        last token."""
        lengths = torch.tensor(self.branches)
        starts = lengths.cumsum(0) - lengths
        steps = torch.arange(max(self.branches)).minimum(lengths[:, None] - 1)
        return (starts[:, None] + steps).flatten()

    @cached_property
    def unpadded(self) -> torch.Tensor:
        """[sum of branches] index of each token among the padded ones."""
        longest = max(self.branches)
        return torch.cat([row * longest + torch.arange(length) for row, length in enumerate(self.branches)])

    def to(self, device: torch.device) -> PackedGroup:
        """With its indices on a device."""
        moved = replace(self)
        if self.branches and not self.even:
            vars(moved).update(padded=self.padded.to(device), unpadded=self.unpadded.to(device))
        return moved


@dataclass(frozen=True)
class BranchBatch:
    """N branches of a packed row as a batch, padded on the right to R tokens."""

    groups: torch.Tensor
    """[N] the number of each one's group."""
    tokens: torch.Tensor
    """[N, R] the indices of their tokens in the row; padding repeats the last one."""
    real: torch.Tensor
    """The flat indices of those that are no padding."""

    @staticmethod
    def of(branches: Sequence[tuple[int, int, int]]) -> BranchBatch:
        """From the group, the start and the length of each branch."""
        groups, starts, lengths = torch.tensor(branches).T
        steps = torch.arange(int(lengths.max()))
        tokens = starts[:, None] + steps.minimum(lengths[:, None] - 1)
        return BranchBatch(groups, tokens, (steps < lengths[:, None]).flatten().nonzero()[:, 0])

    def to(self, device: torch.device) -> BranchBatch:
        return BranchBatch(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class BranchBatches:
    """All branches of a packed row in batches of similar lengths."""

    batches: tuple[BranchBatch, ...]
    order: torch.Tensor
    """[L] where to find each token of the row in the prompts of all groups, followed by the batches' real
    tokens."""

    @staticmethod
    def of(groups: Sequence[PackedGroup]) -> BranchBatches:
        branches, prompts = [], []
        for number, group in enumerate(groups):
            prompts.append(torch.arange(group.start, group.start + group.prompt))
            start = group.start + group.prompt
            for length in group.branches:
                branches.append((number, start, length))
                start += length
        similar: list[list[tuple[int, int, int]]] = []
        for branch in sorted(branches, key=lambda item: -item[2]):
            longest = similar[-1][0][2] if similar else 0
            if similar and (branch[2] >= LEAST_FILLED * longest or longest <= ALWAYS_TOGETHER):
                similar[-1].append(branch)
            else:
                similar.append([branch])
        batches = tuple(map(BranchBatch.of, similar))
        tokens = torch.cat([*prompts, *(batch.tokens.flatten()[batch.real] for batch in batches)])
        return BranchBatches(batches, tokens.argsort())

    def to(self, device: torch.device) -> BranchBatches:
        return BranchBatches(tuple(batch.to(device) for batch in self.batches), self.order.to(device))


@dataclass(frozen=True)
class Segments:
    """The groups of a packed row, in order and without gaps."""

    groups: tuple[PackedGroup, ...]
    packed_row: PackedRow | None = None
    """The same on a GPU; see `to`."""
    moved: BranchBatches | None = None
    """`branches` on a GPU."""

    @cached_property
    def branches(self) -> BranchBatches:
        """The branches in batches, for layers that run each of them from its prompt's state."""
        return BranchBatches.of(self.groups) if self.moved is None else self.moved

    @cached_property
    def sizes(self) -> list[int]:
        """For each group, the tokens of its prompt and the sum over its branches."""
        return [size for group in self.groups for size in (group.prompt, sum(group.branches))]

    def to(self, device: torch.device) -> Segments:
        """With what the kernels on a GPU need, moved there once for all layers."""
        if device.type == "cpu":
            return self
        groups = [(group.prompt, group.branches) for group in self.groups]
        moved = tuple(group.to(device) for group in self.groups)
        return Segments(moved, PackedRow.of_groups(groups, device), self.branches.to(device))


@dataclass(frozen=True)
class Prefix:
    """Keys and values of B prompts, [B, K, P, D] by layer with full attention, padded on the right, for
    decoding their branches.

    The batch that decodes holds the prompts' branches in order, G for each.
    """

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    padding: torch.Tensor
    """[B, 1, 1, P] bool, true after the end of a prompt."""
    branch_padding: torch.Tensor | None = None
    """[B * G, 1, 1, S] bool, true before the first token of a branch, if branches continue responses of
    different lengths; None if all start at their prompt."""
    sources: Mapping[int, int] = field(default_factory=dict)
    """Layers that take the keys and values of another layer, and that layer."""

    @staticmethod
    def from_row(
        keys: dict[int, torch.Tensor], values: dict[int, torch.Tensor], segments: Segments
    ) -> Prefix:
        """Splits the prompts off a packed row's keys and values, [1, K, L, D] by layer."""

        def split(row: torch.Tensor) -> torch.Tensor:
            prompts = [prompt.transpose(0, 1) for prompt in row[0].split(segments.sizes, dim=1)[::2]]
            return pad_sequence(prompts, batch_first=True).transpose(1, 2)

        lengths = segments.sizes[::2]
        ends = torch.tensor(lengths, device=next(iter(keys.values())).device)
        padding = torch.arange(max(lengths), device=ends.device) >= ends[:, None]
        prompt_keys = {layer: split(row.to(values[layer].dtype)) for layer, row in keys.items()}
        prompt_values = {layer: split(row) for layer, row in values.items()}
        return Prefix(prompt_keys, prompt_values, padding[:, None, None])

    @cached_property
    def lengths(self) -> torch.Tensor:
        """[B, 1, 1, 1] tokens of each prompt."""
        return (~self.padding).sum(-1, keepdim=True)

    def select(self, prompts: torch.Tensor, branches: torch.Tensor) -> Prefix:
        """Selects prompts and branches by index."""
        if len(prompts) < len(self.padding):
            keys, values = (
                {layer: tensor[prompts] for layer, tensor in layers.items()}
                for layers in (self.keys, self.values)
            )
            padding = self.padding[prompts]
        else:
            keys, values, padding = self.keys, self.values, self.padding
        own = None if self.branch_padding is None else self.branch_padding[branches]
        return Prefix(keys, values, padding, own, self.sources)


def prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    prefix: Prefix | None = None,
    sliding_window: int | None = None,
    image_numbers: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, L, D], key and value [B, K, L, D] to [B, L, H, D].

    With segments B is 1; with segments or a prefix the mask is ignored, and a token attends to itself and, of
    those before it, to the last `sliding_window` - 1, if that is given. With a window it also attends to all
    later tokens of its image, if `image_numbers` [1, L] says which image a token belongs to; -1 is none.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # float32 by the rotary embedding under autocast
    if prefix is not None:
        return _decode(query, key, value, scaling, prefix, module.layer_idx, sliding_window), None
    if segments is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if segments.packed_row is not None and sliding_window is None and flash.runs_on(query):
        return _packed((query, key, value), segments.packed_row, scaling), None
    pieces = [tensor.split(segments.sizes, dim=2) for tensor in (query, key, value)]
    pairs = zip(*(zip(tensor[::2], tensor[1::2], strict=True) for tensor in pieces), strict=True)
    numbers: Sequence[tuple[torch.Tensor, torch.Tensor] | None] = [None] * len(segments.groups)
    if sliding_window is not None and image_numbers is not None:
        parts = image_numbers[0].split(segments.sizes)
        numbers = list(zip(parts[::2], parts[1::2], strict=True))
    outputs = [
        output
        for group, pair, images in zip(segments.groups, pairs, numbers, strict=True)
        for output in _group(group, *pair, scaling=scaling, window=sliding_window, images=images)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def compare_kernels(
    segments: Segments,
    *,
    heads: tuple[int, int],
    size: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """Largest relative error (in the Euclidean norm) of attention over a packed row in half precision, of its
    output and gradients, against float32, on random values. `heads` are those of queries and of keys."""
    module, generator = torch.nn.Module(), torch.Generator().manual_seed(0)
    length = sum(segments.sizes)
    shapes = [(1, count, length, size) for count in (heads[0], heads[1], heads[1])]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    half = [value.to(device, dtype).requires_grad_() for value in values]
    full = [value.detach().float().requires_grad_() for value in half]
    results = []
    for inputs in (half, full):
        with torch.autocast(device.type, enabled=False):
            output, _ = prefix_attention(module, *inputs, None, segments=segments)
            direction = torch.linspace(-1, 1, output.numel(), device=device).view_as(output)
            gradients = torch.autograd.grad(output, inputs, direction.to(output.dtype))
        results.append([tensor.float() for tensor in (output, *gradients)])
    errors = [(one - other).norm() / other.norm() for one, other in zip(*results, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=float("inf")).max())


def _group(
    group: PackedGroup,
    query,
    key,
    value,
    *,
    scaling: float | None,
    window: int | None,
    images: tuple[torch.Tensor, torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Attention of prompt and branches, [1, H, tokens, D] each, with one SDPA call for each. query, key and
    value are pairs: the prompt's and the branches'; so are the numbers of their tokens' `images`."""
    (q, branch_q), (k, branch_k), (v, branch_v) = query, key, value
    own = None if images is None else images[0]
    mask = None if window is None else window_mask(group.prompt, window, own, device=q.device)
    prompt = _attend(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
    if not group.branches:
        return [prompt]
    branch_q, branch_k, branch_v = (_fold(tensor, group) for tensor in (branch_q, branch_k, branch_v))
    longest = branch_q.shape[2]
    visible = group.prompt if window is None else min(group.prompt, window - 1)
    k, v = (tensor[:, :, group.prompt - visible :] for tensor in (k, v))
    # A padded key comes after every real query of its branch, so one causal mask fits all branches.
    mask = torch.ones(longest, visible + longest, dtype=torch.bool, device=q.device).tril(visible)
    if images is not None:
        mask = mask | pad(_same_image(images[1], group), (visible, 0))
    branches = _attend(
        branch_q,
        torch.cat([k.expand(len(branch_k), -1, -1, -1), branch_k], dim=2),
        torch.cat([v.expand(len(branch_v), -1, -1, -1), branch_v], dim=2),
        attn_mask=mask if window is None else mask.triu(visible - window + 1),
        scale=scaling,
    )
    return [prompt, _unfold(branches, group)]


def _same_image(numbers: torch.Tensor, group: PackedGroup) -> torch.Tensor:
    """[G, 1, R, R] bool, which of a branch's tokens belong to one image, by their numbers [sum of
    branches]."""
    own = _fold(numbers[None, None, :, None], group)[:, 0, :, 0]  # [G, R]
    if not group.even:
        padding = own.new_ones(own.numel(), dtype=torch.bool).index_fill(0, group.unpadded, value=False)
        own = own.masked_fill(padding.view_as(own), -1)
    return ((own[:, :, None] == own[:, None, :]) & (own[:, None, :] >= 0))[:, None]


def window_mask(
    tokens: int, window: int, images: torch.Tensor | None, *, device: torch.device
) -> torch.Tensor:
    """[..., L, L] bool, which of L tokens a token attends to in a layer with a window; `images` [..., L] are
    the numbers of their images, -1 for none, if an image's tokens attend to each other."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    if images is not None:
        mask = mask | ((images[..., :, None] == images[..., None, :]) & (images[..., None, :] >= 0))
    return mask.triu(1 - window)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
    """SDPA with grouped heads. On a GPU keys and values are repeated for it: of its kernels those that keep
    no scores take no grouped heads, where the fastest doesn't run."""
    if query.is_cuda and key.shape[1] < query.shape[1]:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)


def _fold(tensor: torch.Tensor, group: PackedGroup) -> torch.Tensor:
    """[1, H, sum of branches, D] to [G, H, R, D]."""
    if not group.even:
        tensor = tensor[:, :, group.padded]
    return tensor[0].unflatten(1, (len(group.branches), -1)).transpose(0, 1)


def _unfold(tensor: torch.Tensor, group: PackedGroup) -> torch.Tensor:
    """[G, H, R, D] to [1, H, sum of branches, D]."""
    flat = tensor.transpose(0, 1).flatten(1, 2)[None]
    return flat if group.even else flat[:, :, group.unpadded]


def _decode(
    query, key, value, scaling: float | None, prefix: Prefix, layer: int, window: int | None
) -> torch.Tensor:
    """[B * G, 1, H, D] for query [B * G, H, 1, D] and the branches' own key and value [B * G, K, S, D].

    All branches of a prompt read its keys and values together, so that they are in memory once.
    """
    source = prefix.sources.get(layer, layer)
    prompt_key, prompt_value = prefix.keys[source], prefix.values[source]  # [B, K, P, D]
    prompts, heads, longest, size = prompt_key.shape
    grid = (prompts, len(query) // prompts, heads, query.shape[1] // heads)  # [B, G, K, H / K]

    def by_prompt(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(*grid, -1).transpose(1, 2).flatten(2, 3)  # [B, K, G * H / K, ...]

    def by_branch(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(2, (grid[1], grid[3])).transpose(1, 2).flatten(0, 1)  # [B * G, K, H / K, ...]

    queries = query.reshape(-1, heads, grid[3], size) * (scaling or size**-0.5)  # [B * G, K, H / K, D]
    to_prompt = by_prompt(queries) @ prompt_key.transpose(-1, -2)
    to_prompt = to_prompt.masked_fill(prefix.padding, float("-inf"))
    if window is not None:
        outside = _outside(prefix, key.shape[2], window)  # [B or B * G, 1, 1, P]
        if len(outside) > prompts:
            outside = by_prompt(outside.expand(-1, heads, grid[3], -1))
        to_prompt = to_prompt.masked_fill(outside, float("-inf"))
    to_branch = queries @ key.transpose(-1, -2)  # [B * G, K, H / K, S]
    if prefix.branch_padding is not None:
        later = to_branch.shape[-1] - prefix.branch_padding.shape[-1]
        to_branch = to_branch.masked_fill(pad(prefix.branch_padding, (0, later)), float("-inf"))
    if window is not None:
        to_branch[..., : max(0, key.shape[2] - window)] = float("-inf")
    scores = torch.cat([to_prompt, by_prompt(to_branch)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    own = by_branch(weights[..., longest:]) @ value
    return (by_branch(weights[..., :longest] @ prompt_value) + own).reshape(len(query), 1, -1, size)


def _outside(prefix: Prefix, own: int, window: int) -> torch.Tensor:
    """[B, 1, 1, P], or [B * G, 1, 1, P] if branches began at different tokens: which of a prompt's tokens are
    outside of the window of the last of `own` tokens of its branches."""
    lengths, count = prefix.lengths, own
    if prefix.branch_padding is not None:
        count = own - prefix.branch_padding.sum(-1, keepdim=True)
        lengths = lengths.repeat_interleave(len(count) // len(lengths), dim=0)
    tokens = torch.arange(prefix.padding.shape[-1], device=prefix.padding.device)
    return tokens <= lengths + count - 1 - window


def vision_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface for images: query, key, value [B, H, L, D] to [B, L, H, D].

    For packed images B is 1, and cu_seq_lens_q [sequences + 1] are the offsets of images or windows, to which
    a patch attends; without it to all of its row, an image or a tile, but for what the mask leaves out.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=False
        )
    if flash.runs_on(query):
        images = PackedRow(Lengths(cu_seq_lens_q.int(), max_length_q), causal=False)
        return _packed((query, key, value), images, scaling), None
    runs = [(size, len(list(same))) for size, same in groupby(cu_seq_lens_q.diff().tolist())]
    lengths = [size * count for size, count in runs]
    pieces = (tensor[0].split(lengths, dim=1) for tensor in (query, key, value))
    outputs = []
    for (_, count), *tensors in zip(runs, *pieces, strict=True):
        batch = [
            tensor.unflatten(1, (count, -1)).transpose(0, 1) for tensor in tensors
        ]  # [count, H, size, D]
        outputs.append(scaled_dot_product_attention(*batch, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


def _packed(tensors, row: PackedRow, scaling: float | None) -> torch.Tensor:
    """[1, L, H, D] for [1, heads, L, D] tensors, by kernels on the GPU."""
    rows = (tensor[0].transpose(0, 1).contiguous() for tensor in tensors)
    return PackedAttention.apply(*rows, row, scaling)[None]


AttentionInterface.register(NAME, prefix_attention)
AttentionInterface.register(VISION_NAME, vision_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionMaskInterface.register(VISION_NAME, sdpa_mask)
