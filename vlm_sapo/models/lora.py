"""LoRA adapters: adds them to a model, disables, saves, loads and merges them."""

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
from torch.distributed.tensor import DTensor, Replicate

from vlm_sapo.distributed import deferring_signals
from vlm_sapo.models.file_modes import use_umask

NAME = "default"
PREFIX = "base_model.model."
"""peft's prefix of module names in adapter files."""
FILE = "adapter_model.safetensors"
PLAIN_LORA = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""peft's settings for plain LoRA: with other values the change is more than the product of two factors."""
ROUTERS = (".gate", ".shared_expert_gate")


def targets(model: nn.Module, part_of: Callable[[str], str], parts: Sequence[str]) -> list[str]:
    """Names of the linear layers of some parts, without head, experts and routers. `part_of` returns the part
    that a name belongs to."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_of(name) in parts
        and not name.startswith("lm_head")
        and not name.endswith(ROUTERS)
    ]


def add(model: nn.Module, names: list[str], *, rank: int, alpha: float, base: str) -> None:
    """Adds float32 adapters, initially without effect, to the named layers, and freezes everything else."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, base_model_name_or_path=base)
    _inject(model, config)


def check(folder: Path, base: str) -> None:
    """Raises ValueError if the folder has no adapter, not a plain one, or one of another base model."""
    path = folder / "adapter_config.json"
    if not path.is_file() or not (folder / FILE).is_file():
        raise ValueError(
            f"model.lora.adapter ({folder}) must be a folder with adapter_config.json and {FILE}; "
            "give the adapter folder of a run's final/ or of peft"
        )
    settings = json.loads(path.read_text())
    unusual = [name for name, plain in PLAIN_LORA.items() if (settings.get(name) or plain) != plain]
    if settings.get("init_lora_weights", True) not in (
        True,
        False,
        "gaussian",
    ):  # others change the base model
        unusual.append("init_lora_weights")
    if unusual:
        raise ValueError(
            f"model.lora.adapter ({folder}) must be plain LoRA, and its adapter_config.json sets "
            f"{', '.join(f'{name}={settings[name]}' for name in unusual)}; merge it into its base model with "
            "peft, and start from the result"
        )
    trained_on = settings.get("base_model_name_or_path") or base
    folders = Path(trained_on).is_dir() and Path(base).is_dir()
    if (
        Path(trained_on).resolve() != Path(base).resolve()
        if folders
        else Path(trained_on).name != Path(base).name
    ):
        raise ValueError(
            f"model.lora.adapter ({folder}) was trained on {trained_on} and model.path is {base}; "
            "give an adapter of this model, or correct base_model_name_or_path in adapter_config.json if "
            "they are the same"
        )


def load(model: nn.Module, folder: Path, *, frozen: Callable[[str], bool] = lambda name: False) -> None:
    """Loads the adapters of a folder (peft's format) into the model, to continue their training. `frozen`
    returns whether a layer's name belongs to a part that must not be trained.

    Raises ValueError if they belong to another model, or to such a part.
    """
    weights = {name.removeprefix(PREFIX): item for name, item in load_file(folder / FILE).items()}
    try:
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = False  # peft saves it as true, and then trains nothing
        _inject(model, config)
        result = set_peft_model_state_dict(model, weights, adapter_name=NAME)
        unexpected = result.unexpected_keys
    except (RuntimeError, ValueError) as error:  # other sizes, or no such layers
        raise ValueError(
            f"the adapter in {folder} belongs to another base model ({str(error).splitlines()[-1].strip()}); "
            "give one that was trained on model.path"
        ) from error
    if unexpected:
        raise ValueError(
            f"the adapter in {folder} belongs to another base model: this one has no {unexpected[0]}; "
            "give one that was trained on model.path"
        )
    if trained := [name for name in layers(model) if frozen(name)]:
        raise ValueError(
            f"the adapter in {folder} changes {trained[0]}, which model.freeze freezes; "
            "remove its part from that list"
        )


def _inject(model: nn.Module, config: LoraConfig) -> None:
    with _stand_ins(model):
        inject_adapter_in_model(config, model, NAME)
    for layer in layers(model).values():
        layer.lora_A.float(), layer.lora_B.float()


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Within the block the weights of linear layers on the meta device are zeros that share one element: peft
    moves adapters to the device of their layer, where they would lose their values."""
    linear = [item for item in model.modules() if isinstance(item, nn.Linear) and item.weight.is_meta]
    metas = [layer.weight for layer in linear]
    for layer, weight in zip(linear, metas, strict=True):
        zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        layer.weight = nn.Parameter(zeros, requires_grad=weight.requires_grad)
    try:
        yield
    finally:
        for layer, weight in zip(linear, metas, strict=True):
            weight.requires_grad_(layer.weight.requires_grad)
            layer.weight = weight


def weights(model: nn.Module, gather: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapters' weights with peft's names; `gather` makes a full tensor of a parameter."""
    return {PREFIX + name: gather(item.detach()) for name, item in get_peft_model_state_dict(model).items()}


