"""Prompts as the model reads them, with tiny and with the real processors."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.conftest import SHARED, SMALL, example, picture
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.vlm import load_vlm
from vlm_sapo.types import RowError

REAL = {
    "Qwen2-VL-2B-Instruct": ("qwen2_vl", 165),
    "Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", 165),
    "Qwen3-VL-2B-Instruct": ("qwen3_vl", 117),
    "Qwen3-VL-2B-Thinking": ("qwen3_vl", 117),
}


def test_marks_place_the_pictures(encoder):
    prompt = encoder(example(pictures=2, problem="Compare <image> with <image>."))
    assert "Compare <|vision_start|><|image_pad|><|vision_end|> with <|vision_start|>" in prompt.text
    assert prompt.grid.shape == (2, 3)
    image_tokens = int((prompt.ids == encoder.vlm.model.config.image_token_id).sum())
    assert image_tokens == int(prompt.grid.prod(-1).sum()) // 4
    assert prompt.pixels.shape[0] == int(prompt.grid.prod(-1).sum())


def test_without_marks_the_pictures_come_first(encoder):
    assert encoder(example(problem="How many?")).text.startswith("<|im_start|>user\n<|vision_start|>")


def test_template_and_system_prompt(vlm):
    row = replace(example(problem="<image>What?"), system="Be brief.", template="Q: {problem} Use \\boxed{}.")
    text = Encoder(vlm)(row).text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "Q: <|vision_start|><|image_pad|><|vision_end|>What? Use \\boxed{}." in text


def test_rotary_positions_end_where_the_response_starts(encoder):
    prompt = encoder(example())
    assert prompt.positions.shape == (3, len(prompt.ids))
    assert (prompt.positions.max() + 1).item() < len(
        prompt.ids
    )  # a picture takes fewer positions than tokens


def test_pictures_are_resized_once_within_the_bounds(vlm):
    encoder = Encoder(vlm, min_pixels=1024, max_pixels=2048)
    prompt = encoder(dataclasses.replace(example(), images=(picture(0, (200, 100)),)))
    width, height = prompt.images[0].size
    assert width % 16 == height % 16 == 0 and 1024 <= width * height <= 2048
    assert prompt.grid.tolist() == [[1, height // 8, width // 8]]


def test_a_long_prompt_is_an_error_and_never_cut(vlm):
    with pytest.raises(
        RowError, match=r"row e0: its prompt has \d+ tokens, 9 of them for pictures, over .*\(20\)"
    ):
        Encoder(vlm, max_tokens=20)(example())


def test_image_tokens_in_the_text_are_an_error(encoder):
    with pytest.raises(RowError, match=r"row e0: its prompt has 2 places for 1 pictures; .*must not contain"):
        encoder(example(problem="How many <|image_pad|> are there?"))


def test_an_extreme_picture_is_named(encoder):
    with pytest.raises(RowError, match=r"row e0: picture 1 \(900x2\) cannot be resized"):
        encoder(dataclasses.replace(example(), images=(Image.new("RGB", (900, 2)),)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode(encoder, mode):
    prompt = encoder(dataclasses.replace(example(), images=(Image.new(mode, (48, 48)),)))
    assert prompt.images[0].mode == "RGB" and torch.isfinite(prompt.pixels).all()


@pytest.fixture(scope="module")
def real_model(tmp_path_factory):
    """A tiny model behind a real processor."""

    def make(name: str):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from vlm_sapo.models.tiny import model_config, train_tokenizer

        family, _ = REAL[name]
        folder = tmp_path_factory.mktemp(name)
        processor = AutoProcessor.from_pretrained(SHARED / "processors" / name)
        tokenizer = processor.tokenizer
        shape = dataclasses.replace(SMALL, patch=processor.image_processor.patch_size)
        config = model_config(family, shape, train_tokenizer(["x"], 300))
        config.text_config.vocab_size = len(tokenizer)
        for field, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        ):
            setattr(config, field, tokenizer.convert_tokens_to_ids(token))
        config.text_config.pad_token_id = tokenizer.pad_token_id
        model = AutoModelForImageTextToText.from_config(config)
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return load_vlm(str(folder))

    return make


@pytest.mark.skipif(
    not (SHARED / "processors").is_dir(), reason="the real processors are not at ../shared/processors"
)
@pytest.mark.parametrize("name", REAL)
def test_the_whole_pipeline_behind_a_real_processor(real_model, name):
    """Encode, roll out, score with the trainer, and back: a real tokenizer, template and picture setting."""
    from vlm_sapo.models.layout import SharedPrefix
    from vlm_sapo.models.logprobs import Pass
    from vlm_sapo.rollout.hf import HfEngine
    from vlm_sapo.types import Sampling

    vlm = real_model(name)
    encoder = Encoder(vlm)
    row = dataclasses.replace(example(), images=(picture(0, (300, 420)),))
    prompts = [encoder(row), encoder(example(pictures=0))]
    image_tokens = int((prompts[0].ids == vlm.model.config.image_token_id).sum())
    assert image_tokens == REAL[name][1]
    assert prompts[0].opening == ("<think>\n" if name.endswith("Thinking") else "")
    groups = HfEngine(vlm, prompts_per_batch=2).generate(prompts, Sampling(2, 6, 1.0, 0))
    assert all(text.startswith(prompts[0].opening) for text in (c.text for group in groups for c in group))
    for prompt, completions in zip(prompts, groups, strict=True):
        logprobs, _ = Pass(vlm)(SharedPrefix().inputs([(prompt, [c.ids for c in completions])]))
        for row_logprobs, drawn in zip(logprobs, completions, strict=True):
            assert torch.allclose(row_logprobs[: len(drawn.ids)], drawn.logprobs, atol=1e-4)
    logprobs.sum().backward()
    assert encoder.respond(prompts[0], "yes").ids[-1] == vlm.tokenizer.eos_token_id
