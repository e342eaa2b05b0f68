"""Kernel launches per decoder layer: a token's decoding step, and a training pass forwards and backwards with
recomputation. On a GPU each operation that isn't a view is at least one launch.

A change by a tenth fails. After an improvement write the new numbers down. With peft's own layers adapters
make 98 and 114 launches of a decoding step.
"""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import example, group_slice
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.decoding import BranchGrid, prefill
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.experts import NullRecorder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.packing import SharedPrefix
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import as_contexts

NO_KERNEL = (
    "aten::detach",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::lift_fresh",
    "aten::alias",
    "aten::view",
    "aten::reshape",
    "aten::_unsafe_view",
    "aten::_local_scalar_dense",
    "profiler::_record_function_enter_new",
    "profiler::_record_function_exit",
)
"""Operations that launch nothing although their schema declares no view."""


class LaunchCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func._schema.name not in NO_KERNEL:
            self.launches[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], object]) -> int:
    with LaunchCounter() as counter:
        work()
    return counter.launches.total()


def shallow(vlm: VLM, depth: int) -> VLM:
    language = vlm.model.model.language_model
    language.layers = language.layers[:depth]
    vlm.model.config.get_text_config().num_hidden_layers = depth
    return vlm


def decoding(vlm: VLM) -> int:
    """Of a token, after the first."""
    prompts = [Encoder(vlm)(example(number, images=1)) for number in range(2)]
    tokens = torch.full((8,), 20)
    vlm.eval()
    with torch.no_grad():
        _, state = prefill(vlm, BranchGrid.of(as_contexts(prompts), 4), NullRecorder())
        state.step(tokens, tokens)
        count = launches(lambda: state.step(tokens, tokens))
    vlm.train()
    return count


def training(vlm: VLM) -> tuple[int, int]:
    prompt = Encoder(vlm)(example(images=1))
    inputs = SharedPrefix().inputs([group_slice(prompt, [[10, 20, 30], [20, 30, 40, 50]])])
    scores = []
    forward = launches(lambda: scores.append(Pass(vlm)(inputs)))
    return forward, launches(lambda: scores[0].logprobs.sum().backward())


def by_layer(path: str, kind: str) -> tuple[float, float, float]:
    counts = []
    for depth in (1, 2):
        vlm = load_vlm(
            path,
            dtype="float32" if kind == "autocast" else "bfloat16",
            freeze=["vision", "merger"],
            lora=Adapters(base="a", rank=4) if kind == "lora" else None,
            gradient_checkpointing=True,
        )
        shallow(vlm, depth)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != "bf16"):
            with adapters.inlined(vlm.model.model.language_model, torch.bfloat16):
                token = decoding(vlm)
            counts.append((token, *training(vlm)))
    one, two = counts
    return tuple(b - a for a, b in zip(one, two, strict=True))


LAUNCHES = {
    ("qwen2_5_vl", "bf16"): (56, 52, 146),
    ("qwen2_5_vl", "autocast"): (59, 55, 168),
    ("qwen2_5_vl", "lora"): (70, 108, 242),
    ("qwen3_vl", "bf16"): (72, 68, 191),
    ("qwen3_vl", "autocast"): (75, 71, 208),
    ("qwen3_vl", "lora"): (86, 124, 286),
}
"""Decode, forward and backward with recomputation, by family and precision."""


@pytest.mark.parametrize(("family", "kind"), LAUNCHES)
def test_launches_per_layer_stay_in_their_budget(family, kind, model_folder):
    counted = by_layer(str(model_folder(family)), kind)
    for name, count, budget in zip(
        ("decode", "forward", "backward"), counted, LAUNCHES[family, kind], strict=True
    ):
        assert 0.9 * budget < count < 1.1 * budget, f"{name}: {count} launches a layer, stored are {budget}"
