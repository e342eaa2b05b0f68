"""The training pass against the model's own forward, and against itself in other layouts and chunks."""

import pytest
import torch

from tests.conftest import FAMILIES, example, group_slice, own_inputs
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import Plain, SharedPrefix

LAYOUTS = pytest.mark.parametrize("layout", [Plain(), SharedPrefix()], ids=lambda layout: layout.name)


def inputs_of(rows):
    return Plain().inputs(rows.slices)


@LAYOUTS
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_models_own_forward(model_folder, family, layout):
    """One prompt with two images, through transformers' public call that derives its own positions."""
    vlm = load_vlm(str(model_folder(family)))
    encoder = Encoder(vlm)
    prompt = encoder(example(1, images=2, problem="<image>Compare<image>these."))
    response = torch.tensor([20, 30, 40, 2])
    scores = Pass(vlm, temperature=0.7)(layout.inputs([group_slice(prompt, [response])]))
    ids = torch.cat([prompt.ids, response])[None]
    with torch.no_grad():
        logits = vlm.model(**own_inputs(vlm, prompt, ids)).logits[0, len(prompt.ids) - 1 : -1]
    logits[:, vlm.banned] = float("-inf")
    expected = (logits / 0.7).log_softmax(-1)
    assert torch.allclose(scores.logprobs[0], expected.gather(-1, response[:, None])[:, 0], atol=1e-5)
    probabilities = expected.exp()
    entropy = -torch.where(probabilities > 0, probabilities * expected, 0.0).sum(-1)
    assert torch.allclose(scores.entropies[0], entropy, atol=1e-5)


def test_a_batch_agrees_with_its_single_rows(vlm, rows):
    together = Pass(vlm)(inputs_of(rows)).logprobs
    for row, item in enumerate(rows.slices):
        alone, length = Pass(vlm)(Plain().inputs([item])).logprobs, len(item.responses[0].ids)
        assert torch.allclose(together[row, :length], alone[0], atol=1e-5)
        assert not together[row, length:].any()


def test_padding_does_not_change_logprobs(vlm, rows):
    """Tokens after a response cannot change its log-probs: the layout is causal."""
    inputs = inputs_of(rows)
    before = Pass(vlm)(inputs).logprobs
    inputs.ids[inputs.mask == 0] = 77
    after = Pass(vlm)(inputs).logprobs
    assert torch.equal(before, after)


@LAYOUTS
def test_chunks_and_checkpointing_change_nothing(vlm, rows, monkeypatch, layout):
    import vlm_sapo.models.forward as module

    inputs = layout.inputs(rows.slices)
    unchunked = Pass(vlm)(inputs).logprobs
    unchunked.sum().backward()
    gradient = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad()
    monkeypatch.setattr(module, "CHUNK_LOGITS", 4 * vlm.vocabulary)
    vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chunked = Pass(vlm)(inputs).logprobs
    chunked.sum().backward()
    assert torch.allclose(unchunked, chunked, atol=1e-6)
    for name, parameter in vlm.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradient[name], parameter.grad, atol=1e-5), name


def test_banned_tokens_have_no_probability(vlm, rows):
    hidden = torch.randn(3, vlm.model.config.get_text_config().hidden_size)
    logprobs = vlm.logits(hidden).log_softmax(-1)
    assert (logprobs[:, vlm.banned] == float("-inf")).all()
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(3))


def test_freezing_by_part(vlm):
    def trained(parts):
        vlm.freeze(parts)
        return {name for name, parameter in vlm.model.named_parameters() if parameter.requires_grad}

    everything = trained([])
    vision = everything - trained(["vision"])
    merger = everything - trained(["merger"])
    language = everything - trained(["language"])
    assert vision | merger | language == everything
    assert not vision & merger and not vision & language
    assert all("merger" in name for name in merger) and all(
        "visual.blocks" in n for n in vision if "blocks" in n
    )
    assert any("deepstack_merger_list" in name for name in merger)
    assert any(name.startswith("model.language_model.layers") for name in language)


def test_a_folder_without_a_processor_is_named(model_folder, tmp_path):
    import shutil

    shutil.copytree(model_folder(), tmp_path / "bare")
    (tmp_path / "bare/processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"model.path .* contains a qwen3_vl model but no processor; copy"):
        load_vlm(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="config.json is missing"):
        load_vlm(str(tmp_path))
