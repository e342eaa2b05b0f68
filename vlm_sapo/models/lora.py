"""Low-rank adapters inside a model: made, switched off, saved, loaded, and what the weights are with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file, save_file
from torch import nn

NAME = "default"
PREFIX = "base_model.model."
"""What peft writes before the names of a model's modules."""
FILE = "adapter_model.safetensors"
PLAIN = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""Settings of peft that would change weights otherwise than by two factors."""
ROUTERS = (".gate", ".shared_expert_gate")


def targets(model: nn.Module, owner: Callable[[str], str], parts: Sequence[str]) -> list[str]:
    """Names of the linear layers of some parts; `owner` tells the part of a name. The head, the experts and
    what chooses them stay as they are."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and owner(name) in parts
        and not name.startswith("lm_head")
        and not name.endswith(ROUTERS)
    ]


def add(model: nn.Module, names: list[str], *, rank: int, alpha: float, base: str) -> None:
    """Puts float32 adapters that change nothing yet beside the named layers, and freezes everything else."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, base_model_name_or_path=base)
    _inject(model, config)


def check(folder: Path, base: str) -> None:
    """Raises ValueError where the folder holds no adapter, or one whose base model bears another name."""
    settings = folder / "adapter_config.json"
    if not settings.is_file() or not (folder / FILE).is_file():
        raise ValueError(
            f"model.lora.adapter ({folder}) must be a folder with adapter_config.json and {FILE}; "
            "give the adapter folder of a run's final/ or of peft"
        )
    kept = json.loads(settings.read_text())
    unusual = [name for name, plain in PLAIN.items() if (kept.get(name) or plain) != plain]
    if kept.get("init_lora_weights", True) not in (True, False, "gaussian"):  # others change the base model
        unusual.append("init_lora_weights")
    if unusual:
        raise ValueError(
            f"model.lora.adapter ({folder}) must be plain LoRA, and its adapter_config.json sets "
            f"{', '.join(f'{name}={kept[name]}' for name in unusual)}; merge it into its base model with "
            "peft, and begin with that"
        )
    own = kept.get("base_model_name_or_path") or base
    folders = Path(own).is_dir() and Path(base).is_dir()
    if Path(own).resolve() != Path(base).resolve() if folders else Path(own).name != Path(base).name:
        raise ValueError(
            f"model.lora.adapter ({folder}) was trained on {own} and model.path is {base}; give an adapter "
            "of this model, or correct base_model_name_or_path in adapter_config.json if they are the same"
        )


def load(model: nn.Module, folder: Path, *, frozen: Callable[[str], bool] = lambda name: False) -> None:
    """Puts the adapters of a folder (peft's format) into the model, to be trained on. `frozen` tells whether
    a name is of a part that must not be trained.

    Raises ValueError where they are another model's, or of such a part.
    """
    weights = {name.removeprefix(PREFIX): item for name, item in load_file(folder / FILE).items()}
    try:
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = False  # peft writes that it is on, and then trains nothing
        _inject(model, config)
        result = set_peft_model_state_dict(model, weights, adapter_name=NAME)
        wrong = result.unexpected_keys
    except (RuntimeError, ValueError) as error:  # sizes that differ; no such layers
        raise ValueError(
            f"the adapter in {folder} is another base model's ({str(error).splitlines()[-1].strip()}); "
            "give one that was trained on model.path"
        ) from error
    if wrong:
        raise ValueError(
            f"the adapter in {folder} is another base model's: this one has no {wrong[0]}; "
            "give one that was trained on model.path"
        )
    if both := [name for name in _layers(model) if frozen(name)]:
        raise ValueError(
            f"the adapter in {folder} has a part in {both[0]}, which model.freeze names; take its part out"
        )


def _inject(model: nn.Module, config: LoraConfig) -> None:
    inject_adapter_in_model(config, model, NAME)
    for layer in _layers(model).values():
        layer.lora_A.float(), layer.lora_B.float()


def weights(model: nn.Module, take: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters' weights as peft names them; `take` makes a parameter a whole tensor."""
    return {PREFIX + name: take(item.detach()) for name, item in get_peft_model_state_dict(model).items()}


def save(model: nn.Module, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes the adapters as peft does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: item.cpu().contiguous() for name, item in weights.items()}, folder / FILE)
    model.peft_config[NAME].save_pretrained(folder)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model as it was without adapters."""
    layers = _layers(model).values()
    for layer in layers:
        layer.set_scale(NAME, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(NAME, 1.0)


def merged(model: nn.Module, take: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters by the names that they have without adapters, each with its adapter added and in its own
    type, weights of 4 bits in the type that they compute in."""
    layers = _layers(model)
    found = {
        name.replace(".base_layer.", "."): take(parameter)
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and not name.endswith(".base_layer.weight")
    }
    for name, layer in layers.items():
        base = take(dequantize_module_weight(layer.get_base_layer()))
        delta = take(layer.lora_B[NAME].weight) @ take(layer.lora_A[NAME].weight)
        found[f"{name}.weight"] = (base + layer.scaling[NAME] * delta).to(base.dtype)
    return found


def attached(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return bool(_layers(model))


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
