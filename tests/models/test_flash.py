"""The GPU's attention of packed rows, with the kernels replaced by their definition, against autograd."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from tests.models.flash_reference import FlashReference
from vlm_sapo.models import flash
from vlm_sapo.models.attention import (
    PackedGroup,
    Segments,
    compare_kernels,
    prefix_attention,
    vision_attention,
)
from vlm_sapo.models.flash import Lengths, PackedAttention, PackedRow

CPU = torch.device("cpu")
GROUPS = ((13, (5, 1, 9)), (4, (3, 3)), (7, ()), (2, (1,)))
"""Prompts with branches of unequal and equal length, without any, and of one token."""
HEADS = pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 8), (2, 2, 16), (6, 1, 8)])


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    replaced = FlashReference()
    replaced.install(monkeypatch)
    return replaced


def segments():
    groups, start = [], 0
    for prompt, branches in GROUPS:
        groups.append(PackedGroup(start, prompt, branches))
        start += prompt + sum(branches)
    return Segments(tuple(groups)), start


def tensors(heads, kv_heads, size, length, dtype):
    torch.manual_seed(0)
    return [
        torch.randn(1, n, length, size, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    ]


def packed(query, key, value, row):
    rows = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    return PackedAttention.apply(*rows, row, None)[None]


@HEADS
def test_two_calls_merged_are_attention_over_prompt_and_branch(heads, kv_heads, size, reference):
    laid_out, length = segments()
    inputs = tensors(heads, kv_heads, size, length, torch.float64)
    row = PackedRow.of_groups(GROUPS, CPU)
    ours = packed(*inputs, row)
    theirs, _ = prefix_attention(SimpleNamespace(layer_idx=0), *inputs, None, segments=laid_out)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    pairs = (torch.autograd.grad((output * weights).sum(), inputs) for output in (ours, theirs))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert reference.called == [(True, 10), (False, 3)]  # one sequence for all branches of a prompt


def test_gradients_against_finite_differences():
    row = PackedRow.of_groups(((3, (2, 1)), (2, (2,))), CPU)
    inputs = [torch.randn(10, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    assert gradcheck(lambda *args: PackedAttention.apply(*args, row, 0.3), inputs)


def test_rounding_of_bfloat16_does_not_grow_with_the_group():
    """A prompt's keys collect the gradients of all branches in the kernel, in float32, and are rounded twice."""
    groups = ((32, (4,) * 32),)
    laid_out = Segments((PackedGroup(0, *groups[0]),))
    exact = tensors(2, 1, 16, 160, torch.float64)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    theirs, _ = prefix_attention(SimpleNamespace(layer_idx=0), *exact, None, segments=laid_out)
    ours = packed(*rounded, PackedRow.of_groups(groups, CPU))
    weights = torch.randn_like(theirs).bfloat16()
    wanted = torch.autograd.grad((theirs * weights.double()).sum(), exact)
    found = torch.autograd.grad((ours * weights).sum(), rounded)
    for one, other in zip(found, wanted, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 0.006, error  # a rounding to 8 bits is .002 on average


def test_images_attend_to_themselves(monkeypatch, reference):
    monkeypatch.setattr(flash, "runs_on", lambda tensor: tensor.dtype == torch.bfloat16)
    lengths = [4, 4, 9, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    exact = tensors(2, 2, 8, sum(lengths), torch.float32)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    outputs = [
        vision_attention(None, *inputs, None, cu_seq_lens_q=offsets, max_length_q=9)[0]
        for inputs in (exact, rounded)
    ]
    torch.testing.assert_close(outputs[1].float(), outputs[0], rtol=0, atol=0.03)
    gradients = [
        torch.autograd.grad(output.square().sum(), inputs)
        for output, inputs in zip(outputs, (exact, rounded), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other.float(), one, rtol=0.05, atol=0.08)
    assert reference.called == [(False, 4)]


@pytest.mark.parametrize(("capability", "runs"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_cards_older_than_ampere_and_larger_heads_use_other_kernels(monkeypatch, capability, runs):
    flash._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def tensor(dtype=torch.bfloat16, head=256):
        return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0", shape=(1, 2, 3, head))

    assert flash.runs_on(tensor()) is runs
    assert not flash.runs_on(tensor(dtype=torch.float32)) and not flash.runs_on(tensor(head=512))
    flash._capability.cache_clear()


def test_torchs_kernels_take_these_arguments():
    forward = torch.ops.aten._flash_attention_forward.default._schema
    names = [item.name for item in forward.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ]  # fmt: skip
    assert "scale" in names and [item.name for item in forward.returns][:2] == ["output", "softmax_logsumexp"]
    backward = torch.ops.aten._flash_attention_backward.default._schema
    names = [item.name for item in backward.arguments]
    assert names[:14] == [
        "grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k",
        "dropout_p", "is_causal", "rng_state", "unused",
    ]  # fmt: skip
    assert len(backward.returns) == 3


def test_lengths():
    lengths = Lengths.of([3, 1, 4], CPU)
    assert lengths.offsets.tolist() == [0, 3, 4, 8] and lengths.longest == 4
    assert lengths.offsets.dtype == torch.int32


def test_wrong_kernels_are_told_from_rounding(monkeypatch):
    monkeypatch.setattr(flash, "runs_on", lambda tensor: tensor.dtype == torch.bfloat16)
    laid_out, _ = segments()
    right = Segments(laid_out.groups, PackedRow.of_groups(GROUPS, CPU))
    assert 0 < compare_kernels(right, heads=(4, 2), size=8, device=CPU) < 0.01
    shifted = ((12, (6, 1, 9)), *GROUPS[1:])  # a prompt's last token counts as its first branch's
    wrong = Segments(laid_out.groups, PackedRow.of_groups(shifted, CPU))
    assert compare_kernels(wrong, heads=(4, 2), size=8, device=CPU) > 0.05
