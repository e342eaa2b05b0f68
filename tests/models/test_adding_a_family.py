"""The worked example of docs/families.md: a model type that transformers has been told of, and an entry."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from docs.examples.family import MADE_UP
from tests.conftest import CORPUS, SMALL, example, group_slice, own_inputs
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.families import FAMILIES
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import SharedPrefix
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.tools.new_model import new_model
from vlm_sapo.types import Sampling


class MadeUpConfig(Qwen2_5_VLConfig):
    model_type = "made_up_vl"


class MadeUpForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    config_class = MadeUpConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    AutoConfig.register("made_up_vl", MadeUpConfig, exist_ok=True)
    AutoModelForImageTextToText.register(MadeUpConfig, MadeUpForConditionalGeneration, exist_ok=True)
    with pytest.raises(ValueError, match=r"--family \(made_up_vl\) must be one of"):
        new_model(tmp_path, family="made_up_vl", corpus=CORPUS, shape=SMALL)
    for name, family in MADE_UP.items():
        monkeypatch.setitem(FAMILIES, name, family)
    new_model(tmp_path, family="made_up_vl", corpus=CORPUS, shape=SMALL)
    return tmp_path


@torch.no_grad()
def test_an_entry_is_enough(folder):
    vlm = load_vlm(str(folder))
    assert vlm.tokenizer.convert_tokens_to_ids("<|look|>") in vlm.banned and vlm.shares_prefix
    prompt = Encoder(vlm)(example(1, images=2))
    assert prompt.text.count("<|look|><|image_pad|>") == 2 and prompt.coordinates == "thousand"
    [responses] = HfEngine(vlm, prompts_per_batch=1).generate(
        as_contexts([prompt]), Sampling(2, 4, 1.0, seed=5)
    )
    ids = [response.ids for response in responses]
    scores = Pass(vlm)(SharedPrefix().inputs([group_slice(prompt, ids)]))
    for row, (response, tokens) in enumerate(zip(responses, ids, strict=True)):
        both = torch.cat([prompt.ids, tokens])[None]
        logits = vlm.model(**own_inputs(vlm, prompt, both)).logits[0, len(prompt.ids) - 1 : -1]
        logits[:, vlm.banned] = float("-inf")
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        assert torch.allclose(scores.logprobs[row, : len(tokens)], expected, atol=1e-5)
        assert torch.allclose(response.logprobs, expected, atol=1e-5)
