"""The steps of eval/gpu.py, each a process: `python eval/gpu_steps.py STEP --device cuda --work DIR`.

A step prints its measurements as they come, as lines `RESULT {json}`, so that one that is ended keeps them.
It fails with an exception.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:  # slow imports are inside the functions, since the reward's processes import workload.py
    import torch

    from vlm_sapo.models.attention import Segments

HERE = Path(__file__).resolve().parent
PACKAGES = ("transformers", "trl", "vllm", "liger-kernel", "flash-linear-attention", "causal-conv1d", "peft")
"""Packages whose versions are reported."""
TRL_UPDATES, TRL_MEMORY = 3.0, 0.5
"""The targets: TRL's update takes at least so many times ours; our memory is at most this share of TRL's."""
PEAK_SHARE = 0.4
"""The target of the update's share of the measured peak."""
MAX_ERROR = 0.02
"""Largest relative error of a kernel in half precision, in the Euclidean norm: bfloat16 has 8 bits."""


METRICS = {
    "time/step": "seconds_per_step",
    "reward/mean": "reward",
    "loss": "loss",
    "policy/grad_norm": "gradient_norm",
    "policy/mismatch_mean": "mismatch_mean",
}
"""Metrics of a short run's last step, and what they are called in the table."""
VARIED_REWARD = f"reward=[{{name: {HERE / 'workload.py'}:reward}}]"
"""A reward for models with random weights, which answer nothing right."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements: full ones for a GPU, and miniature ones for a test of the steps."""

    model: str
    """Of `vlm-sapo new-model --size`."""
    side: int
    """Of an image in pixels."""
    prompts: int
    group: int
    tokens: int
    """Of a response."""
    dtype: str
    matrix: int
    """Side of the matrices of the measured peak."""
    train: tuple[str, ...]
    """Overrides of short runs."""


SHORT = ("train.steps=1", "train.prompts_per_step=4", "eval.data.args.size=4")
FULL = Sizes("2b", 1024, 8, 8, 512, "bfloat16", 8192, ("train.steps=3", "eval.data.args.size=48"))
MINIATURE = Sizes("tiny", 64, 2, 2, 8, "float32", 512, SHORT)


@dataclass(frozen=True)
class Setting:
    """Where a step runs."""

    device: str
    work: Path
    """Folder of models and runs."""
    results: Path
    """The table so far, as JSON."""

    @property
    def sizes(self) -> Sizes:
        return FULL if self.device == "cuda" else MINIATURE


def result(**numbers: object) -> None:
    """Prints measurements."""
    print(
        "RESULT " + json.dumps({name.replace("_", " "): value for name, value in numbers.items()}), flush=True
    )


