"""The memory of a GPU, added up from a model's parameters and what its passes need. Bytes, unless said."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

GB = 10**9
CUDA_CONTEXT = 0.8 * GB
"""What CUDA takes outside the allocator: its context and the kernels that were loaded. Assumed; 0.5 to 0.8 GB
are usual on data-centre cards."""
LIBRARY_WORKSPACE = 0.2 * GB
"""Workspaces of cuBLAS (32 MiB for each handle and stream on Hopper, its documentation says), cuBLASLt (torch
takes as much again) and cuDNN."""
NCCL_COMMUNICATOR = 0.4 * GB
"""Buffers of an NCCL communicator that has been used: 4 MB for each channel, protocol and peer. Assumed; 0.3
to 0.5 GB are usual."""
FRAGMENTATION = 0.03
"""Of the memory of passes, what the allocator can't use, with expandable segments. Assumed."""
SLEEPING_ENGINE = 1.0 * GB
"""What a sleeping vLLM engine still takes: its context's share and what isn't in its pool. Assumed."""
ENGINE_GRAPHS = 1.0 * GB
"""A vLLM engine's CUDA graphs and NCCL buffers. Assumed."""
ENGINE_PROFILE = 2.0 * GB
"""What vLLM sets aside for its largest pass, which it runs at its start: an image of the largest size, and
float32 logits of all sequences, two or three times (0.6 GB for 1,024 of them with Qwen's vocabulary).
Assumed."""
HOST_PROCESS = 4.0 * GB
"""Host memory of a training process beside what is listed: Python, libraries, CUDA's own, its reward workers.
Assumed."""
FLASH_QUERY_BYTES = 4
"""Bytes of an element of a query's gradient while FlashAttention adds it up."""
FLASH_KEY_BYTES = 2 * 2
"""FlashAttention's backward pass gives each query head its own half-precision gradients of keys and values
before it adds up those of a key head."""
BRANCH_BYTES = 4 * 2
"""Per query element of a response's token: copies of query, output and their gradients for attention to the
prompt (models/flash.py)."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of an element in NF4 with double quantization."""
QUANTIZATION_BLOCK = 256
"""Elements that share a constant in an 8-bit optimizer."""
MIN_QUANTIZED_ELEMENTS = 4096
"""An 8-bit optimizer stores the moments of smaller parameters in 32 bits."""
MOMENT_BYTES = 4
"""Bytes of an element of an AdamW moment that is not stored in 8 bits."""
REDUCE_BYTES = 4
"""Bytes of an element while sharded gradients are reduced."""
UNSHARDED = "unsharded"
"""Unit of the parameters that every GPU stores in full."""


@dataclass(frozen=True)
class Gpus:
    """`nodes` machines with `per_node` GPUs of `memory` bytes each."""

    nodes: int
    per_node: int
    memory: int

    @property
    def count(self) -> int:
        return self.nodes * self.per_node

    @property
    def name(self) -> str:
        """As `--gpus` has it."""
        nodes = f"{self.nodes}x" if self.nodes > 1 else ""
        return f"{nodes}{self.per_node}x{self.memory // GB}GB"


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of a model."""

    unit: str
    """What it is all-gathered with: `root`, a decoder layer's or vision block's name, or UNSHARDED."""
    numel: int
    element_size: float
    """Bytes of an element."""
    trained: bool
    adapted: bool = False
    """Whether it has a LoRA adapter."""


def weight_bytes(parameters: Iterable[ParameterSpec], shards: int = 1) -> float:
    """The parameters on one GPU."""
    return sum(
        item.numel * item.element_size / (1 if item.unit == UNSHARDED else shards) for item in parameters
    )


def gradient_bytes(parameters: Iterable[ParameterSpec], shards: int = 1) -> float:
    """The gradients on one GPU, each of its parameter's dtype."""
    return weight_bytes((item for item in parameters if item.trained), shards)


def optimizer_bytes(parameters: Iterable[ParameterSpec], name: str, shards: int = 1) -> float:
    """AdamW's two moments on one GPU, in float32 (also those of bfloat16 weights) or in 8 bits."""
    if name == "adamw":
        return sum(
            2 * MOMENT_BYTES * item.numel / (1 if item.unit == UNSHARDED else shards)
            for item in parameters
            if item.trained
        )
    return sum(
        2
        * item.numel
        / shards
        * (MOMENT_BYTES if item.numel < MIN_QUANTIZED_ELEMENTS else 1 + 4 / QUANTIZATION_BLOCK)
        for item in parameters
        if item.trained
    )