def save(model: nn.Module, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes the adapters in peft's format."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: item.cpu().contiguous() for name, item in weights.items()}, folder / FILE)
    use_umask(folder)
    model.peft_config[NAME].save_pretrained(folder)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disables the adapters within the block: the model is its base model."""
    adapted = layers(model).values()
    for layer in adapted:
        layer.set_scale(NAME, 0.0)
    try:
        yield
    finally:
        for layer in adapted:
            layer.set_scale(NAME, 1.0)


def merged(layer: LoraLayer, move: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The weight of a layer with its adapter merged, in its own dtype; one of 4 bits in its compute dtype.
    That of a sharded layer is sharded. `move` brings each factor to the device that computes."""
    base = move(dequantize_module_weight(layer.get_base_layer()).detach())
    first, second = (move(item[NAME].weight.detach()) for item in (layer.lora_A, layer.lora_B))
    if isinstance(first, DTensor):  # the second has the rows that the base has
        first = first.redistribute(placements=[Replicate()] * first.device_mesh.ndim)
    return (base + layer.scaling[NAME] * (second @ first)).to(base.dtype)


def weight_shape(layer: LoraLayer) -> tuple[int, int]:
    """[out, in] of a layer's weight, also of one that is stored in 4 bits."""
    return layer.lora_B[NAME].weight.shape[0], layer.lora_A[NAME].weight.shape[1]


class Folded(nn.Module):
    """An adapted layer without gradients: the base, and the adapter's factors in the dtype of its inputs, the
    scaling folded in. Three kernels instead of peft's seven."""

    def __init__(self, layer: LoraLayer, dtype: torch.dtype):
        super().__init__()
        self.base = layer.get_base_layer()
        self.down = layer.lora_A[NAME].weight.detach().t().to(dtype)  # [I, r]
        self.up = (layer.scaling[NAME] * layer.lora_B[NAME].weight.detach()).t().to(dtype)  # [r, O]

    @property
    def weight(self) -> torch.Tensor:
        """The base's; some towers look up its dtype."""
        return self.base.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        outputs = self.base(inputs)
        rows = inputs.flatten(0, -2) @ self.down
        return torch.addmm(outputs.flatten(0, -2), rows, self.up).view(outputs.shape)


@contextmanager
def inlined(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, which must not train, adapted layers take fewer kernels. `dtype` is what they compute
    in, autocast's or the weights'.

    In float32 the adapters are merged. In half precision that would round most of a young adapter's change
    away (half a unit in the last place of a weight of 0.02 is 3e-5), and so would sampling lag behind the
    policy: there, and on a base of 4 bits, only the factors are rounded. Base and adapters are not written
    to; the adapted layers return whatever ends the block.
    """
    adapted = layers(model)
    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in adapted}
    try:
        with deferring_signals():
            for name, layer in adapted.items():
                setattr(parents[name], name.rpartition(".")[2], _inline(layer, dtype))
        yield
    finally:
        with deferring_signals():
            for name, layer in adapted.items():
                setattr(parents[name], name.rpartition(".")[2], layer)


@torch.no_grad()
def _inline(layer: LoraLayer, dtype: torch.dtype) -> nn.Module:
    base = layer.get_base_layer()
    if dtype != torch.float32 or type(base) is not nn.Linear:
        return Folded(layer, dtype)
    with torch.device("meta"):
        merged = nn.Linear(base.in_features, base.out_features, bias=False)
    delta = layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight
    merged.weight = nn.Parameter(base.weight + layer.scaling[NAME] * delta, requires_grad=False)
    merged.bias = base.bias
    return merged


def rank(model: nn.Module) -> int:
    """The largest rank of the adapters."""
    return max(layer.r[NAME] for layer in layers(model).values())


def bits(model: nn.Module) -> int | None:
    """4 if the layers that have adapters are stored in 4 bits, else None."""
    bases = (layer.get_base_layer().weight for layer in layers(model).values())
    return None if all(base.is_floating_point() for base in bases) else 4


def attached(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return bool(layers(model))


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
