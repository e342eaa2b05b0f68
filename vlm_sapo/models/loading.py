"""Loads checkpoints: full weights, with adapters, in 4 bits, or an outline without weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights

from vlm_sapo.models import attention
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.families import FAMILIES, check_family
from vlm_sapo.models.unread import TensorFiles, UnreadWeights
from vlm_sapo.models.vlm import VLM, part_of
from vlm_sapo.plugins import searched

DTYPES = ("float32", "bfloat16", "float16")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters to train: new ones of this shape, or those of a folder. `base` is the name of their base
    model."""

    base: str
    rank: int = 16
    alpha: float = 32.0
    parts: tuple[str, ...] = ("language",)
    folder: Path | None = None
    bits: int | None = None
    """4 stores the linear layers of the parts in 4 bits."""


def load_vlm(
    path: str,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    gradient_checkpointing: bool = False,
    freeze: list[str] = (),
    lora: Adapters | None = None,
    defer: bool = False,
) -> VLM:
    """Loads a checkpoint of a supported family (models/families) from a folder; `hub.local_model` has that
    of a hub id.

    Dropout is disabled: old and new log-probs must come from the same function. With `defer` the model stays
    on the meta device, and its weights are read when it is sharded (`parallel.shard`); not if they are
    quantized: then they can't be read tensor by tensor.
    Raises ValueError if the folder lacks a model or a processor, its weights are not the model's, or the
    family is not supported.
    """

    def build(config: PreTrainedConfig) -> nn.Module:
        extra = {}
        if lora is not None and lora.bits:
            quantized = _four_bits(config, lora.parts, dtype)
            extra = {"quantization_config": quantized, "device_map": {"": device}}
        elif defer and "quantization_config" not in config.to_dict():
            extra = {"device_map": {"": "meta"}}
        return _pretrained(path, config, dtype=dtype, **extra)

    processor, model = _open(path, build)
    unread = UnreadWeights(model, path) if model.device.type == "meta" else None
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):  # bitsandbytes' layers in 4 bits
            # Some CPUs would repack them at the first generation, with constants rounded to bfloat16, so that
            # engine and trainer no longer agree; and fail if a layer's width is no multiple of 64.
            module.support_avx512bf16_for_cpu = False
    model.set_attn_implementation({"text_config": attention.NAME, "vision_config": attention.VISION_NAME})
    vlm = VLM(model, processor)
    if lora is None:
        vlm.freeze(freeze)
    elif lora.folder is not None:
        adapters.load(model, lora.folder, frozen=lambda name: part_of(name) in freeze)
    else:
        adapters.add(
            model,
            adapters.targets(model, part_of, lora.parts),
            rank=lora.rank,
            alpha=lora.alpha,
            base=lora.base,
        )
    model.train()
    silence_dropout(model)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": vlm.routers.recomputing}
        )
    vlm.patch_embed_as_linear()
    vlm.unread = unread
    if unread is None:
        vlm.to_device(device)
    return vlm


def _pretrained(path: str, config: PreTrainedConfig, *, dtype: str, **options: Any) -> nn.Module:
    """Loads a model. On the meta device its buffers that no file holds, such as rotary frequencies, have
    their values. Raises ValueError if the checkpoint lacks a tensor or has one that the model has not."""
    model, report = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation="eager",  # not the folder's choice, which may be code from the hub
        output_loading_info=True,
        **options,
    )
    _check_complete(path, report, config.model_type)
    if model.device.type == "meta":
        with no_init_weights(), init_empty_weights(include_buffers=False):
            twin = AutoModelForImageTextToText.from_config(config, dtype=model.dtype)
        stored = twin.state_dict().keys()
        for name, buffer in twin.named_buffers():
            if name in stored:
                continue
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, buffer)
    return model


def _check_complete(path: str, report: dict[str, Any], family: str) -> None:
    """Raises ValueError if the checkpoint lacks a tensor or has one that the model has not."""
    text = f"model.path ({path}) must hold the weights of a {family} model and no others; "
    if missing := sorted(report["missing_keys"]):
        files = sorted({file.name for file in TensorFiles(path).files.values()})
        raise ValueError(f"{text}{_listed(missing)} is in none of its files ({_listed(files)})")
    if unexpected := sorted(report["unexpected_keys"]):
        file = TensorFiles(path).files.get(unexpected[0])
        holder = "its files" if file is None else file.name
        raise ValueError(f"{text}{_listed(unexpected)} in {holder} belongs to no parameter")


def _listed(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _four_bits(config: PreTrainedConfig, parts: tuple[str, ...], dtype: str) -> BitsAndBytesConfig:
    """NF4 with double quantization for the linear layers of some parts."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    targets = set(adapters.targets(model, part_of, parts))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=[name for name in linear if name not in targets],
    )


def load_outline(path: str) -> VLM:
    """The model of a checkpoint on the meta device, without weights: enough to encode prompts, and quick."""

    def build(config: PreTrainedConfig) -> nn.Module:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)

    processor, model = _open(path, build)
    return VLM(model, processor)


def count_parameters(path: str) -> int:
    """Number of a checkpoint's parameters, by its config."""
    return load_outline(path).model.num_parameters()


def stored_dtype(path: str) -> str | None:
    """The data type of a checkpoint's weights, by its config; None where that doesn't say. Raises ValueError
    for one that no engine computes in."""
    check_folder(path)
    config = _config(path)
    dtype = config.dtype or config.get_text_config().dtype
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(
            f"{path} stores its weights as {name}; choose one of {', '.join(DTYPES)} with --dtype"
        )
    return name


def _config(path: str) -> PreTrainedConfig:
    """Raises ValueError for a model that can't be reached or is not supported."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"model.path ({path}) must be a model folder{searched(path)} or a hub id that can be reached; "
            f"{error}"
        ) from error
    except AttributeError as error:  # it looks dtypes up by their names
        raise ValueError(
            f"model.path ({path}) has a config.json that can't be read ({error}); correct or remove its dtype"
        ) from error
    check_family(config.model_type, f"the model type of model.path {path}").check(config)
    return config


def _open(path: str, build: Callable[[PreTrainedConfig], nn.Module]) -> tuple:
    """Loads processor and model. Raises ValueError that says what is wrong with `model.path`."""
    check_folder(path)
    config = _config(path)
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        FAMILIES[config.model_type].check_processor(config, processor)
        return processor, build(config)
    except OSError as error:
        raise ValueError(f"model.path ({path}) must be the folder of a whole model; {error}") from error


def check_folder(path: str) -> None:
    """Raises ValueError if a local model folder lacks files, before anything heavy is loaded."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"model.path ({path}) must be a model folder or a hub id; there is no such folder{searched(path)}"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"model.path ({path}) must contain a model; config.json is missing from that folder")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise ValueError(
            f"model.path ({path}) contains a {kind} model but no processor; copy {PROCESSOR_FILES[0]}, "
            "the tokenizer files and the chat template of the original checkpoint into the folder"
        )


def silence_dropout(model: nn.Module) -> None:
    """Sets every dropout to 0, so that training mode, which checkpointing needs, computes the same as
    evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for config in (model.config, model.config.get_text_config()):
        config.attention_dropout = 0.0
