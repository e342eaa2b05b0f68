"""The memory that a config takes on given GPUs: simulated passes, the sums, the nearest setting that fits."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from tests.conftest import CORPUS, FAMILIES, ROOT, SHARED, slow_but
from vlm_sapo.cli import app
from vlm_sapo.config import schema as cfg
from vlm_sapo.config.load import check_processes, load
from vlm_sapo.models.decoding import CACHE_BLOCK
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import choose
from vlm_sapo.plugins import shipped
from vlm_sapo.tools.new_model import Shape, new_model
from vlm_sapo.tools.plan import memory, passes, simulate
from vlm_sapo.tools.plan.command import parse_gpus, plan_command
from vlm_sapo.tools.plan.estimate import Estimator
from vlm_sapo.tools.plan.kernels import CHUNK, chunk_gated_delta_rule
from vlm_sapo.tools.plan.launch import launch_commands, quote
from vlm_sapo.tools.plan.memory import GB, UNSHARDED, Gpus, ParameterSpec
from vlm_sapo.tools.plan.nearest import Change, _generation_changes, _model_changes, nearest
from vlm_sapo.tools.plan.passes import BatchSpec
from vlm_sapo.tools.plan.shapes import published, published_shape
from vlm_sapo.tools.plan.simulate import MemoryCounter, ModelSpec
from vlm_sapo.tools.plan.write import config_text

CONFIGS = SHARED / "processors/configs"
PARAMETERS = {
    "Qwen2-VL-2B": 2_208_985_600,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-30B-A3B-Thinking": 31_070_754_032,
    "Qwen3.6-27B": 27_356_728_560,
}
real = pytest.mark.skipif(not CONFIGS.is_dir(), reason="needs the shapes of real models")
BATCH = BatchSpec(prompt=24, image=4, response=6, group=3, budget=60)


@pytest.fixture
def shape(tmp_path):
    """`shape(name)`: a folder with the config.json of a real model."""

    def make(name: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(CONFIGS / f"{name}.json", folder / "config.json")
        return str(folder)

    return make


@pytest.fixture
def tiny(model_folder, tmp_path):
    """A config with a tiny model, as a file."""
    path = tmp_path / "tiny.yaml"
    values = {
        "model": {"path": str(model_folder())},
        "data": {"source": "rows.jsonl", "max_prompt_tokens": 64},
        "rollout": {"max_tokens": 16, "group": 4, "prompts_per_batch": 4},
        "reward": [{"name": "math"}],
        "train": {"steps": 3, "prompts_per_step": 8, "tokens_per_microbatch": 512},
    }
    path.write_text(json.dumps(values))
    return str(path)


@pytest.mark.parametrize("name", published())
def test_the_shapes_of_published_models(name):
    """Known without a network, by the names of all their variants."""
    config = simulate.read_config(f"{name}-Instruct")
    assert config.to_dict() == simulate.read_config(f"{name}-Thinking").to_dict()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    known = {key.removesuffix("-Instruct").removesuffix("-Thinking"): PARAMETERS[key] for key in PARAMETERS}
    short = name.removeprefix("Qwen/")
    assert count == known[short] if short in known else name.startswith("Qwen/Qwen3.5-")


def test_a_model_that_is_not_listed_has_no_shape():
    assert published_shape("Qwen/Qwen3-VL-2B-Embedding") is None


@real
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name, shape):
    parameters = passes.parameters(ModelSpec(shape(name), "bfloat16", False, False))
    assert sum(item.numel for item in parameters) == PARAMETERS[name]
    assert memory.weight_bytes(parameters) == 2 * PARAMETERS[name]
    assert memory.gradient_bytes(parameters) == 2 * PARAMETERS[name]


@pytest.mark.parametrize(
    ("checkpointing", "frozen"), [(True, False), pytest.param(False, True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "family",
    slow_but("qwen3_vl", "qwen3_5", "internvl", "lfm2_vl", "plain layout", of=[*FAMILIES, "plain layout"]),
)
def test_a_simulated_pass_counts_the_memory_of_a_real_one(family, checkpointing, frozen, model_folder):
    freeze, layout = ["vision", "merger"] if frozen else [], "shared"
    if family == "plain layout":
        family, layout = "qwen3_vl", "plain"
    path = str(model_folder(family))
    spec = ModelSpec(path, "float32", False, checkpointing, tuple(freeze), layout=layout)
    mode, outline = passes.simulated_model(spec)
    with mode:
        groups = passes.micro_batch(outline, BATCH, layout)
    vlm = load_vlm(spec.path, gradient_checkpointing=checkpointing, freeze=freeze)
    for group in groups:
        object.__setattr__(group.prompt, "pixels", torch.zeros(group.prompt.pixels.shape))
    for parameter in vlm.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    if frozen:
        vlm.vision([group.prompt for group in groups])
    with MemoryCounter() as counted:
        scores = Pass(vlm)(choose(layout, shares_prefix=vlm.shares_prefix).inputs(groups))
        scores.logprobs.sum().backward()
    estimate = passes.training_memory(spec, BATCH)
    assert estimate.activations + estimate.logits == pytest.approx(counted.peak, rel=0.15)
    assert (estimate.features > 0) == frozen


def test_checkpointing_adapters_and_smaller_budgets_take_less(model_folder):
    base = ModelSpec(str(model_folder()), "float32", False, False)
    whole = passes.training_memory(base, BATCH).activations
    assert passes.training_memory(ModelSpec(base.path, "float32", False, True), BATCH).activations < whole
    assert passes.training_memory(base, BatchSpec(24, 4, 6, 3, 30)).activations < whole
    adapted = ModelSpec(base.path, "bfloat16", True, False, lora_rank=4, lora_parts=("language",))
    parameters = passes.parameters(adapted)
    assert {item.element_size for item in parameters if item.trained} == {4}
    assert 0 < memory.gradient_bytes(parameters) < 0.2 * memory.weight_bytes(parameters)
    quantized = passes.parameters(
        ModelSpec(base.path, "bfloat16", True, False, lora_rank=4, lora_parts=("language",), lora_bits=4)
    )
    saved = sum(item.numel for item in parameters if item.adapted) * (2 - memory.NF4_BYTES)
    assert memory.weight_bytes(parameters) - memory.weight_bytes(quantized) == pytest.approx(saved)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layers"), [("qwen3_vl", 9), ("qwen3_5", 12)])
def test_a_deep_models_memory_is_extrapolated_from_a_few_layers(family, layers, tmp_path, monkeypatch):
    shape = Shape(hidden=32, layers=layers, vision_layers=2, head_dim=8)
    new_model(tmp_path, family=family, corpus=CORPUS, shape=shape)
    for checkpointing in (True, False):
        spec = ModelSpec(str(tmp_path), "float32", False, checkpointing)
        few, generation = passes.training_memory(spec, BATCH), passes.generation_memory(spec, BATCH, 2)
        with monkeypatch.context() as context:
            context.setattr(simulate, "MEASURED_LAYERS", layers)
            context.setattr(simulate, "_period", len)
            passes.training_memory.cache_clear(), passes.generation_memory.cache_clear()
            assert vars(passes.training_memory(spec, BATCH)) == pytest.approx(vars(few), rel=1e-3)
            assert vars(passes.generation_memory(spec, BATCH, 2)) == pytest.approx(vars(generation), rel=1e-3)
        passes.training_memory.cache_clear(), passes.generation_memory.cache_clear()


def test_the_kv_cache_holds_all_tokens_of_a_generation_batch(model_folder):
    spec = ModelSpec(str(model_folder()), "float32", False, False)
    text = simulate.read_config(spec.path).get_text_config()
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    response = -(-(BATCH.response - 1) // CACHE_BLOCK) * CACHE_BLOCK
    tokens = 2 * (BATCH.prompt + BATCH.group * response)
    assert passes.generation_memory(spec, BATCH, 2).kv_cache == pytest.approx(tokens * token, rel=0.01)


@pytest.mark.slow
def test_generation_counts_the_larger_batch_of_training_and_evaluation(tiny):
    """A step of 8 prompts x 4 responses; an evaluation has more prompts in a batch of as many responses."""

    def rows(*overrides: str):
        config = load(cfg.TrainConfig, tiny, ["rollout.prompts_per_batch=null", *overrides])
        estimate = Estimator(config, Gpus(1, 1, GB)).estimate()
        return {row.name: row for row in estimate.rows}["KV cache"]

    small, large = rows("rollout.sequences_per_batch=8"), rows("rollout.sequences_per_batch=32")
    assert (small.note, large.note) == ("2 prompts x 4", "8 prompts x 4")
    assert large.generating == pytest.approx(4 * small.generating, rel=1e-3)
    assert rows("rollout.sequences_per_batch=1000").generating == large.generating
    evaluated = "eval.data={source: rows.jsonl}"
    single = rows("rollout.sequences_per_batch=32", evaluated)
    assert single.note == "32 prompts x 1" and single.generating > large.generating
    several = rows("rollout.sequences_per_batch=32", evaluated, "eval.samples=4")
    assert several.note == "8 prompts x 4" and several.generating == large.generating


def test_smaller_generation_batches_are_tried_in_the_configs_own_unit(tiny):
    def tried(*overrides: str):
        options = _generation_changes(load(cfg.TrainConfig, tiny, overrides))
        return [tuple(change.override for change in option) for option in options]

    assert tried() == [(), ("rollout.prompts_per_batch=2",), ("rollout.prompts_per_batch=1",)]
    counted = tried("rollout.prompts_per_batch=null", "rollout.sequences_per_batch=12")
    assert counted == [(), ("rollout.sequences_per_batch=6",), ("rollout.sequences_per_batch=4",)]


def test_bytes_of_weights_gradients_optimizer_and_all_gather():
    parameters = (
        ParameterSpec("root", 1000, 4, True),
        ParameterSpec("layers.0", 5000, 4, True),
        ParameterSpec("layers.1", 5000, 4, False),
        ParameterSpec(UNSHARDED, 2000, 4, False),
    )
    assert memory.weight_bytes(parameters) == 52_000
    assert memory.weight_bytes(parameters, 2) == 44_000 / 2 + 8000
    assert memory.gradient_bytes(parameters, 2) == 12_000
    assert memory.optimizer_bytes(parameters, "adamw") == 48_000
    half = [ParameterSpec("root", 1000, 2, True)]
    assert memory.optimizer_bytes(half, "adamw") == 8000  # moments of bfloat16 weights are float32
    assert memory.optimizer_bytes(parameters, "adamw_8bit") == 2 * (1000 * 4 + 5000 * (1 + 4 / 256))
    assert memory.all_gather_bytes(parameters, 2) == 2 * (1000 + 3 * 5000) + 6 * 1000 + 10 * 5000
    assert memory.all_gather_bytes(parameters, 2, 2) == 2 * (1000 + 4 * 5000) + 6 * 1000 + 10 * 5000
    assert memory.unsharded_bytes(parameters, 2) == 22_000
    assert memory.loading_bytes(parameters) == 52_000
    assert memory.loading_bytes(parameters, 2) == 20_000
    assert memory.loading_bytes(parameters, 2, offload=True) == 22_000 + 20_000
    assert memory.loading_bytes(parameters, offload=True) == 44_000 + 20_000


@pytest.mark.parametrize("text", ["80GB", "x80GB", "8x80", "0x80GB", "8x0GB", "2x4x8x80GB", "eight"])
def test_a_malformed_gpus_option_is_named(text):
    with pytest.raises(ValueError, match=re.escape(f"--gpus ({text}) must look like 1x24GB")):
        parse_gpus(text)


def test_gpus_are_parsed():
    assert parse_gpus("1x24GB") == Gpus(1, 1, 24 * GB)
    assert parse_gpus("4x8x141gb") == Gpus(4, 8, 141 * GB)


@pytest.mark.parametrize(
    ("override", "gpus", "sentence"),
    [
        ("run.seed=1", Gpus(1, 4, GB), "prompts_per_step / minibatches (2) must be divisible by"),
        ("train.shard=3", Gpus(1, 2, GB), "train.shard (3) must divide the number of processes (2"),
        ("train.optimizer=adamw_8bit", Gpus(1, 2, GB), "can't be sharded"),
    ],
)
def test_configs_that_train_refuses_are_not_planned(tiny, override, gpus, sentence):
    """With the same messages as `train`."""
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan_command(tiny, ["train.shard=all", override], gpus, None)


def without_cuda(monkeypatch) -> None:
    """What CUDA takes is more than a tiny model."""
    for name in ("CUDA_CONTEXT", "LIBRARY_WORKSPACE", "NCCL_COMMUNICATOR"):
        monkeypatch.setattr(memory, name, 0.0)


@pytest.mark.slow
def test_settings_that_train_refuses_are_not_recommended(tiny, monkeypatch):
    """8-bit moments would fit sooner, and can't be sharded."""
    without_cuda(monkeypatch)
    overrides = ["train.shard=all", "model.gradient_checkpointing=true", "rollout.prompts_per_batch=1"]
    overrides += ["data.max_prompt_tokens=12", "rollout.max_tokens=2", "rollout.group=2"]
    overrides += ["train.tokens_per_microbatch=14"]
    full, eight_bit = (
        Estimator(load(cfg.TrainConfig, tiny, [*overrides, *more]), Gpus(1, 2, GB)).estimate().peak
        for more in ([], ["train.optimizer=adamw_8bit"])
    )
    best = nearest(tiny, overrides, Gpus(1, 2, int(full + eight_bit) // 2))
    assert best.estimate.fits and check_processes(best.config, 2) == 2
    assert best.config == load(cfg.TrainConfig, tiny, [*overrides, *best.overrides])


def test_frozen_parts_are_not_recommended_adapters(tiny):
    """Nothing that the config refuses is tried."""
    with pytest.raises(ValueError, match="no setting of this config does"):
        nearest(tiny, ["model.freeze=[language]"], Gpus(1, 1, int(0.1 * GB)))


def test_a_reference_model_goes_to_host_memory_with_the_weights(tiny):
    without, with_reference = (
        Estimator(load(cfg.TrainConfig, tiny, ["train.offload=true", kl]), Gpus(1, 1, GB)).estimate()
        for kl in ("algo.kl=0", "algo.kl=0.1")
    )
    assert with_reference.peak == without.peak
    before, after = (
        dict(estimate.host)["weights, gradients and optimizer"] for estimate in (without, with_reference)
    )
    assert after - before == memory.weight_bytes(
        passes.parameters(ModelSpec(tiny_model(tiny), "float32", False, False))
    )


def tiny_model(tiny: str) -> str:
    return load(cfg.TrainConfig, tiny, []).model.path


def test_a_config_that_fits(tiny):
    assert plan_command(tiny, [], Gpus(1, 1, 2 * GB), None)


def test_all_weights_in_half_precision_come_before_adapters(tiny, monkeypatch):
    """On several GPUs sharded; the adapters' learning rate is set, unless the config's is larger."""
    gpus = Gpus(1, 4, 48 * GB)

    def order(*overrides: str) -> list[tuple[str, ...]]:
        config = load(cfg.TrainConfig, tiny, ["train.precision=bf16", *overrides])
        options = _model_changes(config, gpus)
        return [tuple(change.override for change in option) for option in options]

    options = order("rollout.engine=vllm")
    adapters = ("model.dtype=bfloat16", "model.lora={rank: 16}", "train.lr=1e-5")
    assert options.index(("train.shard=all", "model.dtype=bfloat16")) < options.index(adapters)
    four_bits = ("model.dtype=bfloat16", "model.lora={rank: 16, bits: 4}", "train.lr=1e-5")
    assert options.index(adapters) < options.index(four_bits) < options.index(("train.offload=true",))
    assert not any(option.count("model.dtype=bfloat16") > 1 for option in options)
    assert ("rollout.engine=hf",) in options and ("rollout.engine=hf",) not in order()
    assert (*adapters[:2], "train.lr=0.001") in order("train.lr=1e-3")


def test_a_mixtures_adapters_say_that_its_experts_get_none(model_folder, tiny):
    config = load(cfg.TrainConfig, tiny, [f"model.path={model_folder('qwen3_vl_moe')}"])
    reasons = {change.reason for option in _model_changes(config, Gpus(1, 1, GB)) for change in option}
    assert any("the experts get none" in reason for reason in reasons)


@pytest.mark.slow
def test_the_nearest_setting_fits_and_is_written(tiny, tmp_path, monkeypatch, capsys):
    without_cuda(monkeypatch)
    whole = Estimator(load(cfg.TrainConfig, tiny), Gpus(1, 1, GB)).estimate()
    assert whole.totals["training"] > whole.totals["generating"]
    gpus = Gpus(1, 1, int(whole.totals["training"]) - 1)
    best = nearest(tiny, [], gpus)
    assert best.overrides == ("train.tokens_per_microbatch=256",)
    assert best.estimate.fits and best.estimate.totals["training"] < whole.totals["training"]
    out = tmp_path / "new" / "fits.yaml"
    assert not plan_command(tiny, [], gpus, out)
    assert load(cfg.TrainConfig, str(out)) == load(cfg.TrainConfig, tiny, [*best.overrides, "run.name=fits"])
    assert f"vlm-sapo train {out}" in capsys.readouterr().out
    minimum = Estimator(load(cfg.TrainConfig, tiny), gpus).minimum
    best = nearest(tiny, [], Gpus(1, 1, int(0.9 * minimum)))
    assert best.estimate.fits
    assert any(change.startswith(("train.optimizer", "model.lora")) for change in best.overrides)
    with pytest.raises(ValueError, match="must hold one prompt of 64 tokens with one response of 16"):
        nearest(tiny, [], Gpus(1, 1, 1000))


def test_a_written_config_has_what_differs_and_why(tmp_path):
    """Recipes stay short, defaults are left out, and each change has its reason above it."""
    changes = [
        Change("model.dtype=bfloat16", "frozen weights"),
        Change("model.lora={rank: 16}", "adapters: all weights don't fit"),
        Change("train.lr=1e-5", "adapters need about ten times the rate"),
        Change("rollout.engine=hf", "vLLM doesn't fit"),
        Change("rollout.prompts_per_batch=4", "as memory allows"),
    ]
    overrides = ["data={recipe: geometry3k}"]
    text = config_text("geometry3k", overrides, changes, run_name="small", about=["1x24GB: it fits"])
    (tmp_path / "small.yaml").write_text(text)
    written = [change.override for change in changes]
    wanted = load(cfg.TrainConfig, "geometry3k", [*overrides, *written, "run.name=small"])
    assert load(cfg.TrainConfig, str(tmp_path / "small.yaml")) == wanted
    lines = text.splitlines()
    assert lines[:2] == ['# vlm-sapo plan geometry3k "data={recipe: geometry3k}"', "# 1x24GB: it fits"]
    assert len(lines) < 45
    assert lines[lines.index("  lora:") - 1] == "  # adapters: all weights don't fit"
    assert lines[lines.index("  engine: hf") - 1] == "  # vLLM doesn't fit"  # although it is the default
    assert "  recipe: geometry3k" in lines and "  freeze: [vision, merger]" in lines
    assert "  - {name: math, label: accuracy, weight: 0.9}" in lines
    assert not any("temperature" in line or "tau_pos" in line for line in lines)  # defaults


def test_a_file_of_the_readers_own_is_not_replaced(tiny, tmp_path):
    with pytest.raises(ValueError, match="must be a new file or one that plan wrote"):
        plan_command(tiny, [], Gpus(1, 1, 2 * GB), Path(tiny))
    with pytest.raises(ValueError, match="it is a folder"):
        plan_command(tiny, [], Gpus(1, 1, 2 * GB), tmp_path)
    with pytest.raises(ValueError, match="must be in a folder that can be written"):
        plan_command(tiny, [], Gpus(1, 1, 2 * GB), Path(tiny) / "new.yaml")
    out = tmp_path / "fits.yaml"
    for _ in range(2):
        assert plan_command(tiny, [], Gpus(1, 1, 2 * GB), out)
    assert load(cfg.TrainConfig, str(out)) == load(cfg.TrainConfig, tiny, ["run.name=fits"])


@pytest.mark.parametrize(
    ("gpus", "engine", "commands"),
    [
        ("1x80GB", "vllm", ["vlm-sapo train c.yaml"]),
        ("8x80GB", "vllm", ["torchrun --nproc-per-node 8 -m vlm_sapo train c.yaml"]),
        (
            "2x80GB",
            "{type: vllm_server, servers: [http://127.0.0.1:8000, http://127.0.0.1:8001]}",
            [
                "for GPU in 2 3; do CUDA_VISIBLE_DEVICES=$GPU vlm-sapo serve c.yaml --port $((7998 + GPU)) & done",
                "CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc-per-node 2 -m vlm_sapo train c.yaml",
            ],
        ),
        (
            "3x8x80GB",
            "{type: vllm_server, servers: [http://10.0.0.4:8000, http://10.0.0.5:8010]}",
            [
                "CUDA_VISIBLE_DEVICES=0 vlm-sapo serve c.yaml --host 10.0.0.4 --port 8000",
                "CUDA_VISIBLE_DEVICES=0 vlm-sapo serve c.yaml --host 10.0.0.5 --port 8010",
                "torchrun --nnodes 3 --nproc-per-node 8 --node-rank $NODE_RANK --master-addr $MASTER_ADDR "
                "--master-port 29500 -m vlm_sapo train c.yaml",
            ],
        ),
    ],
)
def test_the_commands_that_start_a_run(tiny, gpus, engine, commands):
    config = load(cfg.TrainConfig, tiny, [f"rollout.engine={engine}"])
    assert launch_commands(config, parse_gpus(gpus), ("c.yaml",)) == commands


def test_overrides_are_quoted_for_a_shell():
    words = ["geometry3k", "model.lora={rank: 16}", "rollout.engine={servers: ['http://a:1']}", 'a.b=c"d e']
    assert shlex.split(quote(words)) == words


def test_sharding_offload_and_engines(tiny):
    def estimate(*overrides: str, gpus: str = "2x1GB"):
        return Estimator(load(cfg.TrainConfig, tiny, overrides), parse_gpus(gpus)).estimate()

    replicated, shared = estimate(), estimate("train.shard=all")
    rows = {row.name: row for row in shared.rows}
    weights = {row.name: row for row in replicated.rows}["weights"]
    assert rows["weights"].training == pytest.approx(weights.training / 2)
    assert (
        rows["FSDP all-gather buffer"].training > 0
        and rows["unsharded model"].generating > rows["weights"].generating
    )
    offloaded = estimate("train.offload=true")
    assert "optimizer" not in {row.name for row in offloaded.rows}
    assert dict(offloaded.host)["weights, gradients and optimizer"] > 0
    kl = estimate("algo.kl=0.1")
    assert kl.peak - replicated.peak == pytest.approx(weights.training)
    engine = estimate("rollout.engine={type: vllm, gpu_memory: 0.5}", gpus="2x8GB")
    assert {row.name: row for row in engine.rows}["engine"].generating == 4 * GB
    assert dict(engine.host)["weights of the sleeping engine"] > 0
    shortage = estimate("rollout.engine={type: vllm, gpu_memory: 0.1}", gpus="2x8GB")
    assert not shortage.fits and "rollout.engine.gpu_memory (0.1)" in shortage.shortage


def rows_of(tiny, *overrides: str, gpus: str = "1x80GB"):
    estimate = Estimator(load(cfg.TrainConfig, tiny, overrides), parse_gpus(gpus)).estimate()
    return {row.name: row for row in estimate.rows}, dict(estimate.host), estimate


@pytest.mark.slow
def test_what_only_a_gpu_takes_has_rows_of_its_own(tiny):
    rows, _, estimate = rows_of(tiny)
    assert not {memory.COMMUNICATORS, memory.FLASH} & rows.keys()
    assert rows[memory.LOST].training == pytest.approx(
        memory.FRAGMENTATION * (rows["activations"].training + rows["logits"].training)
    )
    assert rows[memory.LOST].generating > 0
    outside = estimate.without(memory.OUTSIDE)["training"] + memory.CUDA_CONTEXT + rows[memory.LOST].training
    assert outside == pytest.approx(estimate.totals["training"])
    half, _, _ = rows_of(tiny, "train.precision=bf16")
    assert half[memory.FLASH].training > 0
    assert memory.FLASH not in rows_of(tiny, "train.precision=bf16", "train.layout=plain")[0]


def test_flash_attention_holds_float32_queries_and_keys_of_every_query_head():
    """Qwen3-VL-8B, one group of 1,500 and 8 times 1,024 tokens."""
    own = 4096 * (1500 + 8192) * (4 + 4)
    to_prompts = 4096 * (8192 * (4 + 8) + 1500 * 4)
    assert memory.flash_backward_bytes(4096, prompts=1500, responses=8192) == max(own, to_prompts)
    assert memory.flash_backward_bytes(4096, prompts=8000, responses=100) == 4096 * 8100 * 8


@pytest.mark.parametrize(
    ("gpus", "overrides", "groups"),
    [
        ("1x80GB", ["rollout.engine=vllm"], 0),
        ("2x80GB", [], 1),
        ("2x80GB", ["train.shard=all"], 2),
        ("2x80GB", ["train.shard=all", "rollout.engine=vllm"], 3),
        ("4x80GB", ["train.shard=2"], 3),
        ("1x80GB", ["rollout.engine={type: vllm_server, weights: nccl}"], 1),
    ],
)
def test_communicators_are_those_of_the_groups_that_exchange_tensors(tiny, gpus, overrides, groups):
    rows, _, _ = rows_of(tiny, "train.minibatches=2", *overrides, gpus=gpus)
    size = rows[memory.COMMUNICATORS].training if groups else 0
    assert size == groups * memory.NCCL_COMMUNICATOR and (memory.COMMUNICATORS in rows) == bool(groups)


def test_an_engines_share_is_of_what_the_card_has(tiny):
    """A card of 80 GB shows 85.0e9 bytes; of one that isn't known the name is all there is."""
    engine = "rollout.engine={type: vllm, gpu_memory: 0.4}"
    assert rows_of(tiny, engine)[0]["engine"].generating == pytest.approx(0.4 * 85.0e9)
    assert rows_of(tiny, engine, gpus="1x77GB")[0]["engine"].generating == pytest.approx(0.4 * 77e9)


def test_weights_go_to_an_engine_one_by_one(tiny):
    parameters = passes.parameters(ModelSpec(tiny_model(tiny), "float32", False, False))
    rows, host, _ = rows_of(tiny, "train.shard=all", "rollout.engine=vllm", gpus="2x80GB")
    tensor, layer = memory.largest_tensor(parameters), memory.largest_layer(parameters)
    assert rows["weights on their way"].sync == 4 * (2 * tensor + layer)
    assert "weights on their way" not in host
    _, host, _ = rows_of(tiny, "rollout.engine=vllm_server")
    assert host["weights on their way"] == 4 * tensor


def test_host_memory_while_loading_and_while_training(tiny):
    weights = memory.weight_bytes(passes.parameters(ModelSpec(tiny_model(tiny), "float32", False, False)))
    _, whole, estimate = rows_of(tiny, gpus="2x80GB")
    assert whole[memory.LOADING] == 2 * weights and whole[memory.PROCESSES] == 2 * memory.HOST_PROCESS
    rest = sum(size for name, size in whole.items() if name not in (memory.LOADING, memory.PROCESSES))
    assert estimate.host_total == 2 * memory.HOST_PROCESS + max(2 * weights, rest)
    _, sharded, _ = rows_of(tiny, "train.shard=all", gpus="2x80GB")
    assert 0 < sharded[memory.LOADING] < weights / 2  # shards go to the GPU as they are read
    _, background, _ = rows_of(tiny, "checkpoint.background=true")
    assert background["checkpoint"] == 3 * weights > 4 * whole["checkpoint"]
    nodes = rows_of(tiny, "train.shard=all", "checkpoint.background=true", gpus="2x1x80GB")[1]
    assert nodes["checkpoint"] == 3 * weights / 2
    assert "checkpoint" not in rows_of(tiny, "checkpoint.every=0")[1]


def test_the_exit_code_says_whether_a_config_fits(tiny):
    assert CliRunner().invoke(app, ["plan", tiny, "--gpus", "1x2GB"]).exit_code == 0
    assert CliRunner().invoke(app, ["plan", tiny, "--gpus", "1x1GB"]).exit_code == 1
    result = CliRunner().invoke(app, ["plan", tiny, "--gpus", "80GB"])
    assert isinstance(result.exception, ValueError)


def test_an_engine_over_more_gpus_than_there_are_is_refused(tiny):
    engine = "rollout.engine={type: vllm, tensor_parallel: 2}"
    with pytest.raises(ValueError, match=r"tensor_parallel \(2\) takes more GPUs than the one that trains"):
        plan_command(tiny, [engine], parse_gpus("1x80GB"), None)


def test_a_server_without_a_port_has_that_of_its_url(tiny):
    engine = "rollout.engine={type: vllm_server, servers: ['http://10.0.0.5']}"
    [serve, _] = launch_commands(load(cfg.TrainConfig, tiny, [engine]), parse_gpus("1x80GB"), ["c"])
    assert serve.endswith("--host 10.0.0.5 --port 80")


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ValueError, match="must be a folder with a config.json or a hub id"):
        simulate.read_config(str(tmp_path))


SHIPPED = sorted(
    path.stem
    for path in shipped("configs").glob("*.yaml")
    if path.stem not in ("quickstart", "cold_start", "shapes_hard", "zoom", "zoom_cold_start")
)
CARD = re.compile(r"_((?:\d+x)?\d+x\d+gb)$")


@real
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED])
def test_a_shipped_config_fits_on_its_gpus(name, shape):
    """And one of its micro-batches goes through the model forwards and backwards, on tensors without values."""
    config = load(cfg.TrainConfig, name)
    path = shape(config.model.path.split("/")[-1])
    config = load(cfg.TrainConfig, name, [f"model.path={path}"])
    card = CARD.search(name)
    gpus = parse_gpus(card.group(1) if card else "1x80GB")
    check_processes(config, gpus.count)
    estimate = Estimator(config, gpus).estimate()
    assert estimate.fits, estimate
    [row] = [line for line in (ROOT / "configs/README.md").read_text().splitlines() if f"[`{name}`]" in line]
    written = [float(number) for cell in row.split("|")[7:9] for number in cell.split("/")]
    sizes = (estimate.totals["training"], estimate.totals["generating"], estimate.host_total)
    assert written == pytest.approx([size / GB for size in sizes], abs=0.6)


