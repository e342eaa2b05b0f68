"""The estimated duration of a step: operations counted against the model's own, the formulas, and the config."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlm_sapo.config import schema as cfg
from vlm_sapo.config.load import load
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import GroupSlice, choose
from vlm_sapo.tools.plan import memory, passes, roofline, simulate
from vlm_sapo.tools.plan.cards import CARDS, GB, card_of, find_card
from vlm_sapo.tools.plan.command import parse_gpus, plan_command
from vlm_sapo.tools.plan.duration import Setting, StepEstimator, StepTime
from vlm_sapo.tools.plan.estimate import batch_spec, model_spec
from vlm_sapo.tools.plan.operations import (
    GroupTokens,
    ModelWork,
    forward_operations,
    layer_operations,
    model_work,
)
from vlm_sapo.tools.plan.roofline import Shards, Training
from vlm_sapo.tools.plan.simulate import ModelSpec

H100 = find_card("h100")
QWEN2_5_VL_3B = ModelWork(
    hidden=2048,
    layers=36,
    attention_layers=36,
    query_width=2048,
    key_width=256,
    feed_forward=11008,
    active=2_774_532_096,
    language=2_774_771_712,
    head=151_936 * 2048,
    vocabulary=151_936,
    vision=640_645_120,
    vision_attention=5120,
    attended=None,
    patches_per_token=4,
    total=3_754_622_976,
)
FULL = Training(autocast=True, adapters=False, checkpointing=True, vision=False, fused_head=False)
GROUP = GroupTokens(prompt=1300, image=1000, response=350, group=8)


@pytest.mark.parametrize(
    "family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "gemma4", "smolvlm", "lfm2_vl"]
)
def test_operations_are_those_of_the_models_own_pass(family, model_folder):
    path = str(model_folder(family))
    vlm = load_vlm(path)
    spec = ModelSpec(path, "float32", False, False)
    with simulate.Simulation():
        prompt = simulate.synthetic_prompt(vlm, 40, 16)
        responses = tuple(simulate.synthetic_response(prompt, 12) for _ in range(3))
    object.__setattr__(prompt, "pixels", torch.zeros(prompt.pixels.shape))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Pass(vlm)(choose("shared", shares_prefix=True).inputs([GroupSlice(prompt, responses)]))
    image = int((prompt.ids == vlm.model.config.image_token_id).sum())
    work, group = model_work(spec), GroupTokens(40, image, 12, 3)
    attention = 4 * work.attention_layers * work.query_width * group.pairs
    layers = list(vlm.language.layers)
    assert work.language == sum(item.numel() for layer in layers for item in layer.parameters())
    units = {item.unit for item in passes.parameters(spec)} - {"root", memory.UNSHARDED}
    assert len(units) == len(layers) + len(vlm.family.vision_blocks(vlm.model))
    counted = counter.get_total_flops()
    # SDPA computes both halves of its causal square, and windows of the tower are left out here
    assert counted == pytest.approx(forward_operations(work, group, vision=True) + attention, rel=0.1)


def test_a_token_of_a_mixture_meets_its_own_experts(model_folder):
    path = str(model_folder("qwen3_vl_moe"))
    text = simulate.read_config(path).get_text_config()
    work = model_work(ModelSpec(path, "float32", False, False))
    experts = text.num_hidden_layers * text.num_experts * 3 * text.moe_intermediate_size * text.hidden_size
    left_out = 1 - text.num_experts_per_tok / text.num_experts
    vectors = work.language - work.active - experts * left_out
    assert 0 <= vectors < 0.05 * work.language
    assert work.feed_forward == text.num_experts_per_tok * text.moe_intermediate_size


def test_operations_follow_the_row_that_shares_its_prompt():
    assert GROUP.row == 1300 + 8 * 350
    assert GROUP.pairs == 1300**2 / 2 + 8 * (350 * 1300 + 350**2 / 2)
    alone = GroupTokens(1300, 1000, 350, 1)
    assert 8 * alone.row / GROUP.row == pytest.approx(3.22, rel=0.01)


def test_an_update_by_the_roofline():
    """A micro-batch of 16,384 tokens of Qwen2.5-VL-3B on an H100: products 3.9 ms, elementwise 2.4 ms and
    attention .5 ms a layer, forward; 1.1 s in all."""
    groups = 16384 / GROUP.row
    products = roofline.product_seconds(layer_operations(QWEN2_5_VL_3B, 16384), H100) / 36
    moved = roofline.elementwise_bytes(QWEN2_5_VL_3B, 16384, autocast=True)
    assert products == pytest.approx(3.9e-3, rel=0.03)
    assert roofline.moving_seconds(moved, H100) / 36 == pytest.approx(2.4e-3, rel=0.05)
    seconds = groups * roofline.update_seconds(QWEN2_5_VL_3B, GROUP, FULL, H100)
    assert seconds == pytest.approx(1.1, rel=0.08)


@pytest.mark.parametrize(
    "change",
    [{"fused_layers": True}, {"fused_head": True}, {"adapters": True}, {"checkpointing": False}],
)
def test_what_makes_an_update_shorter(change):
    shorter = Training(**(vars(FULL) | change))
    whole = roofline.update_seconds(QWEN2_5_VL_3B, GROUP, FULL, H100)
    assert roofline.update_seconds(QWEN2_5_VL_3B, GROUP, shorter, H100) < 0.95 * whole
    vision = Training(**(vars(FULL) | {"vision": True}))
    assert roofline.update_seconds(QWEN2_5_VL_3B, GROUP, vision, H100) > whole


def test_sampling_with_hf_is_bound_by_launches_and_takes_as_long_as_its_batches():
    def seconds(groups: int, per_batch: int, kind: str = "autocast", longest: float = 1024) -> float:
        return roofline.hf_seconds(
            QWEN2_5_VL_3B, GROUP, H100, groups=groups, per_batch=per_batch, longest=longest, kind=kind
        )

    assert seconds(64, 16) == pytest.approx(4 * seconds(16, 16), rel=0.01)
    assert seconds(16, 16) == pytest.approx(25, rel=0.05)
    assert seconds(16, 16, kind="lora") > 1.4 * seconds(16, 16)
    assert seconds(16, 16, longest=512) == pytest.approx(seconds(16, 16) / 2, rel=0.03)
    assert seconds(4096, 4096) > 3 * seconds(16, 16)  # keys outweigh the launches


def test_sampling_with_vllm_reads_weights_once_a_token_and_keys_of_every_response():
    def seconds(groups: float, longest: float = 1024) -> float:
        return roofline.vllm_seconds(QWEN2_5_VL_3B, GROUP, H100, groups=groups, longest=longest)

    weights = 2 * QWEN2_5_VL_3B.total / (roofline.BANDWIDTH_SHARE * H100.bandwidth)
    least = 1024 * (weights + roofline.VLLM_STEP_SECONDS)
    assert least < seconds(1) < 1.1 * least
    assert seconds(64) - seconds(32) == pytest.approx(32 * (seconds(33) - seconds(32)))


def test_shards_are_gathered_twice_and_reduced_once():
    shards = Shards(8, 450e9)
    seconds = roofline.collective_seconds(QWEN2_5_VL_3B, shards)
    assert seconds == pytest.approx(8 * QWEN2_5_VL_3B.total * 7 / 8 / (0.7 * 450e9))
    assert roofline.collective_seconds(QWEN2_5_VL_3B, Shards(1, 450e9)) == 0
    assert roofline.collective_seconds(QWEN2_5_VL_3B, Shards(8, 450e9, reduce_bytes=2)) == pytest.approx(
        seconds * 6 / 8
    )
    assert roofline.gather_seconds(QWEN2_5_VL_3B.total, shards) == pytest.approx(seconds / 4)


def test_cards():
    assert len({card.name for card in CARDS}) == len(CARDS)
    assert [card_of(size * GB).name for size in (16, 24, 32, 48, 80, 96, 141)] == [
        "RTX 4080",
        "RTX 4090",
        "RTX 5090",
        "L40S",
        "H100",
        "H100",
        "H200",
    ]
    with pytest.raises(ValueError, match=re.escape("--card (H1000) must be one of RTX 4080")):
        find_card("H1000")


@pytest.fixture
def tiny(model_folder, tmp_path):
    """`tiny(*overrides)`: a config with a tiny model."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"model: {{path: {model_folder()}}}\n"
        "data: {source: rows.jsonl, max_prompt_tokens: 64}\n"
        "rollout: {max_tokens: 16, group: 4, prompts_per_batch: 4}\n"
        "reward: [{name: math}]\n"
        "train: {steps: 3, prompts_per_step: 8, minibatches: 4, tokens_per_microbatch: 512}\n"
    )
    return lambda *overrides: load(cfg.TrainConfig, str(path), overrides)


