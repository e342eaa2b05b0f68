"""The device that a model runs on: whether the machine's GPU works, what to say if it doesn't, and how errors
say that its memory is full."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

DEVICE_NODES = Path("/dev")
"""Folder in which the driver makes a `nvidia0`, `nvidia1`, ... for each GPU."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
"""The driver's version, as its kernel module tells it."""
REAL_MODEL = 200_000_000
"""Parameters from which on a model is no miniature, and training it on a CPU is hardly meant: the smallest
published model of the supported families has ten times as many, a test's or the quick start's a hundredth."""
HALF_PRECISION_CAPABILITY = (8, 0)
"""Compute capability (Ampere) from which on GPUs compute in bfloat16 and have the variable-length attention
kernel."""
HALF_PRECISION = (torch.float16, torch.bfloat16)
HIDDEN = {"", "-1", "NoDevFiles"}
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU; a scheduler sets the last."""
NVIDIA_SMI_TIMEOUT = 20.0
"""Seconds; a broken driver may make it hang."""
SHORTAGE = re.compile(
    r"CUDA( driver)? error: out of memory|\[CUDA\]: out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED"
)
"""How libraries that allocate past torch's allocator say that memory is short: the driver, Triton, and the
workspaces of cuBLAS and cuDNN."""
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Device:
    """Where models run, and why not on a GPU."""

    torch: torch.device
    problem: str = ""
    """Why the machine's GPU can't be used; empty if it can, if there is none, or if it is hidden."""
    hidden: bool = False
    """Whether CUDA_VISIBLE_DEVICES hides the GPUs, as `--cpu` does."""

    def check(self, parameters: Callable[[], int], warn: Warn) -> None:
        """Whether a model of so many parameters may run here. Raises ValueError for a real model beside a GPU
        that can't be used, rather than training it on the CPU for weeks; warns if there is no GPU, or if
        torch is built without CUDA."""
        if self.torch.type == "cuda" or self.hidden:
            return
        if self.problem and torch.version.cuda is None:
            warn(
                f"{self.problem}; the model runs on the CPU. Install a torch wheel that is built for CUDA, "
                "or say --cpu"
            )
        elif self.problem and parameters() >= REAL_MODEL:
            raise ValueError(
                f"{self.problem}; update the driver, or install a torch wheel that is built for the driver's "
                "version of CUDA. With --cpu the model runs on the CPU"
            )
        elif self.problem:
            warn(f"{self.problem}; this small model runs on the CPU")
        elif (count := parameters()) >= REAL_MODEL:
            warn(
                f"no GPU is visible, so {count / 1e9:.1f} billion parameters run on the CPU, hundreds of "
                "times slower; --cpu says that this is meant"
            )

    def check_kernels(self, layer_kinds: Collection[str], warn: Warn) -> None:
        """Warns if a GPU computes linear attention by plain operations, which are correct and several times
        slower. transformers says so too, in a log that is silenced."""
        if self.torch.type == "cuda" and "linear_attention" in layer_kinds and find_spec("fla") is None:
            warn(
                "this model has linear attention, and without the package flash-linear-attention it is "
                "several times slower; install the extra qwen3_5 (docs/install.md)"
            )

    def check_half_precision(self, fields: Mapping[str, str]) -> None:
        """Raises ValueError if a field, by its name, asks for a precision that the GPU lacks."""
        if self.torch.type != "cuda":
            return
        capability = torch.cuda.get_device_capability(self.torch)
        for name, value in fields.items():
            if value in ("bf16", "bfloat16", "float16") and capability < HALF_PRECISION_CAPABILITY:
                instead = "no" if value == "bf16" else "float32"
                raise ValueError(
                    f"{name} ({value}) must be {instead} on {torch.cuda.get_device_name(self.torch)}: its "
                    f"compute capability is {_dotted(capability)}, and half precision needs "
                    f"{_dotted(HALF_PRECISION_CAPABILITY)}; set {name}={instead}, or use a newer GPU"
                )


def find_device(index: int = 0) -> Device:
    """The GPU of this index if a kernel runs on it, else the CPU. Raises ValueError where torch sees
    GPUs, but fewer."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return Device(torch.device("cpu"), hidden=True)
    if 0 < (count := torch.cuda.device_count()) <= index:
        raise ValueError(
            f"LOCAL_RANK ({index}) must be less than the number of visible GPUs ({count}); start one process "
            "per GPU, with CUDA_VISIBLE_DEVICES the same in all of them"
        )
    error = cuda_error(index)
    if error is None:
        return Device(torch.device("cuda", index))
    problem = ""
    if torch.cuda.is_available() or gpu_present():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible}"
        problem = (
            f"this machine has a GPU that can't be used ({error}): its driver is "
            f"{driver_version() or 'unknown'}, torch {torch.__version__} is {built}{shown}"
        )
    return Device(torch.device("cpu"), problem)


def cuda_error(index: int = 0) -> str | None:
    """Why nothing can be computed on the GPU of this index; None if it works. Starts CUDA if there is one."""
    try:
        torch.cuda.init()
        torch.ones(1, device=torch.device("cuda", index)).add(1).item()  # it may lack kernels for the GPU
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
    return None


def gpu_present() -> bool:
    """Whether the machine has an NVIDIA GPU, whatever torch makes of it."""
    return any(DEVICE_NODES.glob("nvidia[0-9]*")) or bool(_nvidia_smi())


def driver_version() -> str:
    """Version of the NVIDIA driver, such as 570.86.15; empty if it is unknown."""
    text = DRIVER_FILE.read_text() if DRIVER_FILE.is_file() else _nvidia_smi()
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return version[0] if version else ""


def _nvidia_smi() -> str:
    """The driver's version by `nvidia-smi`; empty if it doesn't answer."""
    if (program := shutil.which("nvidia-smi")) is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device has too little memory, so that less work at a time may help."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and SHORTAGE.search(str(error)) is not None


def shortage_reason(error: BaseException) -> str:
    """The first sentence of an error that `out_of_memory` recognizes."""
    return str(error).partition("\n")[0].partition(". ")[0]


def release_memory() -> None:
    """Gives unused memory of the devices back, after an error: also what only cycles of objects, such as a
    traceback's, still refer to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
