"""transformers warned of a deprecated argument name in the middle of generation.

Source: https://github.com/huggingface/transformers/issues/33489
"""

import logging
import warnings
from types import SimpleNamespace

import pytest

from tests.conftest import FAMILIES, example
from vlm_sapo.api import silence_libraries
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.types import Context, Sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_uses_no_deprecated_argument(model_folder, family):
    vlm = load_vlm(str(model_folder(family)))
    prompt = Encoder(vlm)(example())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        HfEngine(vlm, prompts_per_batch=1).generate([Context(prompt)], Sampling(2, 4, 1.0, 0))


def test_the_cache_goes_by_the_name_that_the_model_takes(vlm):
    class Newer:
        def forward(self, inputs_embeds, cache=None): ...

    class Older:
        def forward(self, inputs_embeds, past_key_values=None): ...

    assert vlm.cache_argument in ("cache", "past_key_values")
    for kind, name in ((Newer, "cache"), (Older, "past_key_values")):
        assert type(vlm).cache_argument.func(stand_in(kind())) == name


def stand_in(language):
    """Something with a language model where a VLM has it."""
    return SimpleNamespace(language=language)


def test_optional_packages_of_libraries_are_not_advertised(caplog):
    silence_libraries()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("please install kernels")
        logging.getLogger("vlm_sapo").warning("ours")
    assert [record.message for record in caplog.records] == ["ours"]
