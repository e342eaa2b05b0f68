"""Every family on a pretend GPU: what a GPU would refuse, wait for and copy, in forward passes and sampling."""

from contextlib import contextmanager

import pytest
import torch

from tests.conftest import CORPUS, FAMILIES, example, group_slice
from tests.models.flash_reference import FlashReference
from tests.pretend_gpu import PretendTensor, pretend_gpu
from vlm_sapo.models import flash
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.packing import choose
from vlm_sapo.rollout.engine import as_contexts
from vlm_sapo.rollout.hf import GPU_STRIDE, HfEngine
from vlm_sapo.tools.new_model import Shape, new_model
from vlm_sapo.types import Sampling

SHAPE = Shape(hidden=64, layers=4, vision_layers=2, heads=2, head_dim=32)
PRECISIONS = ("bf16", "autocast", "lora")
WAITS_OF_TOWER = {
    "qwen2_vl": 6,
    "qwen2_5_vl": 14,
    "qwen3_vl": 12,
    "qwen3_vl_moe": 12,
    "qwen3_5": 12,
    "qwen3_5_moe": 12,
    "glm4v": 5,
    "internvl": 0,
    "gemma4": 5,
    "smolvlm": 9,
    "lfm2_vl": 6,
}
"""Most waits of a pass that encodes images: their sizes are read, and lists of patches made from them."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            new_model(made[family], family=family, corpus=CORPUS, shape=SHAPE)
        return str(made[family])

    return make


def load(path, precision):
    lora = Adapters(base="x", rank=4, alpha=8.0) if precision == "lora" else None
    dtype = "float32" if precision == "autocast" else "bfloat16"
    return load_vlm(path, dtype=dtype, freeze=["vision", "merger"], lora=lora)


@contextmanager
def autocast(precision, device):
    """torch.autocast, also for a device that isn't there, which torch would leave out with a warning."""
    enabled = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, precision != "bf16")
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, enabled[0])
        torch.set_autocast_dtype(device, enabled[1])


def move(vlm, gpu):
    gpu.move(vlm.model)
    vlm.vision.device = torch.device("cuda")


def groups_of(vlm):
    encoder = Encoder(vlm, min_pixels=32 * 32, max_pixels=128 * 128)
    prompts = [encoder(example(1, images=2, problem="<image>Compare<image>these.")), encoder(example(2))]
    return [
        group_slice(prompts[0], [[103, 104, 105], [103] * 7]),
        group_slice(prompts[1], [[103, 104], [103] * 4, [106]]),
    ]


@pytest.fixture
def reference(monkeypatch):
    replaced = FlashReference()
    replaced.install(monkeypatch)

    def on_host(call, tensors):
        """The pretend GPU's tensors are computed on the CPU, and what comes back is on the GPU again."""
        assert all(isinstance(tensor, PretendTensor) for tensor in tensors)
        assert tensors[0].dtype in flash.HALF_PRECISION
        offsets = [
            flash.Lengths(lengths.offsets.values_on_host, lengths.longest)
            for lengths in (call.queries, call.keys)
        ]
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            results = replaced.forward(
                flash.Call(*offsets, call.causal, call.scale), tuple(item.values_on_host for item in tensors)
            )
            return tuple(PretendTensor(result) for result in results)

    monkeypatch.setattr(flash.Call, "forward", on_host)
    flash._capability.cache_clear()
    yield replaced
    flash._capability.cache_clear()


def slow_but(*quick):
    """All families and precisions, those that aren't `quick` in the slow suite."""
    pairs = [(family, precision) for family in FAMILIES for precision in PRECISIONS]
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]