def devices(setting: Setting) -> None:
    """Card, versions, and the two measured peaks."""
    import torch

    result(python=platform.python_version(), torch=torch.__version__)
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    result(**installed)
    device = torch.device(setting.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            built = torch.version.cuda or "no CUDA"
            result(no_gpu=f"torch {torch.__version__} ({built}) sees no CUDA device")
            return
        properties = torch.cuda.get_device_properties(device)
        major, minor = torch.cuda.get_device_capability()
        result(
            card=properties.name,
            cuda=torch.version.cuda,
            driver=driver(),
            cards=torch.cuda.device_count(),
            capability=f"{major}.{minor}",
            memory_GB=round(properties.total_memory / 1e9, 2),
        )
    from eval.speed import matmul_speed

    dtype = getattr(torch, setting.sizes.dtype)
    speed = matmul_speed(device, dtype, size=setting.sizes.matrix)
    result(peak_TFLOPS=speed / 1e12, copy_GB_per_second=copy_speed(device) / 1e9)


def driver() -> str:
    """Version of the driver, by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def copy_speed(device: torch.device) -> float:
    """Bytes read and written per second by a large copy on the device."""
    import torch

    size = 2**30 if device.type == "cuda" else 2**22
    source = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = best_time(lambda: source.clone(), device)
    return 2 * size / seconds


def best_time(work: Callable[[], object], device: torch.device, repetitions: int = 10) -> float:
    """The shortest of several runs, after one that isn't counted, in seconds."""
    from eval.speed import synchronize

    times = []
    for _ in range(repetitions + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def quickstart(setting: Setting, name: str, precision: str) -> None:
    """A few steps of the quick start."""
    short_run(setting, f"quickstart_{name}", f"train.precision={precision}")


def short_run(setting: Setting, name: str, *overrides: str) -> None:
    """Trains a few steps of the quick start with other fields, and prints what its metrics say."""
    from vlm_sapo.api import load_config, train

    folder = setting.work / "runs" / name
    common = [f"run.dir={folder}", "run.overwrite=true", "eval.samples=1", "checkpoint.every=0"]
    config = load_config("quickstart", *common, *setting.sizes.train, *overrides)
    train(config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == config.train.steps, f"{len(rows)} steps of {config.train.steps}"
    result(steps=len(rows), **{METRICS[key]: rows[-1][key] for key in METRICS if key in rows[-1]})
    assert "policy/grad_norm" in rows[-1], "no group of the last step had different rewards"


def offload(setting: Setting) -> None:
    """FSDP2's code for GPUs, in one process."""
    short_run(setting, "offload", "train.offload=true", "train.precision=bf16")


def moe(setting: Setting) -> None:
    """Grouped products of experts, and the self-check of a mixture in half precision."""
    folder = random_model(setting, "moe", family="qwen3_vl_moe", size="twin")
    short_run(
        setting, "moe", VARIED_REWARD, f"model.path={folder}", "model.dtype=bfloat16", "model.lora={rank: 8}"
    )


def qwen3_5(setting: Setting) -> None:
    """Linear attention, with the kernels that are installed."""
    from importlib.util import find_spec

    kernels = [name for name in ("fla", "causal_conv1d") if find_spec(name)]
    result(kernels=", ".join(kernels) or "none: transformers' own code")
    folder = random_model(setting, "qwen3_5", family="qwen3_5", size="tiny")
    short_run(setting, "qwen3_5", VARIED_REWARD, f"model.path={folder}", "train.precision=bf16")


def random_model(setting: Setting, name: str, *, family: str = "qwen3_vl", size: str | None = None) -> Path:
    """A model with random weights, made on the device, once."""
    import torch

    from vlm_sapo.plugins import resolve
    from vlm_sapo.tools.new_model import SHAPES, new_model

    folder = setting.work / "models" / name
    if not (folder / "model.safetensors").exists():
        corpus = resolve("data/shapes.py:corpus", field="corpus")()
        started = time.perf_counter()
        with torch.device(setting.device):
            new_model(folder, family=family, corpus=corpus, shape=SHAPES[size or setting.sizes.model])
        result(seconds_to_make_the_model=time.perf_counter() - started)
    return folder


def attention(setting: Setting) -> None:
    """The kernels of packed rows and of the vision tower: their names, times, and errors."""
    import torch

    from vlm_sapo.models.attention import PackedGroup, Segments

    device = torch.device(setting.device)
    prompt, length, group = (1100, 512, 8) if device.type == "cuda" else (40, 9, 3)
    uneven = tuple(max(1, length - 7 * number) for number in range(group))
    groups = (PackedGroup(0, prompt, (length,) * group), PackedGroup(prompt + group * length, prompt, uneven))
    segments = Segments(groups).to(device)
    for name, measured in (
        ("language", language_attention(device, segments)),
        ("vision", vision_attention(device)),
    ):
        result(**{f"{name}_{key}": value for key, value in measured.items()})
        errors = {key: value for key, value in measured.items() if key.endswith("error")}
        assert max(errors.values()) <= MAX_ERROR, f"{name} attention is off: {errors}"


def language_attention(device: torch.device, segments: Segments) -> dict[str, object]:
    """Packed rows with the heads of Qwen3-VL-2B."""
    import torch

    from vlm_sapo.models.attention import prefix_attention

    module = SimpleNamespace(layer_idx=0, is_causal=True, num_key_value_groups=2)
    length = sum(segments.sizes)
    inputs = [torch.randn(1, heads, length, 128, device=device) for heads in (16, 8, 8)]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return prefix_attention(module, *tensors, None, segments=segments)[0]

    return compare(run, inputs, device)


def vision_attention(device: torch.device) -> dict[str, object]:
    """Packed images with the heads of Qwen3-VL-2B's tower. Also the time of a call whose lengths are new,
    over that of a repeated call."""
    import torch

    from vlm_sapo.models import attention as kernels

    module = SimpleNamespace(layer_idx=0, is_causal=False, num_key_value_groups=1)
    scale = 64 if device.type == "cuda" else 4

    def images(number: int) -> Callable[..., torch.Tensor]:
        lengths = torch.tensor([scale * (48 + number), scale * 36, scale * 25])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)

        def run(*tensors: torch.Tensor) -> torch.Tensor:
            pieces = [tensor[:, :, : int(lengths.sum())] for tensor in tensors]
            return kernels.vision_attention(
                module, *pieces, None, cu_seq_lens_q=offsets, max_length_q=int(lengths.max())
            )[0]

        return run

    inputs = [torch.randn(1, 16, scale * 200, 64, device=device) for _ in range(3)]
    measured = compare(images(0), inputs, device)
    half = [tensor.bfloat16() for tensor in inputs]
    new = iter(range(1, 20))
    fresh = best_time(lambda: images(next(new))(*half), device, 5)
    repeated = best_time(lambda: images(0)(*half), device, 5)
    return measured | {"new_lengths_over_repeated": fresh / repeated}


def compare(
    run: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], device: torch.device
) -> dict[str, object]:
    """Runs attention in bfloat16 and, on the same values, in float32, forwards and backwards."""
    import torch

    half = [tensor.bfloat16().requires_grad_() for tensor in inputs]
    full = [tensor.detach().float().requires_grad_() for tensor in half]
    outputs = run(*half), run(*full)
    direction = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad(output, tensors, direction.to(output.dtype), retain_graph=tensors is half)
        for output, tensors in zip(outputs, (half, full), strict=True)
    ]
    names = kernel_names(lambda: run(*half), device)
    forward = best_time(lambda: run(*half), device)
    backward = best_time(lambda: torch.autograd.grad(outputs[0], half, direction, retain_graph=True), device)
    return {
        "kernel": names,
        "forward_error": relative_error(*outputs),
        "backward_error": max(relative_error(*pair) for pair in zip(*gradients, strict=True)),
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
    }


