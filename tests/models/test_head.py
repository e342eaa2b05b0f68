"""The head's own function against autograd, its numbers in half precision, and its memory."""

import pytest
import torch
from torch import nn

import vlm_sapo.models.forward as forward
from tests.conftest import FAMILIES, example, group_slice
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.head import is_plain, product, score_tokens
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import Plain, SharedPrefix
from vlm_sapo.tools.plan.simulate import MemoryCounter, Simulation

BANNED = [3, 4, 11]


def problem(tokens=7, hidden=5, vocabulary=13, dtype=torch.float64):
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    return states, weight, torch.tensor([0, 1, 2, 5, 12, 5, 9])[:tokens]


def by_autograd(states, weight, targets, *, banned=BANNED, temperature=0.7, wide=torch.float64):
    """Log-probs and entropies by definition."""
    logits = states.to(wide) @ weight.to(wide).T / temperature
    logits[:, banned] = float("-inf")
    logprobs = logits.log_softmax(-1)
    plogp = torch.where(logprobs > float("-inf"), logprobs.exp() * logprobs, 0.0)
    return logprobs.gather(-1, targets[:, None])[:, 0], -plogp.sum(-1).detach()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_are_autograds(chunk):
    states, weight, targets = problem()
    options = {"banned": BANNED, "temperature": 0.7, "chunk": chunk}
    logprobs, entropies = score_tokens(states, weight, targets, **options)
    expected, entropy = by_autograd(states, weight, targets)
    assert torch.allclose(logprobs, expected, rtol=1e-12) and torch.allclose(entropies, entropy, rtol=1e-12)
    assert logprobs.dtype == torch.float64 and not entropies.requires_grad
    slopes = torch.randn(7, dtype=torch.float64)
    ours = torch.autograd.grad(logprobs, (states, weight), slopes)
    for one, two in zip(ours, torch.autograd.grad(expected, (states, weight), slopes), strict=True):
        assert torch.allclose(one, two, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda *inputs: score_tokens(*inputs, targets, **options)[0], (states, weight)
    )


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
def test_what_needs_no_gradient_gets_none(frozen):
    states, weight, targets = problem()
    expected = torch.autograd.grad(by_autograd(states, weight, targets)[0].sum(), (states, weight))
    states.requires_grad_(frozen == "weight"), weight.requires_grad_(frozen == "hidden")
    logprobs, _ = score_tokens(states, weight, targets, banned=BANNED, temperature=0.7, chunk=2)
    assert logprobs.requires_grad == (frozen != "both")
    if frozen != "both":
        logprobs.sum().backward()
    for tensor, gradient in zip((states, weight), expected, strict=True):
        assert tensor.grad is None if not tensor.requires_grad else torch.allclose(tensor.grad, gradient)


def test_no_tokens_give_gradients_of_zero():
    states, weight, targets = problem()
    logprobs, _ = score_tokens(states[:0], weight, targets[:0], banned=BANNED, temperature=1.0, chunk=2)
    logprobs.sum().backward()
    assert not weight.grad.any() and not states.grad.any()


def test_a_banned_target_has_no_probability_and_changes_nothing_else():
    states, weight, targets = problem()
    targets[2] = BANNED[1]
    logprobs, _ = score_tokens(states, weight, targets, banned=BANNED, temperature=1.0, chunk=2)
    assert logprobs[2] == float("-inf") and logprobs[[0, 1, 3, 4, 5, 6]].isfinite().all()
    logprobs.sum().backward()
    assert not weight.grad[BANNED].any() and weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
