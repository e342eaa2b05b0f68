"""Which configs fit a number of processes, and the messages for those that don't."""

import json

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.config.load import check_processes
from vlm_sapo.distributed import World
from vlm_sapo.models import device as devices
from vlm_sapo.training import folder, launch
from vlm_sapo.training.trainer import train

BASE = {
    "model": {"path": "a/b"},
    "data": {"source": "rows.jsonl"},
    "reward": "math",
    "train": {"steps": 1, "prompts_per_step": 16, "minibatches": 2},
}


def load(*overrides: str, kind=cfg.TrainConfig, tmp_path=None):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE))
    return configfile.load(kind, str(path), list(overrides))


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        (
            [],
            3,
            r"prompts_per_step / minibatches \(8\) must be divisible by .*\(3, .*use train.prompts_per_step=12 or train.prompts_per_step=18",
        ),
        (
            [],
            16,
            r"prompts_per_step / minibatches \(8\) .* processes \(16, .*use train.prompts_per_step=32, or another",
        ),
        (["train.shard=3"], 8, r"train.shard \(3\) must divide .* \(8, .*use one of 1, 2, 4, 8, or all"),
        (
            ["train.optimizer=adamw_8bit", "train.shard=2"],
            2,
            r"train.optimizer \(adamw_8bit\) can't be sharded",
        ),
        (["train.optimizer=adamw_8bit", "train.offload=true"], 1, r"or offloaded; use adamw"),
        (["model.lora.bits=4", "train.shard=all"], 2, r"model.lora.bits \(4\) can't be sharded"),
        (
            ["train.reduce_dtype=bfloat16", "train.shard=2"],
            2,
            r"reduce_dtype \(bfloat16\) must be float32 unless",
        ),
        (["train.reduce_dtype=bfloat16", "train.precision=bf16"], 2, r"unless the model is sharded"),
        (["rollout.engine=vllm", "rollout.engine.tensor_parallel=2"], 2, r"tensor_parallel must be 1"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_loading(overrides, size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_processes(load(*overrides, tmp_path=tmp_path), size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_config_that_fits_passes(size, tmp_path):
    for value, shard in (("1", 1), ("all", size)):
        for weights in ("folder", "nccl"):
            options = ("rollout.engine=vllm_server", f"rollout.engine.weights={weights}")
            assert check_processes(load(*options, f"train.shard={value}", tmp_path=tmp_path), size) == shard


def test_servers_elsewhere_need_an_address_that_they_see(tmp_path):
    engine = (
        "rollout.engine={{type: vllm_server, weights: {}, address: {}, servers: ['http://10.0.0.4:8000']}}"
    )
    with pytest.raises(
        ValueError, match=r"address \(127.0.0.1\) must be .* as the server http://10.0.0.4:8000"
    ):
        load(engine.format("nccl", "127.0.0.1"), tmp_path=tmp_path)
    load(engine.format("nccl", "10.0.0.1"), tmp_path=tmp_path)
    load(engine.format("folder", "127.0.0.1"), tmp_path=tmp_path)


def test_a_run_folder_that_a_machine_does_not_see_is_refused(tmp_path, monkeypatch):
    """Else it would train on without that machine's part of each checkpoint."""
    monkeypatch.setattr(folder, "SHARED_DISK_SECONDS", 0.3)
    with pytest.raises(ValueError, match=r"must be on a disk that all machines share.*has no config.yaml"):
        folder.check_shared(tmp_path, World())
    (tmp_path / "config.yaml").touch()
    folder.check_shared(tmp_path, World())


def test_a_part_is_adapted_or_frozen(tmp_path):
    with pytest.raises(ValueError, match="lora.parts and freeze both name vision"):
        load("model.lora.parts=[vision, language]", "model.freeze=[vision]", tmp_path=tmp_path)


REWARD = "def even(response, example):\n    return float(len(response) % 2)\n"


@pytest.fixture
def run(model_folder, tmp_path):
    """`run(name, *overrides)` trains four steps and returns the run's folder."""
    (tmp_path / "reward.py").write_text(REWARD)
    values = {
        "model": {"path": str(model_folder())},
        "data": {"source": "data/shapes.py:rows", "args": {"size": 20}},
        "rollout": {"group": 4, "max_tokens": 8},
        "reward": {"parts": [{"name": f"{tmp_path}/reward.py:even"}], "workers": 1},
        "train": {"steps": 4, "lr": 1e-3, "prompts_per_step": 4, "minibatches": 2},
        "checkpoint": {"every": 2, "keep_last": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))

    def make(name: str, *overrides: str):
        config = configfile.load(cfg.TrainConfig, str(path), [f"run.dir={tmp_path / name}", *overrides])
        train(config)
        return tmp_path / name

    return make


def metrics(folder) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {
            key: value
            for key, value in json.loads(line).items()
            if not key.startswith(("time/", "memory/", "rollout/tok"))
        }
        for line in lines
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("model.lora.rank=4", "algo.kl=0.1"), marks=pytest.mark.slow),
        ("model.lora.rank=4", "model.lora.bits=4", "train.optimizer=adamw_8bit"),
        pytest.param(
            ("model.freeze=[vision, merger]", "train.optimizer=paged_adamw_8bit"), marks=pytest.mark.slow
        ),
        pytest.param(("model.dtype=bfloat16", "train.weight_decay=0.1"), marks=pytest.mark.slow),
    ],
    ids=["adapters", "4-bit", "8-bit optimizer", "bfloat16 weights"],
)
def test_resumed_runs_equal_whole_ones(run, overrides, tmp_path):
    """A checkpoint holds the adapter alone; the end holds the merged model, and the adapter beside it."""
    whole = run("whole", *overrides)
    first = whole / "checkpoints/step_000002"
    lora = "model.lora.rank=4" in overrides
    assert (first / "adapter/adapter_model.safetensors").is_file() == lora
    assert (first / "model.safetensors").is_file() != lora
    (tmp_path / "again/checkpoints").mkdir(parents=True)
    first.rename(tmp_path / "again/checkpoints/step_000002")
    text = (whole / "config.yaml").read_text().replace(str(whole), str(tmp_path / "again"))
    (tmp_path / "again/config.yaml").write_text(text)
    (tmp_path / "again/metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())
    again = run("again", *overrides)
    assert metrics(again) == metrics(whole)
    names = ["final/model.safetensors"] + (["final/adapter/adapter_model.safetensors"] if lora else [])
    for name in names:
        one, two = load_file(whole / name), load_file(again / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_with_adapters_the_reference_is_the_model_without_them(run):
    """KL is 0 while the adapters change nothing, and not later."""
    first, *_, last = metrics(run("kl", "model.lora.rank=4", "algo.kl=0.1"))
    assert first["minibatch0/kl_reference"] == pytest.approx(0.0, abs=1e-6)
    assert last["minibatch0/kl_reference"] > 1e-6


@pytest.mark.parametrize(
    ("overrides", "recomputed"),
    [
        (("model.dtype=bfloat16",), True),
        pytest.param(("train.precision=bf16",), True, marks=pytest.mark.slow),
        ((), False),
        (("model.dtype=bfloat16", "train.old_logprobs=rollout"), False),
    ],
)
def test_adapters_rounded_to_half_precision_need_recomputed_old_logprobs(run, capsys, overrides, recomputed):
    """From the start: the adapters have no effect in the first step, which is compared."""
    run("rounded", "model.lora.rank=4", "train.steps=1", *overrides)
    assert ("rounded to half precision" in capsys.readouterr().out) == recomputed


@pytest.mark.slow
def test_training_continues_from_an_adapter(run):
    first = run("first", "model.lora.rank=4")
    second = run("second", f"model.lora.adapter={first / 'final/adapter'}", "train.lr=1e-9")
    one, two = (load_file(folder / "final/model.safetensors") for folder in (first, second))
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one)


def test_a_real_model_is_not_trained_beside_a_gpu_that_cannot_be_used(run, monkeypatch, tmp_path):
    """The run ends before its model is loaded; a small one goes on."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(devices, "DEVICE_NODES", tmp_path)
    monkeypatch.setattr(devices, "REAL_MODEL", 1000)
    with pytest.raises(ValueError, match="this machine has a GPU that can't be used"):
        run("large")
    monkeypatch.setattr(devices, "REAL_MODEL", 10**9)
    run("small", "train.steps=1")


def test_nccl_connects_to_the_process_s_own_gpu(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **options: calls.append((backend, options))
    )
    launch._connect(8, torch.device("cuda", 3))
    [current, (backend, options)] = calls
    assert current == options["device_id"] == torch.device("cuda", 3)
    assert backend == "cpu:gloo,cuda:nccl"


def test_an_absent_engine_is_named_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    config = load("rollout.engine=vllm", "model.path=no/model", tmp_path=tmp_path)
    with pytest.raises(ValueError, match=r"rollout.engine \(vllm\) needs vllm.* or set rollout.engine=hf"):
        launch.join(config)