def relative_error(measured: torch.Tensor, reference: torch.Tensor) -> float:
    """In the Euclidean norm; infinite where it is no number."""
    error = float((measured.float() - reference).norm() / reference.norm())
    return error if error < float("inf") else float("inf")


def kernel_names(work: Callable[[], object], device: torch.device) -> str:
    """The kernel, on a CPU the operation, that took longest, shortened."""
    from torch.autograd import DeviceType
    from torch.profiler import profile

    with profile() as profiler:
        work()
    cuda = device.type == "cuda"
    events = [event for event in profiler.events() if (event.device_type == DeviceType.CUDA) == cuda]
    times: Counter[str] = Counter()
    for event in events:
        times[event.name] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return times.most_common(1)[0][0][:80]


def update(setting: Setting) -> None:
    """Our step on the benchmark's workload, and the update's share of the measured peak."""
    import tempfile

    from eval import speed

    sizes, folder = setting.sizes, random_model(setting, "2b")
    args = speed.parse([str(folder), *workload(setting)])
    with tempfile.TemporaryDirectory() as run:
        measured = speed.measure(args, run)
        result(**measured)
    operations = update_operations(folder, args)
    peak = speed.matmul_speed(torch_device(setting), dtype_of(sizes), size=sizes.matrix)
    share = operations / measured["update"] / peak
    tokens = sizes.prompts * sizes.group * sizes.tokens
    result(
        update_TFLOP=operations / 1e12,
        peak_TFLOPS=peak / 1e12,
        share_of_peak=share,
        target_share=f"{PEAK_SHARE}: {met(share >= PEAK_SHARE)}",
        sampled_tokens_per_second=tokens / measured["generation"],
    )


