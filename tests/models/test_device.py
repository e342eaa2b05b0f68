"""A GPU that is there and can't be used stops a run of a real model; on the CPU nothing is trained unasked."""

import os
import stat

import pytest
import torch
from typer.testing import CliRunner

from tests.models.shortages import SHORTAGES
from vlm_sapo import cli
from vlm_sapo.api import ALLOCATOR_VARIABLES, use_expandable_segments
from vlm_sapo.config.load import check as check_section
from vlm_sapo.config.rollout import RolloutConfig
from vlm_sapo.models import device as devices
from vlm_sapo.models.device import Device, find_device, out_of_memory, shortage_reason
from vlm_sapo.models.loading import load_outline

KERNEL_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build\nGCC version: 11.4.0\n"
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
)
LARGE = 3_000_000_000


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(nodes, driver)` pretends that /dev has these device nodes and /proc this driver; CUDA fails as
    with an old driver."""

    def pretend(*nodes: str, driver: str = "", error: str = OLD_DRIVER):
        for name in nodes:
            (tmp_path / name).touch()
        (tmp_path / "version").write_text(driver)
        monkeypatch.setattr(devices, "DEVICE_NODES", tmp_path)
        monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / ("version" if driver else "none"))
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        monkeypatch.setattr(torch.version, "cuda", "13.2")

        def init():
            raise RuntimeError(error)

        monkeypatch.setattr(torch.cuda, "init", init)
        return tmp_path

    return pretend


def check(device: Device, parameters: int) -> list[str]:
    warnings = []
    device.check(lambda: parameters, warnings.append)
    return warnings


def test_a_real_model_stops_where_the_gpu_cannot_be_used(machine):
    machine("nvidia0", "nvidiactl", driver=KERNEL_MODULE)
    device = find_device()
    assert device.torch.type == "cpu"
    with pytest.raises(ValueError, match="driver") as error:
        check(device, LARGE)
    text = str(error.value)
    for part in ("535.129.03", torch.__version__, "CUDA 13.2", "too old (found version 12020)", "--cpu"):
        assert part in text
    assert "update the driver" in text and "http" not in text
    [warning] = check(device, 1_000_000)
    assert "this small model runs on the CPU" in warning and "535.129.03" in warning


def test_nvidia_smi_alone_shows_a_gpu(machine):
    folder = machine()
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 550.54.15\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    with pytest.raises(ValueError, match="driver is 550.54.15"):
        check(find_device(), LARGE)
    program.write_text("#!/bin/sh\necho no devices\nexit 9\n")
    assert not find_device().problem


def test_a_gpu_without_kernels_for_it_is_a_gpu_that_cannot_be_used(machine, monkeypatch):
    """torch sees the GPU, and the first kernel fails."""
    machine(
        driver=KERNEL_MODULE, error="CUDA error: no kernel image is available for execution on the device\nx"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"\(CUDA error: no kernel image is .* on the device\)"):
        check(find_device(), LARGE)


def test_a_wheel_without_cuda_goes_on_with_a_warning(machine, monkeypatch):
    machine("nvidia0", driver=KERNEL_MODULE, error="Torch not compiled with CUDA enabled")
    monkeypatch.setattr(torch.version, "cuda", None)
    [warning] = check(find_device(), LARGE)
    assert "built without CUDA" in warning and "Install a torch wheel that is built for CUDA" in warning


def test_without_a_gpu_a_real_model_warns_and_a_small_one_does_not(machine):
    machine("nvidiactl", error="Found no NVIDIA driver on your system")
    device = find_device()
    assert check(device, 1_000_000) == []
    [warning] = check(device, LARGE)
    assert "no GPU is visible, so 3.0 billion parameters run on the CPU" in warning


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_meant(machine, monkeypatch, value):
    machine("nvidia0", driver=KERNEL_MODULE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert check(find_device(), LARGE) == []


def test_a_number_that_no_gpu_has_is_named(machine, monkeypatch):
    machine("nvidia0", driver=KERNEL_MODULE, error="No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ValueError, match=r"No CUDA GPUs are available\).*CUDA_VISIBLE_DEVICES is 7"):
        check(find_device(), LARGE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK \(2\) must be less .* GPUs \(2\)"):
        find_device(2)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("train.precision", "bf16", "no"),
        ("model.dtype", "bfloat16", "float32"),
        ("dtype", "float16", "float32"),
    ],
)
def test_half_precision_needs_a_gpu_that_computes_in_it(monkeypatch, name, value, instead):
    device = Device(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=rf"{name} \({value}\) must be {instead} on Tesla T4.*7\.5.*8\.0"):
        device.check_half_precision({"other": "float32", name: value})
    device.check_half_precision({name: instead})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    device.check_half_precision({name: value})


def test_cpu_hides_the_gpus(monkeypatch):
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(cli, "load_config", lambda *_: None)
    monkeypatch.setattr(cli, "train", lambda _: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or {})
    for options in ([], ["--cpu"]):
        assert CliRunner().invoke(cli.app, ["train", "quickstart", *options]).exit_code == 0
    assert seen == ["0", ""]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: str(error)[:30])
def test_memory_is_short_whoever_asked_for_it(error):
    assert out_of_memory(error)
    assert shortage_reason(error) == str(error).partition(". ")[0].partition("\n")[0]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        ValueError("CUDA error: out of memory"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
)
def test_other_errors_are_no_shortage(error):
    assert not out_of_memory(error)


def test_segments_are_expandable_unless_the_user_says_otherwise(monkeypatch):
    hf, vllm, shared = (
        check_section(RolloutConfig, {"engine": engine}).engine
        for engine in ("hf", {"type": "vllm"}, {"type": "vllm", "tensor_parallel": 2})
    )

    def configured(engine, **variables) -> dict[str, str]:
        for name in ALLOCATOR_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        use_expandable_segments(engine)
        return {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}

    expandable = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert configured(hf) == configured(vllm) == expandable
    assert configured(shared) == {}
    for name in ALLOCATOR_VARIABLES:
        assert configured(hf, **{name: "max_split_size_mb:512"}) == {name: "max_split_size_mb:512"}


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl"])
def test_linear_attention_without_its_kernels_is_named(model_folder, monkeypatch, family):
    """On a GPU, once; transformers' own warning is silenced."""
    kinds = load_outline(str(model_folder(family))).layer_kinds
    gpu, cpu = Device(torch.device("cuda", 0)), Device(torch.device("cpu"))

    def warnings(device: Device, *installed: str) -> list[str]:
        monkeypatch.setattr(devices, "find_spec", lambda name: name if name in installed else None)
        said = []
        device.check_kernels(kinds, said.append)
        return said

    assert warnings(cpu) == warnings(gpu, "fla") == []
    said = warnings(gpu)
    assert len(said) == (family == "qwen3_5")
    assert all("install the extra qwen3_5" in line for line in said)