def all_gather_bytes(parameters: Sequence[ParameterSpec], element_size: float, prefetch: int = 1) -> float:
    """What FSDP gathers during a pass, with elements of `element_size` bytes: the root unit for the whole
    pass; of the layers the current one, the next `prefetch`, and a buffer as large as one. In the backward
    pass also a layer's full gradient, twice while it is reduced, and the root's."""
    trained = [item for item in parameters if item.trained]
    root, trained_root = (
        sum(item.numel for item in items if item.unit == "root") for items in (parameters, trained)
    )
    forward = element_size * (root + (2 + prefetch) * largest_layer(parameters))
    backward = (element_size + 2 * REDUCE_BYTES) * largest_layer(trained)
    return forward + (element_size + REDUCE_BYTES) * trained_root + backward


def flash_backward_bytes(query_width: int, *, prompts: float, responses: float) -> float:
    """What FlashAttention's backward pass of one layer takes beside what a CPU's does, for so many tokens of
    prompts and of responses: the larger of its two calls, that of all sequences with themselves and that of
    the responses with their prompts."""
    own = (prompts + responses) * (FLASH_QUERY_BYTES + FLASH_KEY_BYTES)
    to_prompts = responses * (FLASH_QUERY_BYTES + BRANCH_BYTES) + prompts * FLASH_KEY_BYTES
    return query_width * max(own, to_prompts)


def largest_tensor(parameters: Iterable[ParameterSpec]) -> int:
    """Elements of the largest parameter."""
    return max((item.numel for item in parameters), default=0)


def largest_layer(parameters: Iterable[ParameterSpec]) -> int:
    """Elements of the largest layer or block."""
    units: dict[str, int] = {}
    for item in parameters:
        if item.unit not in ("root", UNSHARDED):
            units[item.unit] = units.get(item.unit, 0) + item.numel
    return max(units.values(), default=0)


def unsharded_bytes(parameters: Iterable[ParameterSpec], element_size: float) -> float:
    """All sharded parameters, gathered at once."""
    return sum(item.numel for item in parameters if item.unit != UNSHARDED) * element_size


def loading_bytes(parameters: Sequence[ParameterSpec], shards: int = 1, *, offload: bool = False) -> float:
    """Host memory of a process while it loads a model.

    A model that is sharded or offloaded is read tensor by tensor: beside the largest one only shards that
    stay in host memory (`offload`) count. Any other model is loaded whole before it is moved to the GPU.
    """
    if shards == 1 and not offload:
        return weight_bytes(parameters)
    largest = max((item.numel * item.element_size for item in parameters), default=0.0)
    shard = [item for item in parameters if item.unit != UNSHARDED] if offload else []
    return weight_bytes(shard, shards) + largest


@dataclass(frozen=True)
class MemoryRow:
    """What one thing takes in each phase."""

    name: str
    training: float = 0.0
    generating: float = 0.0
    sync: float = 0.0
    note: str = ""

    @staticmethod
    def constant(name: str, size: float, note: str = "") -> MemoryRow:
        """The same in every phase."""
        return MemoryRow(name, size, size, size, note)


PHASES = ("training", "generating", "sync")
CONTEXT, COMMUNICATORS, LOST = "CUDA context", "NCCL communicators", "lost to fragmentation"
OUTSIDE = (CONTEXT, COMMUNICATORS, LOST)
"""Rows that are no tensors, so that the allocator's own figures leave them out."""
WORKSPACES, FLASH = "library workspaces", "attention's backward pass"
GPU_ONLY = (*OUTSIDE, WORKSPACES, FLASH)
"""Rows that a CPU doesn't have."""
PROCESSES, LOADING = "processes", "loading, before the first step"
"""Rows of host memory: what is there all the time, and what only loading takes."""


@dataclass(frozen=True)
class Estimate:
    """The memory of a GPU by row, and that of a node's host by name."""

    gpus: Gpus
    rows: tuple[MemoryRow, ...]
    host: tuple[tuple[str, float], ...]
    shortage: str = ""
    """Why the config does not fit although the totals may; empty where nothing is wrong."""

    @property
    def totals(self) -> dict[str, float]:
        return {phase: sum(vars(row)[phase] for row in self.rows) for phase in PHASES}

    def without(self, names: Iterable[str]) -> dict[str, float]:
        """The totals without some rows."""
        rows = [row for row in self.rows if row.name not in names]
        return {phase: sum(vars(row)[phase] for row in rows) for phase in PHASES}

    @property
    def host_total(self) -> float:
        """Of a node: while the model is loaded or while it trains, whichever takes more."""
        sizes = dict(self.host)
        processes, loading = sizes.pop(PROCESSES, 0.0), sizes.pop(LOADING, 0.0)
        return processes + max(loading, sum(sizes.values()))

    @property
    def peak(self) -> float:
        return max(self.totals.values())

    @property
    def fits(self) -> bool:
        return self.fits_within(1.0)

    def fits_within(self, share: float) -> bool:
        """Whether it takes at most this share of the memory."""
        return self.peak <= share * self.gpus.memory and not self.shortage
