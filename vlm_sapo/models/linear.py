"""Linear attention over groups, and short convolutions: a prompt is run once, and its branches start from the
state after it.

The layers' own `forward` computes everything, first on the prompt, then on its branches; autograd adds up the
branches' gradients in the prompt's state. Like the attention in models/attention.py they take `segments` for
packed rows, and run as transformers wrote them without.

[L] tokens of a packed row, [H] hidden size, [N] branches of a batch, [R] tokens of the longest one, [C]
channels of the convolution, [K] its width.
"""

from __future__ import annotations

from functools import cache as cached
from inspect import Parameter, signature

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import LinearAttentionLayer

from vlm_sapo.models.attention import Prefix, Segments

MIXERS = {"linear_attention": "linear_attn", "conv": "conv"}
"""The module of a layer that mixes tokens, by transformers' name of the layer's kind."""
CACHE_ARGUMENTS = ("cache", "cache_params")
"""What versions of transformers call the cache of such a module."""
State = tuple[torch.Tensor, ...]
"""The last inputs of the convolution [B, C, K], and the recurrent state [B, ...] if the layer has one."""
FULL = "full_attention"
ATTENTION = (FULL, "sliding_attention")
"""Kinds of layers with attention, to all tokens before or to those in a window."""
LEAST = 2
"""Tokens of a branch: of single ones transformers computes the state by a kernel without gradients."""


class ForkedState(LinearAttentionLayer):
    """The state of a layer after a sequence, with its gradient. transformers' own layer copies it into
    buffers, which have none."""

    def __init__(self, state: State | None = None):
        super().__init__()
        self.record_past = True  # a single token must not take the path that changes the state in place
        if state is not None:
            self.conv_states[0], *recurrent = state
            self.recurrent_states[0] = recurrent[0] if recurrent else None
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
        """[B, L, H] to [B, L, H]. With segments B is 1, and a cache gets the states after the groups' last
        sequences: after each branch, or after a prompt without branches. `prefix` is for full attention."""
        if segments is None:
            return super().forward(hidden_states, **kwargs)
        if kwargs[self.cache_argument] is None:
            return self._train(hidden_states, segments)
        return self._prefill(hidden_states, segments, kwargs[self.cache_argument])

    def _train(self, hidden: torch.Tensor, segments: Segments) -> torch.Tensor:
        """[1, L, H] to the same. Branches are padded on the right, where padding changes only states that
        nobody reads."""
        prompts = [self._run(prompt) for prompt in hidden.split(segments.sizes, dim=1)[::2]]
        outputs = [output[0] for output, _ in prompts]
        states = [torch.cat(parts) for parts in zip(*(state for _, state in prompts), strict=True)]
        for batch in segments.branches.batches:
            longest = batch.tokens.shape[1]
            rows = pad(hidden[0, batch.tokens], (0, 0, 0, max(0, LEAST - longest)))  # [N, R, H]
            output, _ = self._run(rows, tuple(tensor[batch.groups] for tensor in states))
            outputs.append(output[:, :longest].flatten(0, 1)[batch.real])
        return torch.cat(outputs)[None, segments.branches.order]

    def _prefill(self, hidden: torch.Tensor, segments: Segments, cache: Cache) -> torch.Tensor:
        """[1, L, H] to the same, each sequence by itself, since padding would change the states."""
        outputs, states = [], []
        pieces = hidden.split(segments.sizes, dim=1)
        for group, prompt, branches in zip(segments.groups, pieces[::2], pieces[1::2], strict=True):
            output, state = self._run(prompt)
            outputs.append(output)
            for branch in branches.split(group.branches, dim=1) if group.branches else ():
                output, after = self._run(branch, state)
                outputs.append(output)
                states.append(after)
            states += [] if group.branches else [state]
        store(cache, self.layer_idx, tuple(map(torch.cat, zip(*states, strict=True))))
        return torch.cat(outputs, dim=1)

    def _run(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The module's own forward from a state (None: the beginning), and the state after it."""
        layer = ForkedState(state)
        cache = Cache(layers=[layer] * (self.layer_idx + 1))
        output = super().forward(hidden, **{self.cache_argument: cache})
        return output, _present(layer)


def store(cache: Cache, layer: int, state: State) -> None:
    """Puts a state into a layer of an empty cache."""
    convolution, *recurrent = state
    cache.update_conv_state(convolution, layer, conv_kernel_size=convolution.shape[-1])
    for after in recurrent:
        cache.update_recurrent_state(after, layer)


def stored(cache: Cache, layer: int) -> State:
    """The state in a layer of a cache."""
    return _present(cache.layers[layer])


def _present(layer: LinearAttentionLayer) -> State:
    return tuple(item for item in (layer.conv_states[0], layer.recurrent_states[0]) if item is not None)


def group_linear_attention(layers: nn.ModuleList, kinds: list[str]) -> bool:
    """Lets the layers without attention take `segments`. Returns False, and changes nothing, if this
    version of transformers has some that are not known."""
    modules = [
        layer.get_submodule(MIXERS[kind]) if kind in MIXERS else layer
        for layer, kind in zip(layers, kinds, strict=True)
        if kind not in ATTENTION
    ]
    classes = [grouped(type(module)) for module in modules]
    if None in classes:
        return False
    for module, mixed in zip(modules, classes, strict=True):
        module.__class__ = mixed
    return True


@cached
def grouped(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of a module with GroupedLinearAttention mixed in; None if it doesn't take a cache, or its
    layer passes nothing else on to it, such as `segments`."""
    names = signature(kind.forward).parameters
    argument = next((name for name in CACHE_ARGUMENTS if name in names), None)
    if argument is None or all(item.kind != Parameter.VAR_KEYWORD for item in names.values()):
        return None
    mixed = (GroupedLinearAttention, kind)
    return type(f"Grouped{kind.__name__}", mixed, {"cache_argument": argument})