def test_linear_attention_takes_what_a_gpus_kernel_does(model_folder):
    """It keeps normed queries and keys with their norms, values, gates, betas, a weight per token and place in
    its chunk, and the state; nothing of each chunk."""
    sequences, tokens, heads, size, wide, high = 2, 100, 2, 8, 4, 16
    with simulate.Simulation(), MemoryCounter() as counter:
        query, key = (
            torch.empty(sequences, tokens, heads, size, dtype=torch.bfloat16, requires_grad=True)
            for _ in "qk"
        )
        value = torch.empty(sequences, tokens, wide, high, dtype=torch.bfloat16, requires_grad=True)
        gate, beta = (torch.empty(sequences, tokens, wide, requires_grad=True) for _ in "gb")
        state = torch.empty(sequences, wide, size, high, requires_grad=True)
        before = counter.live
        output, after = chunk_gated_delta_rule(query, key, value, gate, beta, initial_state=state)
        saved = (
            2 * query.numel() * 2
            + 2 * query.numel() // size * 4
            + gate.numel() * 4
            + gate.numel() * CHUNK * 2
        )
        assert counter.live - before == saved + output.nbytes + after.nbytes
        (output.sum() + after.sum()).backward()
        for tensor in (query, key, value, gate, beta, state):
            assert tensor.grad.shape == tensor.shape
    path = str(model_folder("qwen3_5"))
    half, whole = (
        passes.training_memory(ModelSpec(path, dtype, False, False), BATCH)
        for dtype in ("bfloat16", "float32")
    )
    assert half.activations < 0.45 * whole.activations  # more than half the bytes of each element are gone