def test_half_precision_rounds_operands_and_gradients_only(kind):
    """Against float64 arithmetic on the same rounded operands."""
    dtype = torch.bfloat16 if kind == "autocast" else getattr(torch, kind)
    torch.manual_seed(0)
    states = (2 * torch.randn(40, 256)).to(torch.float32 if kind == "autocast" else dtype)
    weight = (0.2 * torch.randn(500, 256)).to(states.dtype)
    states.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(20, 500, (40,))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        logprobs, entropies = score_tokens(states, weight, targets, banned=BANNED, temperature=1.0, chunk=16)
    logprobs.sum().backward()
    rounded = [item.detach().to(dtype).double().requires_grad_() for item in (states, weight)]
    expected, entropy = by_autograd(*rounded, targets, temperature=1.0)
    assert logprobs.dtype == torch.float32
    # bfloat16 logits would be off by .016 on average.
    assert (logprobs - expected).abs().max() < 1e-3 and (entropies - entropy).abs().max() < 1e-3
    expected.sum().backward()
    for ours, exact in zip((states, weight), rounded, strict=True):
        assert ours.grad.dtype == ours.dtype
        assert (ours.grad - exact.grad).norm() < (
            0.01 if dtype == torch.bfloat16 else 0.002
        ) * exact.grad.norm()


def test_logits_of_half_precision_are_not_rounded():
    """The noise of the log-ratio after a small update, with a head like a model's of 3 billion parameters:
    hidden size 2048, likely tokens' logits of 25."""
    torch.manual_seed(0)
    states, weight = torch.randn(512, 2048), 0.02 * torch.randn(4096, 2048)
    states *= 25 / (states @ weight.T).max(-1).values.mean()
    states, weight = states.bfloat16(), weight.bfloat16()
    updated = (weight.float() + 2e-5 * torch.randn_like(weight, dtype=torch.float32)).bfloat16()
    tokens = torch.multinomial((states.float() @ weight.float().T).softmax(-1), 1)

    def log_ratio(multiply):
        new, old = (multiply(states, item).log_softmax(-1).gather(1, tokens) for item in (updated, weight))
        return new - old

    exact = log_ratio(lambda states, weight: states.double() @ weight.double().T)
    noise = (log_ratio(product) - exact).std()
    rounded = (log_ratio(lambda states, weight: (states @ weight.T).float()) - exact).std()
    assert noise < rounded / 3 and noise < 1e-3 and log_ratio(product).std() < 0.4 * rounded


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_sampling_and_training_have_the_same_log_probs(model_folder, kind):
    vlm = load_vlm(str(model_folder()), dtype="float32" if kind == "autocast" else kind)
    states = torch.randn(30, 32).to(vlm.model.lm_head.weight.dtype)
    targets = torch.arange(30)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"), torch.no_grad():
        trained, _ = Pass(vlm).score(states, targets)
        with vlm.weights_fixed():
            sampled = [vlm.logits(states[:, None])[:, 0] for _ in range(2)]
    assert torch.equal(*sampled) and sampled[0].dtype == torch.float32
    assert torch.allclose(trained, sampled[0].log_softmax(-1)[range(30), targets], atol=1e-6)


