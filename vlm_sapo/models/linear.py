"""Linear attention over groups: a prompt is run once, and each of its branches starts from the state after it.

The layers' own `forward` computes everything, first on the prompt, then on its branches; autograd adds up the
branches' gradients in the prompt's state. Like the attention in models/attention.py they take `segments` for
packed rows, and run as transformers wrote them without.

[L] tokens of a packed row, [H] hidden size, [G] branches of a group, [R] tokens of the longest one, [C] channels
of the convolution, [K] its width.
"""

from __future__ import annotations

from functools import cache as cached
from inspect import signature

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from vlm_sapo.models.attention import PackedGroup, Prefix, Segments

MIXERS = {"linear_attention": "linear_attn"}
"""The module of a layer that mixes tokens, by transformers' name of the layer's kind."""
CACHE_ARGUMENTS = ("cache", "cache_params")
"""What versions of transformers call the cache of such a module."""
State = tuple[torch.Tensor, torch.Tensor]
"""The last inputs of the convolution [B, C, K], and the recurrent state [B, ...]."""
FULL = "full_attention"
LEAST = 2
"""Tokens of a branch: of single ones transformers computes the state by a kernel without gradients."""


class ForkedState(LinearAttentionLayer):
    """The state of a layer after a sequence, with its gradient: the convolution's last inputs [B, C, K] and the
    recurrent state [B, ...]. transformers' own layer copies both into buffers, which have none."""

    def __init__(self, state: State | None = None):
        super().__init__()
        self.record_past = True  # a single token must not take the path that changes the state in place
        if state is not None:
            self.conv_states[0], self.recurrent_states[0] = state
            self.has_previous_state[0] = True

    def update_conv_state(
        self, conv_states: torch.Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs
    ) -> torch.Tensor:
        """Appends inputs [B, C, L]; returns them after those that the convolution still needs."""
        before = self.conv_states[state_idx]
        inputs = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        missing = max(0, conv_kernel_size - inputs.shape[-1])
        self.conv_states[state_idx] = pad(inputs, (missing, 0))[..., -conv_kernel_size:]
        self.has_previous_state[state_idx] = True
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs
    ) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class GroupedLinearAttention(nn.Module):
    """Mixed into the class of a linear attention module, so that it takes `segments`."""

    cache_argument: str
    layer_idx: int

    def forward(
        self,
        hidden_states: torch.Tensor,
        segments: Segments | None = None,
        prefix: Prefix | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """[B, L, H] to [B, L, H]. With segments B is 1, and a cache gets the states after each of the groups'
        last sequences: after a prompt without branches, or after each branch. `prefix` is for full attention:
        here a cache has the prompts' states."""
        if segments is None:
            return super().forward(hidden_states, **kwargs)
        cache: Cache | None = kwargs[self.cache_argument]
        outputs, states = [], []
        pieces = hidden_states.split(segments.sizes, dim=1)
        for group, prompt, branches in zip(segments.groups, pieces[::2], pieces[1::2], strict=True):
            output, state = self._run(prompt)
            outputs.append(output)
            if not group.branches:
                states.append(state)
            elif cache is None:
                outputs.append(self._run_branches(branches, group, state))
            else:  # padding would change their states
                for branch in branches.split(group.branches, dim=1):
                    output, after = self._run(branch, state)
                    outputs.append(output)
                    states.append(after)
        if cache is not None:
            store(cache, self.layer_idx, tuple(map(torch.cat, zip(*states, strict=True))))
        return torch.cat(outputs, dim=1)

    def _run_branches(self, hidden: torch.Tensor, group: PackedGroup, state: State) -> torch.Tensor:
        """[1, sum of branches, H] to the same, from the state after their prompt. They are padded on the right,
        where padding changes only states that nobody reads."""
        count, longest = len(group.branches), max(group.branches)
        rows = hidden[0] if group.even else hidden[0, group.padded.to(hidden.device)]
        rows = pad(rows.unflatten(0, (count, longest)), (0, 0, 0, max(0, LEAST - longest)))  # [G, R, H]
        convolution, recurrent = (tensor.expand(count, *tensor.shape[1:]) for tensor in state)
        output, _ = self._run(rows, (convolution, recurrent))
        output = output[:, :longest].flatten(0, 1)
        return (output if group.even else output[group.unpadded.to(output.device)])[None]

    def _run(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The module's own forward from a state (None: the beginning), and the state after it."""
        layer = ForkedState(state)
        cache = Cache(layers=[layer] * (self.layer_idx + 1))
        output = super().forward(hidden, **{self.cache_argument: cache})
        return output, (layer.conv_states[0], layer.recurrent_states[0])


def store(cache: Cache, layer: int, state: State) -> None:
    """Puts a state into a layer of an empty cache."""
    convolution, recurrent = state
    cache.update_conv_state(convolution, layer, conv_kernel_size=convolution.shape[-1])
    cache.update_recurrent_state(recurrent, layer)


def stored(cache: Cache, layer: int) -> State:
    """The state in a layer of a cache."""
    return cache.layers[layer].conv_states[0], cache.layers[layer].recurrent_states[0]


def group_linear_attention(layers: nn.ModuleList, kinds: list[str]) -> bool:
    """Lets the layers without full attention take `segments`. Returns False, and changes nothing, if this
    version of transformers has some that are not known."""
    modules = [
        layer.get_submodule(MIXERS[kind]) if kind in MIXERS else layer
        for layer, kind in zip(layers, kinds, strict=True)
        if kind != FULL
    ]
    grouped = [_grouped(type(module)) for module in modules]
    if None in grouped:
        return False
    for module, kind in zip(modules, grouped, strict=True):
        module.__class__ = kind
    return True


@cached
def _grouped(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of a module with GroupedLinearAttention mixed in; None if it doesn't take a cache."""
    names = signature(kind.forward).parameters
    argument = next((name for name in CACHE_ARGUMENTS if name in names), None)
    if argument is None:
        return None
    mixed = (GroupedLinearAttention, kind)
    return type(f"Grouped{kind.__name__}", mixed, {"cache_argument": argument})