@pytest.mark.parametrize(
    ("family", "precision"),
    slow_but(*((family, "bf16") for family in FAMILIES), ("qwen3_vl", "autocast"), ("qwen3_vl", "lora")),
)
def test_a_pass_of_every_family(folder, reference, monkeypatch, family, precision):
    vlm = load(folder(family), precision)
    groups, layout = groups_of(vlm), choose("shared", shares_prefix=vlm.shares_prefix)
    inputs = layout.inputs(groups)
    with torch.no_grad(), autocast(precision, "cpu"):
        wanted = Pass(vlm)(inputs)
    vlm.vision.cached.clear()
    with pretend_gpu(monkeypatch) as gpu, autocast(precision, "cuda"):
        move(vlm, gpu)
        moved = inputs.to(vlm.device)
        gpu.forget()
        found = Pass(vlm)(moved)
        first, encoding = gpu.copies, gpu.waits.total()
        calls = list(reference.called)
        gpu.forget()
        Pass(vlm)(moved)
    difference = (found.logprobs.values_on_host - wanted.logprobs).abs()
    limit = 0.5 if "moe" in family else 0.1  # by rounding, a token may go to another expert
    assert difference.max() < limit and difference.mean() < limit / 10, difference
    assert encoding <= WAITS_OF_TOWER[family], gpu.waits
    layers = kinds_of(vlm).count("full_attention")
    assert [call for call in calls if call[0]] == [(True, 7)] * layers  # prompts and branches by themselves
    assert calls.count((False, 2)) >= layers  # the branches of two prompts to them
    assert not gpu.copies, gpu.copies  # of cached images: nothing is copied in a pass
    assert not gpu.waits.total(), gpu.waits
    inside_layers = ("models/attention.py", "models/flash.py", "models/vlm.py")
    assert not [copy for copy in first if any(file in copy.where for file in inside_layers)], first


def kinds_of(vlm) -> list[str]:
    text = vlm.model.config.get_text_config()
    return text.to_dict().get("layer_types") or ["full_attention"] * text.num_hidden_layers


@pytest.mark.parametrize(("family", "precision"), slow_but(("qwen3_vl", "bf16")))
def test_sampling_of_every_family(folder, reference, monkeypatch, family, precision):
    vlm = load(folder(family), precision)
    vlm.stops = []  # where a branch ends, the others are copied
    contexts = as_contexts([group.prompt for group in groups_of(vlm)])
    with pretend_gpu(monkeypatch) as gpu:
        move(vlm, gpu)
        monkeypatch.setattr(HfEngine, "_decode", HfEngine._decode.__wrapped__)
        engine = HfEngine(vlm, prompts_per_batch=2, autocast=lambda: autocast(precision, "cuda"))
        waits = []
        for tokens in (GPU_STRIDE, GPU_STRIDE, 2 * GPU_STRIDE):  # the first one encodes the images
            gpu.forget()
            responses = engine.generate(contexts, Sampling(4, tokens, 1.0, 0))
            waits.append(gpu.waits.total())
    assert [len(group) for group in responses] == [4, 4]
    assert all(
        isinstance(item.ids, torch.Tensor) and not item.ids.is_cuda for group in responses for item in group
    )
    assert 0 <= waits[2] - waits[1] <= 3, gpu.waits  # of 16 more tokens


def test_upstream_still_waits_where_features_are_added(folder, monkeypatch):
    """Otherwise models/vlm.py's add_features is not needed any more."""
    vlm = load(folder("qwen3_vl"), "bf16")
    language = vlm.model.model.language_model
    with pretend_gpu(monkeypatch) as gpu:
        hidden, mask = torch.zeros(1, 6, 64, device="cuda"), torch.tensor([[False, True] * 3]).to("cuda")
        features = torch.ones(3, 64, device="cuda")
        theirs = type(language)._deepstack_process(language, hidden, mask, features)
        assert gpu.waits
        gpu.forget()
        ours = language._deepstack_process(hidden, mask.flatten().nonzero_static(size=3)[:, 0], features)
        assert not gpu.waits and torch.equal(ours.values_on_host, theirs.values_on_host)


def test_what_cuda_refuses_is_refused(monkeypatch):
    with pretend_gpu(monkeypatch) as gpu:
        rows = torch.ones(3, 2).to("cuda")
        with pytest.raises(RuntimeError, match="on one device"):
            rows + torch.ones(3, 2)
        assert (rows + 1).is_cuda and rows.sum().item() == 6
        rows[rows[:, 0] > 0]
        rows[[0, 2]]
    assert [reason for reason, _ in gpu.waits] == ["a value is read", "an index is a mask"]
    assert [copy.num_bytes for copy in gpu.copies] == [24, 16]