def test_a_cast_lasts_only_while_the_weights_are_fixed(model_folder):
    vlm = load_vlm(str(model_folder()))
    states = torch.randn(2, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with vlm.weights_fixed():
            before = vlm.logits(states)
        vlm.model.lm_head.weight.mul_(2)
        assert torch.equal(vlm.logits(states)[:, :3], 2 * before[:, :3])
        with vlm.weights_fixed():
            assert torch.equal(vlm.logits(states)[:, :3], 2 * before[:, :3])


@pytest.mark.parametrize("layout", [Plain(), SharedPrefix()], ids=lambda layout: layout.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gets_the_gradients_of_a_head_with_hooks(model_folder, monkeypatch, family, layout):
    """Whose logits go through autograd; head and embedding are one parameter in these models."""
    gradients = []
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 3 * 300)
    for hooked in (False, True):
        vlm = load_vlm(str(model_folder(family)), gradient_checkpointing=True)
        if hooked:
            vlm.model.lm_head.register_forward_hook(lambda module, inputs, output: None)
        assert is_plain(vlm.model.lm_head) != hooked
        prompt = Encoder(vlm)(example(1, images=2))
        scores = Pass(vlm, 0.7)(layout.inputs([group_slice(prompt, [[20, 30, 40, 2], [9, 8]])]))
        (scores.logprobs * torch.linspace(-1, 1, 8).view(2, 4)).sum().backward()
        gradients.append([scores.logprobs, scores.entropies, *(p.grad for p in vlm.parameters())])
    for ours, autograds in zip(*gradients, strict=True):
        assert (ours is None) == (autograds is None)
        assert ours is None or torch.allclose(ours, autograds, atol=1e-5)


def test_only_a_plain_linear_is_plain():
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(2, 3, bias=False)
    hooked.register_forward_pre_hook(lambda module, inputs: None)
    assert is_plain(nn.Linear(2, 3, bias=False))
    assert not any(map(is_plain, (nn.Linear(2, 3), hooked, Special(2, 3, bias=False))))


def test_a_head_with_an_adapter_keeps_it(model_folder):
    from peft import LoraConfig, inject_adapter_in_model

    vlm = load_vlm(str(model_folder()))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), vlm.model)
    head, states = vlm.model.lm_head, torch.randn(5, 32)
    nn.init.normal_(head.lora_B["default"].weight)
    logprobs, _ = Pass(vlm).score(states, torch.arange(5))
    logits = head(states)
    logits[:, vlm.banned] = float("-inf")
    assert torch.allclose(logprobs, logits.log_softmax(-1)[range(5), range(5)], atol=1e-6)
    assert torch.equal(vlm.logits(states), logits)
    logprobs.sum().backward()
    assert head.lora_B["default"].weight.grad.any()


@pytest.mark.parametrize(
    "kind, frozen, chunks",
    [
        ("float32", False, 1),
        ("autocast", False, 1),
        ("autocast", False, 3),
        ("bfloat16", False, 3),
        ("bfloat16", True, 3),
    ],
)
def test_needs_no_more_memory_than_autograd(model_folder, monkeypatch, kind, frozen, chunks):
    """Bytes of tensors without values, for a head of usual shape."""
    peaks = []
    with Simulation():
        vlm = load_vlm(str(model_folder()))
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        vlm.model.lm_head = nn.Linear(2048, 151936, bias=False, dtype=dtype).requires_grad_(not frozen)
        vlm.model.config.get_text_config().vocab_size = 151936
        states = torch.empty(441 * chunks, 2048, dtype=dtype, requires_grad=True)
        for plain in (True, False):
            monkeypatch.setattr(forward, "is_plain", lambda head, plain=plain: plain)
            with MemoryCounter() as counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
                    logprobs, _ = Pass(vlm).score(states, torch.tensor([0] * len(states)))
                logprobs.sum().backward()
            peaks.append(counter.peak)
            vlm.model.lm_head.weight.grad = states.grad = None
    assert peaks[0] < peaks[1] + 2**20


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_capped_logits_have_the_gradients_of_autograd(temperature):
    """In float64, with logits far beyond the cap and banned tokens."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 6, dtype=torch.float64, generator=generator) * 3 for size in (7, 11))
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets, banned, cap = torch.arange(7) + 3, (0, 2), 5.0
    found, entropies = score_tokens(
        hidden, weight, targets, banned=banned, temperature=temperature, chunk=3, cap=cap
    )
    logits = cap * (hidden @ weight.T / cap).tanh() / temperature
    allowed = torch.ones(11, dtype=torch.bool)
    allowed[list(banned)] = False
    expected = logits.masked_fill(~allowed, float("-inf")).log_softmax(-1)
    own = expected[:, allowed]
    assert (hidden @ weight.T).abs().max() > 2 * cap
    assert (found - expected.gather(-1, targets[:, None])[:, 0]).abs().max() < 1e-12
    assert (entropies + (own.exp() * own).sum(-1)).abs().max() < 1e-12
    weights = torch.randn(7, dtype=torch.float64, generator=generator)
    gradients = torch.autograd.grad((found * weights).sum(), (hidden, weight))
    reference = torch.autograd.grad(
        (expected.gather(-1, targets[:, None])[:, 0] * weights).sum(), (hidden, weight)
    )
    for one, other in zip(gradients, reference, strict=True):
        assert (one - other).abs().max() < 1e-11