def workload(setting: Setting) -> list[str]:
    """The options that eval/speed.py and eval/trl_step.py have in common."""
    sizes = setting.sizes
    words = ["--side", sizes.side, "--prompts", sizes.prompts, "--group", sizes.group, "--tokens"]
    words += [sizes.tokens, "--steps", 2 if setting.device == "cuda" else 1]
    words += ["--dtype", sizes.dtype, "--device", setting.device, "--checkpointing"]
    return [str(word) for word in words]


def torch_device(setting: Setting) -> torch.device:
    import torch

    return torch.device(setting.device)


def dtype_of(sizes: Sizes) -> torch.dtype:
    import torch

    return getattr(torch, sizes.dtype)


def met(reached: bool) -> str:
    return "met" if reached else "missed"


def update_operations(folder: Path, args: argparse.Namespace) -> float:
    """Matrix operations of a rollout batch's update: the forward pass of P + G R tokens for each group, and
    twice that backwards. What checkpointing computes again is left out."""
    from eval.speed import configure
    from vlm_sapo.data.sources import build_examples
    from vlm_sapo.models.encode import Encoder
    from vlm_sapo.models.loading import load_outline
    from vlm_sapo.tools.plan.operations import GroupTokens, forward_operations, model_work
    from vlm_sapo.tools.plan.simulate import ModelSpec

    config = configure(args, "unused")
    outline = load_outline(str(folder))
    encode = Encoder(outline, min_pixels=args.side**2, max_pixels=args.side**2)
    prompt = encode(build_examples(config.data.tasks[0])[0])
    image = int((prompt.ids == outline.model.config.image_token_id).sum())
    group = GroupTokens(len(prompt.ids), image, args.tokens, args.group)
    work = model_work(ModelSpec(str(folder), args.dtype, False, False))
    return 3 * args.prompts * forward_operations(work, group, vision=not args.frozen_vision)


def trl(setting: Setting) -> None:
    """TRL's step on the same workload, compared with the earlier step's."""
    from eval.bench import run

    folder = random_model(setting, "2b")
    theirs = run([sys.executable, HERE / "trl_step.py", folder, *workload(setting)])
    result(**theirs)
    steps = {step["name"]: step["numbers"] for step in json.loads(setting.results.read_text())["steps"]}
    result(**against_trl(steps.get("update", {}), theirs))


def against_trl(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, object]:
    """TRL's update over ours and our memory over TRL's, with the targets; nothing without our measurement."""
    memory = "peak_gpu_gb" if "peak_gpu_gb" in theirs else "peak_rss_gb"
    own = memory.replace("_", " ")
    if "update" not in ours or own not in ours:
        return {}
    times, share = theirs["update"] / ours["update"], ours[own] / theirs[memory]
    return {
        "times_TRLs_update": times,
        "target_times": f"{TRL_UPDATES:g}: {met(times >= TRL_UPDATES)}",
        "share_of_TRLs_memory": share,
        "target_memory": f"{TRL_MEMORY:g}: {met(share <= TRL_MEMORY)}",
    }


def memory(setting: Setting) -> None:
    """The peak of training steps over what `vlm-sapo plan` predicts."""
    import tempfile

    from eval import memory as memories

    folder, sizes = random_model(setting, "2b"), setting.sizes
    args = argparse.Namespace(
        model=str(folder),
        side=sizes.side,
        group=sizes.group,
        prompts=2,
        tokens=sizes.tokens // 2,
        dtype=sizes.dtype,
        device=setting.device,
    )
    for case in ("checkpointing", "adapters, bf16 autocast, checkpointing"):
        with tempfile.TemporaryDirectory() as run:
            config = memories.configure(args, memories.CASES[case], run)
            predicted, measured = (
                step(config, setting.device) for step in (memories.predict, memories.measure)
            )
        result(**{f"{case}: GB": measured / 1e9, f"{case}: predicted over measured": predicted / measured})