def step(config: cfg.TrainConfig, gpus: str = "1x80GB", card: str = "H100") -> StepTime:
    return estimator(config, gpus, card).estimate()


def estimator(config: cfg.TrainConfig, gpus: str = "1x80GB", card: str = "H100") -> StepEstimator:
    sharded = config.train.shard != 1
    spec, batch = model_spec(config, sharded=sharded), batch_spec(config)
    return StepEstimator(config, spec, batch, gpus=parse_gpus(gpus), card=find_card(card))


def test_a_step_is_the_sum_of_its_parts_and_overlaps_ahead():
    parts = {"data": 1.0, "sampling": 9.0, "reward": 2.0, "old_logprobs": 3.0, "update": 6.0}
    assert StepTime(**parts, sync=0.5, rest=1.0).total == 22.5
    assert StepTime(**parts, sync=0.5, rest=1.0, ahead=True).total == 13.5


def test_what_a_config_changes(tiny):
    plain = step(tiny())
    assert plain.sync == plain.old_logprobs == 0  # float32, the policy's own modules
    assert step(tiny("train.old_logprobs=recompute")).old_logprobs > 0
    assert step(tiny("train.precision=bf16")).old_logprobs > 0
    assert step(tiny("algo.kl=0.1")).old_logprobs > 0
    assert step(tiny("rollout.prompts_per_batch=8")).sampling < 0.6 * plain.sampling
    assert step(tiny("train.layout=plain")).update > plain.update
    assert step(tiny("model.freeze=[vision]")).update < plain.update
    vllm = step(tiny("rollout.engine=vllm"))
    assert vllm.sampling < plain.sampling and vllm.sync > 0
    kinds = ("folder", "nccl")
    servers = [tiny(f"rollout.engine={{type: vllm_server, weights: {kind}}}") for kind in kinds]
    assert step(servers[0]).sync > step(servers[1]).sync > 0
    engine = "rollout.engine={{type: vllm_server, weights: {}, servers: ['http://127.0.0.1:8000', 'http://127.0.0.1:8001']}}"
    assert step(tiny(engine.format("nccl"))).sync == pytest.approx(2 * step(servers[1]).sync, rel=1e-6)
    adapters = (engine.format("folder"), "model.lora={rank: 4}", "train.precision=bf16")
    assert step(tiny(*adapters)).sync < 0.2 * step(tiny(*adapters, "rollout.engine.adapter=merged")).sync
    assert step(tiny(), card="RTX 4090").update > plain.update
    assert step(tiny(), gpus="2x80GB").sampling < plain.sampling


def test_sharding_makes_micro_batches_wait_for_each_other(tiny):
    def exchanged(gpus: str) -> tuple[Setting, float]:
        estimate = estimator(tiny("train.shard=all"), gpus)
        return estimate.setting, estimate.update()

    (near, inside), (far, across) = exchanged("2x80GB"), exchanged("2x1x80GB")
    assert near.shards == Shards(2, H100.link) and far.shards == Shards(2, roofline.NETWORK)
    assert across > inside
    assert near.imbalance > 1 and estimator(tiny()).setting.imbalance == 1


def test_the_plan_prints_the_estimate_with_its_card(tiny, tmp_path, capsys):
    path = str(tmp_path / "tiny.yaml")
    plan_command(path, [], parse_gpus("1x80GB"), None)
    assert (
        "estimate, not measured: H100 (--card), prompts of 42 and responses of 6" in capsys.readouterr().out
    )
    plan_command(path, ["rollout.engine=vllm"], parse_gpus("1x80GB"), None, card=find_card("A100"))
    out = capsys.readouterr().out
    assert "not measured: A100" in out and re.search(r"sync +\d", out)
