"""The same contract for every engine: hf, vllm in this process, and vllm serve over HTTP.

hf runs with the default tests; the others where vLLM is installed (`make test-vllm`).
"""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from contextlib import closing

import httpx2 as httpx
import pytest
import torch
from PIL import Image

from tests.conftest import CORPUS, ROOT, example
from vlm_sapo.config.rollout import RolloutConfig
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.packing import GroupSlice, Plain
from vlm_sapo.rollout.build import EngineNeeds, build_engine
from vlm_sapo.rollout.engine import RolloutError, as_contexts
from vlm_sapo.rollout.environment import environment_turn
from vlm_sapo.tools.new_model import Shape, new_model
from vlm_sapo.types import Context, Response, Sampling

SHAPE = Shape(hidden=64, layers=2, vision_layers=2, heads=2, head_dim=32, patch=16, max_pixels=256 * 256)
LONGEST = 512
SAMPLING = Sampling(4, 12, 0.8, seed=5)
TRAINED = ROOT / "data/shapes/cold_start"
SETTINGS = [
    "hf-qwen3_vl",
    "hf-qwen2_5_vl",
    "hf-trained",
    *(
        pytest.param(name, marks=pytest.mark.vllm)
        for name in (
            "vllm-qwen3_vl",
            "vllm-qwen2_5_vl",
            "vllm-qwen2_vl",
            "vllm-glm4v",
            "vllm-internvl",
            "vllm-trained",
            "vllm_server-qwen2_5_vl",
            "vllm_server-trained",
        )
    ),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(path, port: int, log):
    """`vlm-sapo serve` on loopback, as a user starts it."""
    config = log.with_suffix(".yaml")
    config.write_text(
        f"model: {{path: {path}}}\ndata: {{source: data/shapes.py:rows, max_prompt_tokens: {LONGEST - 64}}}\n"
        "rollout: {max_tokens: 64}\nreward: auto\ntrain: {steps: 1}\n"
    )
    command = [sys.executable, "-m", "vlm_sapo.cli", "serve", str(config), "--port", str(port)]
    command += ["--extra", "--max-num-seqs 64"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    process = subprocess.Popen(
        command, stdout=log.open("w"), stderr=subprocess.STDOUT, cwd=ROOT, env=environment
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(1)
    stop(process)
    raise AssertionError(f"no server: {log.read_text()[-3000:]}")


def stop(process) -> None:
    process.terminate()
    process.wait(60)


@dataclasses.dataclass
class Setting:
    name: str
    folder: object
    vlm: object
    encoder: Encoder
    engine: object

    def sample(self, counts=(1, 2, 0), **options):
        prompts = [self.encoder(example(number, images=count)) for number, count in enumerate(counts)]
        sampling = dataclasses.replace(SAMPLING, **options)
        return prompts, self.engine.generate(as_contexts(prompts), sampling)

    @property
    def rounding(self):
        """What float32 may differ by; the trained model's logits are ten times as large as a fresh one's."""
        return 5e-5 if self.name.endswith("trained") else 1e-5

    @torch.no_grad()
    def differences(self, prompts, groups, temperature=0.8):
        """|engine - trainer| of every response token, by an own plain pass."""
        differences = []
        for prompt, responses in zip(prompts, groups, strict=True):
            inputs = Plain().inputs([GroupSlice(prompt, tuple(responses))])
            scores = Pass(self.vlm, temperature=temperature)(inputs)
            differences += [
                (row[: len(item.ids)] - item.logprobs).abs()
                for row, item in zip(scores.logprobs, responses, strict=True)
            ]
        return torch.cat(differences)


def needs_of(vlm, path, *, dtype="float32", **options) -> EngineNeeds:
    return EngineNeeds(
        vlm, str(path), longest=LONGEST, dtype=dtype, sequences_per_batch=32, warn=print, **options
    )


@pytest.fixture(scope="module", params=SETTINGS)
def setting(request, tmp_path_factory):
    kind, name = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    path = TRAINED
    if name != "trained":
        path = folder / "model"
        new_model(path, family=name, corpus=CORPUS, shape=SHAPE)
    vlm = load_vlm(str(path))
    process = None
    engine = {"type": kind}
    if kind == "vllm_server":
        port = free_port()
        process = start_server(path, port, folder / "server.log")
        engine |= {"servers": [f"http://127.0.0.1:{port}"], "timeout": 60, "patience": 5}
    if kind == "vllm":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
        engine |= {"options": {"max_num_seqs": 64}}
    built = build_engine(
        RolloutConfig.model_validate({"engine": engine}).engine,
        needs_of(vlm, path, folder=folder / "weights"),
    )
    try:
        with closing(built):
            built.sync(vlm)
            yield Setting(request.param, folder, vlm, Encoder(vlm), built)
    finally:
        if process is not None:
            stop(process)


@pytest.mark.vllm
def test_experts_are_saved_as_vllm_reads_them(tmp_path, monkeypatch):
    """New weights are not brought to it: vLLM's CPU kernels pack experts when they are loaded and never again."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    new_model(tmp_path / "new", family="qwen3_vl_moe", corpus=CORPUS, shape=SHAPE)
    load_vlm(str(tmp_path / "new")).save(tmp_path / "saved")
    vlm = load_vlm(str(tmp_path / "saved"))
    engine = build_engine(
        RolloutConfig.model_validate({"engine": "vllm"}).engine,
        needs_of(vlm, tmp_path / "saved"),
    )
    with closing(engine):
        setting = Setting("vllm-moe", tmp_path, vlm, Encoder(vlm), engine)
        prompts, groups = setting.sample()
        assert setting.differences(prompts, groups).max() < setting.rounding


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_linear_attention_in_bfloat16(tmp_path, monkeypatch, family):
    """All that vLLM's CPU kernels take: bfloat16 and heads of 128. Every expert is chosen, since rounding would
    flip a choice; new weights are not brought to it, since on some processors it packs convolutions, too."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    shape = dataclasses.replace(SHAPE, layers=4, head_dim=128)
    new_model(tmp_path / "new", family=family, corpus=CORPUS, shape=shape)
    vlm = load_vlm(str(tmp_path / "new"), dtype="bfloat16")
    vlm.model.config.text_config.num_experts_per_tok = 4
    vlm.save(tmp_path / "saved")
    vlm = load_vlm(str(tmp_path / "saved"), dtype="bfloat16")
    options = {"max_num_seqs": 64, "enable_prefix_caching": False}
    engine = build_engine(
        RolloutConfig.model_validate({"engine": {"type": "vllm", "options": options}}).engine,
        needs_of(vlm, tmp_path / "saved", dtype="bfloat16"),
    )
    with closing(engine):
        setting = Setting(f"vllm-{family}", tmp_path, vlm, Encoder(vlm), engine)
        differences = setting.differences(*setting.sample())
    assert differences.mean() < 0.03 and differences.max() < 0.2


@pytest.mark.vllm
def test_vllm_without_its_newer_runner_cannot_report_experts(tmp_path, monkeypatch):
    """On a CPU it has only the older one."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    new_model(tmp_path / "new", family="qwen3_vl_moe", corpus=CORPUS, shape=SHAPE)
    with pytest.raises(RolloutError, match="algo.replay=r2 .*Model Runner V2"):
        build_engine(
            RolloutConfig.model_validate({"engine": "vllm"}).engine,
            needs_of(load_vlm(str(tmp_path / "new")), tmp_path / "new", experts=True),
        )


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_adapters_are_served_beside_the_base(tmp_path, monkeypatch, family):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    new_model(tmp_path / "base", family=family, corpus=CORPUS, shape=SHAPE)
    vlm = load_vlm(str(tmp_path / "base"), lora=Adapters("base", rank=4))
    options = {"adapter": "native", "options": {"max_num_seqs": 64}}
    engine = build_engine(
        RolloutConfig.model_validate({"engine": {"type": "vllm"} | options}).engine,
        needs_of(vlm, tmp_path / "base", max_pixels=SHAPE.max_pixels // 2),
    )
    generator = torch.Generator().manual_seed(0)
    with closing(engine):
        setting, seen = Setting(f"vllm-{family}", tmp_path, vlm, Encoder(vlm), engine), []
        for _ in range(3):
            engine.sync(vlm)
            prompts, groups = setting.sample()
            assert setting.differences(prompts, groups).max() < setting.rounding
            seen.append(ids_of(groups))
            with torch.no_grad():
                for layer in adapters.layers(vlm.model).values():
                    factor = layer.lora_B["default"].weight
                    factor += 0.05 * torch.randn(factor.shape, generator=generator)
            vlm.version += 1
            assert setting.differences(prompts, groups).max() > 100 * setting.rounding
    assert seen[0] != seen[1] != seen[2]


def ids_of(groups):
    return [item.ids.tolist() for responses in groups for item in responses]


def test_each_prompt_gets_its_group_with_the_trainers_logprobs(setting):
    prompts, groups = setting.sample()
    assert [len(responses) for responses in groups] == [4, 4, 4]
    assert all(item.logprobs.dtype == torch.float32 for responses in groups for item in responses)
    assert setting.differences(prompts, groups).max() < setting.rounding


def test_stop_reasons_and_lengths(setting):
    _, groups = setting.sample(temperature=2.0, group=16)
    finishes = set()
    for item in (item for responses in groups for item in responses):
        ids = item.ids.tolist()
        finishes.add(item.finish)
        assert len(ids) == len(item.logprobs) <= 12
        assert not set(ids[:-1]) & set(setting.vlm.stops)
        assert item.finish == ("stop" if ids[-1] in setting.vlm.stops else "length")
        assert item.finish == "stop" or len(ids) == 12
        assert item.text == setting.vlm.tokenizer.decode(ids, skip_special_tokens=True)
    assert finishes == {"stop", "length"} or setting.name.endswith("trained")


def test_responses_repeat_by_seed_and_differ_within_and_between_groups(setting):
    _, once = setting.sample(temperature=1.5)
    _, again = setting.sample(temperature=1.5)
    _, other = setting.sample(temperature=1.5, seed=6)
    assert ids_of(once) == ids_of(again) != ids_of(other)
    same = [setting.encoder(example(0))] * 3
    groups = setting.engine.generate(as_contexts(same), Sampling(4, 12, 1.5, seed=5))
    sampled = [tuple(ids) for ids in ids_of(groups)]
    assert len(set(sampled)) > 8, "neighbouring prompts share their random numbers"


def test_slots_decide_the_random_numbers_and_not_the_order(setting):
    prompts, groups = setting.sample(slots=(7, 8, 9), temperature=1.5)
    alone = setting.engine.generate(as_contexts(prompts[2:]), Sampling(4, 12, 1.5, seed=5, slots=(9,)))
    assert ids_of(alone) == ids_of(groups[2:])


def test_a_group_is_reported_once_as_it_is_returned(setting):
    reports: list[tuple[int, list]] = []

    def context(index: int) -> Context:
        prompt = setting.encoder(example(index, images=index))
        return Context(prompt, report=lambda responses: reports.append((index, responses)))

    groups = setting.engine.generate(list(map(context, range(3))), SAMPLING)
    assert sorted(index for index, _ in reports) == [0, 1, 2]
    for index, responses in reports:
        assert all(one is other for one, other in zip(responses, groups[index], strict=True))


def test_responses_so_far_are_continued(setting):
    """Those of one prompt, beside a prompt without any."""
    prompts, groups = setting.sample(counts=(1, 2), temperature=1.5, group=4)
    first = prompts[0]
    so_far = {}
    for branch, item in enumerate(groups[0]):
        length = min(branch + 1, len(item.ids) - 1)
        if length:
            ids, logprobs = item.ids[:length], item.logprobs[:length]
            so_far[branch] = Response.sampled(first.positions, ids, logprobs, text="", finish="length")
    contexts = [Context(first, tuple(so_far.values()), tuple(so_far)), Context(prompts[1])]
    continued = setting.engine.generate(contexts, dataclasses.replace(SAMPLING, temperature=1.5))
    assert so_far and [len(responses) for responses in continued] == [len(so_far), 4]
    for before, item in zip(so_far.values(), continued[0], strict=True):
        start = len(before.ids)
        assert start < len(item.ids) <= 12 and torch.equal(item.ids[:start], before.ids)
        assert item.finish == ("stop" if int(item.ids[-1]) in setting.vlm.stops else "length")
        assert item.text == setting.vlm.tokenizer.decode(item.ids, skip_special_tokens=True)
    assert setting.differences(prompts, continued, temperature=1.5).max() < setting.rounding
    if setting.engine.shares_weights:
        expected = [groups[0][branch].ids.tolist() for branch in so_far]
        assert ids_of(continued[:1]) == expected


def test_images_behind_a_turn_are_seen_by_the_next(setting):
    """Of other sizes and numbers in each response; each turn has its own limit."""
    sampling = dataclasses.replace(SAMPLING, max_tokens=220, max_turn_tokens=6, temperature=1.5)
    prompts = [setting.encoder(example(number, images=number)) for number in range(2)]
    groups = setting.engine.generate(as_contexts(prompts), sampling)
    assert all(len(item.ids) <= 6 for items in groups for item in items)
    contexts = []
    for index, (prompt, items) in enumerate(zip(prompts, groups, strict=True)):
        asked = []
        for number, item in enumerate(items):
            sizes = [(40 + 30 * number, 50 + 20 * index), (90, 60)][: 1 + number % 2]
            images = [Image.new("RGB", size, (40 * number, 90, 7)) for size in sizes]
            asked.append(item.continued(environment_turn(item, setting.encoder.answer([("Look.", images)]))))
        contexts.append(Context(prompt, tuple(asked), tuple(range(len(asked)))))
    continued = setting.engine.generate(contexts, sampling)
    for context, items in zip(contexts, continued, strict=True):
        for before, item in zip(context.responses, items, strict=True):
            length = len(before.ids)
            assert length < len(item.ids) <= length + 6 and torch.equal(item.ids[:length], before.ids)
            assert item.images == before.images and not set(item.ids[length:].tolist()) & set(
                setting.vlm.banned
            )
    assert setting.differences(prompts, continued, temperature=1.5).max() < setting.rounding


def test_the_coldest_sample_is_greedy(setting):
    _, groups = setting.sample(temperature=0.0)
    for responses in groups:
        assert len(responses) == 4 and len({tuple(item.ids.tolist()) for item in responses}) == 1
        assert not responses[0].logprobs.any()


def test_evaluation_may_truncate_the_distribution(setting):
    _, cold = setting.sample(temperature=0.0)
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        _, groups = setting.sample(temperature=1.5, **cut)
        assert ids_of(groups) == ids_of(cold), cut


def test_new_weights_with_the_same_images(setting):
    """Images and prompts are the same, so anything cached from the old weights would show."""
    before = ids_of(setting.sample()[1])
    saved = {name: parameter.detach().clone() for name, parameter in setting.vlm.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        with torch.no_grad():
            for parameter in setting.vlm.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        setting.vlm.version += 1
        setting.engine.sync(setting.vlm)
        prompts, groups = setting.sample()
        assert setting.differences(prompts, groups).max() < setting.rounding
        assert ids_of(groups) != before
    with torch.no_grad():
        for name, parameter in setting.vlm.named_parameters():
            parameter.copy_(saved[name])
    setting.vlm.version += 1
    setting.engine.sync(setting.vlm)
    assert ids_of(setting.sample()[1]) == before


def test_vision_tokens_are_never_sampled_and_cost_no_mass(setting):
    """Makes the banned tokens the likeliest by far."""
    head = setting.vlm.model.lm_head.weight
    saved = head.detach().clone()
    with torch.no_grad():
        head[setting.vlm.banned] = 20 * head[10:11]
    setting.vlm.version += 1
    setting.engine.sync(setting.vlm)
    prompts, groups = setting.sample(group=8)
    unbanned, setting.vlm.banned = setting.vlm.banned, []
    mass = setting.differences(prompts, groups).max()
    setting.vlm.banned = unbanned
    assert mass > 0.5, "the bans make no difference here, so this would test nothing"
    assert not set(sum(ids_of(groups), [])) & set(setting.vlm.banned)
    assert setting.differences(prompts, groups).max() < 1e-4
    with torch.no_grad():
        head.copy_(saved)
    setting.vlm.version += 1
    setting.engine.sync(setting.vlm)