def sampling(setting: Setting) -> None:
    """Launches per generated token, and the speed with few and with many responses in a batch."""
    sizes, folder = setting.sizes, random_model(setting, "2b")
    short, long = (8, 72) if setting.device == "cuda" else (2, 6)
    with sampler(setting, folder, 4 * sizes.prompts) as generate:
        for prompts in (sizes.prompts, 4 * sizes.prompts):
            work = [partial(generate, prompts, tokens) for tokens in (short, long)]
            few, many = (best_time(item, torch_device(setting), repetitions=1) for item in work)
            token, batch = (many - few) / (long - short), prompts * sizes.group
            result(**{f"ms per token, {batch} responses": 1e3 * token})
            result(**{f"tokens per second, {batch} responses": batch / token})
        few, many = (launches(partial(generate, sizes.prompts, tokens), setting) for tokens in (2, 10))
        result(launches_per_token=(many - few) / 8)


@contextmanager
def sampler(setting: Setting, folder: Path, prompts: int) -> Iterator[Callable[[int, int], object]]:
    """A function that samples from the first so many of `prompts` prompts, so many tokens each."""
    import tempfile

    from eval import speed
    from vlm_sapo.reporting.console import Console
    from vlm_sapo.rollout.engine import as_contexts
    from vlm_sapo.training.build import build_training
    from vlm_sapo.training.folder import open_folder
    from vlm_sapo.training.launch import join

    args = speed.parse([str(folder), *workload(setting), "--prompts", str(prompts)])
    with tempfile.TemporaryDirectory() as run_folder:
        config = speed.configure(args, run_folder)
        processes = join(config, Console())
        opened, config = open_folder(config, processes)
        run, _ = build_training(config, opened, processes)
        with closing(run):
            run.policy.vlm.stops = [-1]
            contexts = as_contexts(run.stream.take(prompts))
            engine, settings = run.rollouts.engine, run.rollouts.sampling
            yield lambda count, tokens: engine.generate(
                contexts[:count], replace(settings, max_tokens=tokens)
            )


def launches(work: Callable[[], object], setting: Setting) -> int:
    """Kernels and graphs that the host launches; on a CPU, operations that aren't views."""
    if setting.device == "cpu":
        return count_operations(work)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    return sum("Launch" in event.name and event.name.startswith("cu") for event in profiler.events())


def count_operations(work: Callable[[], object]) -> int:
    """Dispatched operations that aren't views."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counted(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += not function.is_view
            return function(*args, **(kwargs or {}))

    with Counted() as counted:
        work()
    return counted.count


def vllm(setting: Setting) -> None:
    """`vlm-sapo check` with vLLM in this process, as `make check-gpu` runs it."""
    folder = random_model(setting, "2b")
    words = [
        f"model.path={folder}",
        "model.dtype=bfloat16",
        "train.precision=bf16",
        "model.min_pixels=262144",
    ]
    words += ["rollout.engine=vllm", "rollout.max_tokens=256", "--rows", "16", "--samples", "8"]
    command = [sys.executable, "-m", "vlm_sapo", "check", "quickstart", *words]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(process.stdout)
    verdict = [line for line in process.stdout.splitlines() if line.startswith(("vllm on", "speed"))]
    result(check="; ".join(line.strip() for line in verdict))
    assert process.returncode == 0, f"vlm-sapo check ended with {process.returncode}"


STEPS: dict[str, Callable[[Setting], None]] = {
    "devices": devices,
    "quickstart_float32": lambda setting: quickstart(setting, "float32", "no"),
    "quickstart_bf16": lambda setting: quickstart(setting, "bf16", "bf16"),
    "attention": attention,
    "update": update,
    "trl": trl,
    "memory": memory,
    "sampling": sampling,
    "offload": offload,
    "moe": moe,
    "qwen3_5": qwen3_5,
    "vllm": vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_work"))
    parser.add_argument("--results", type=Path, default=Path("runs/gpu/gpu.json"))
    args = parser.parse_args()
    STEPS[args.step](Setting(args.device, args.work, args.results))


if __name__ == "__main__":
    main()
