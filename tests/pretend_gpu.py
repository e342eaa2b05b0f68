"""A GPU that is none: tensors whose device is cuda:0 and whose values lie on the CPU.

Inside the mode every operation on such tensors is computed on the CPU. It raises where CUDA would, when tensors of
two devices meet, and counts what a GPU has to wait for or copy: values that the host reads, shapes that depend on
values, tensors of the host that are moved. Forward passes only: a build of torch with CUDA looks for a real device
in the backward pass.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda:0")
INDEXING = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""CUDA takes their indices from the host, too, and copies them."""
COPIES = {aten._to_copy.default, aten.copy_.default}
WAITS = {
    aten._local_scalar_dense.default: "a value is read",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten._unique2.default: "unique",
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
"""Operations after which the host waits for the device."""
ONLY_ON_GPUS = {
    aten.histc.default: lambda values, *rest: aten.histc(values.float(), *rest),  # of integers
    aten.mm.dtype: lambda left, right, dtype: left.to(dtype) @ right.to(dtype),
}
"""What computes the same on a CPU."""
PACKAGES = ("vlm_sapo/", "transformers/", "peft/")


@dataclass(frozen=True)
class Copy:
    """A tensor of the host that was moved to the device."""

    num_bytes: int
    where: str


class PretendTensor(torch.Tensor):
    """`values` on the CPU that claim to be on the GPU."""

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> PretendTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=CUDA,
            requires_grad=False,
        )

    def __init__(self, values: torch.Tensor):
        self.values_on_host = values

    def __repr__(self) -> str:  # pytest prints it
        return f"PretendTensor({self.values_on_host})"

    def tolist(self) -> Any:
        PretendGpu.current.wait("a list is read")
        return self.values_on_host.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendGpu.current.run(func, args, kwargs or {})


class PretendGpu(FakeTensorMode):
    """The mode, with what it counted. torch lets tensors be made on a device that isn't there only in a mode
    for fake tensors; nothing else of that is used."""

    current: PretendGpu

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        PretendGpu.current = self
        torch._C._ensureCUDADeviceGuardSet()
        self.forget()

    def forget(self) -> None:
        """Begins to count anew."""
        self.waits: Counter[tuple[str, str]] = Counter()
        self.copies: list[Copy] = []
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def wait(self, reason: str) -> None:
        self.waits[reason, _where()] += 1

    def copied_in(self, part: str) -> list[Copy]:
        """Copies to the device that were made in files with `part` in their path."""
        return [copy for copy in self.copies if part in copy.where]

    def move(self, model: torch.nn.Module) -> None:
        """Moves a model's parameters and buffers; tied ones stay tied."""
        moved: dict[torch.Tensor, torch.nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter not in moved:
                    values = PretendTensor(parameter.detach())
                    moved[parameter] = torch.nn.Parameter(values, requires_grad=False)
                module._parameters[name] = moved[parameter]
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = PretendTensor(buffer)

    def run(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Computes an operation on the CPU, and says on which device its result is."""
        with unset_fake_temporarily():
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            on_gpu = any(isinstance(tensor, PretendTensor) for tensor in tensors)
            device = kwargs.get("device")
            result_on_gpu = on_gpu if device is None else torch.device(device).type == "cuda"
            if on_gpu:
                self._check_devices(func, tensors)
                self._count(func, args)
            if func in COPIES:
                self._count_copy(*(args if func is aten.copy_.default else (result_on_gpu, args[0])))
            self.operations += on_gpu or result_on_gpu
            func = ONLY_ON_GPUS.get(func, func)
            results = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs) | _cpu(device))
            if not result_on_gpu:
                return results
            inputs = {id(_on_host(tensor)): tensor for tensor in tensors}

            def wrap(leaf: Any) -> Any:
                if not isinstance(leaf, torch.Tensor):
                    return leaf
                return inputs[id(leaf)] if id(leaf) in inputs else PretendTensor(leaf)

            return tree_map(wrap, results)

    def _check_devices(self, func: Callable, tensors: list[torch.Tensor]) -> None:
        if func in INDEXING or func in COPIES:
            return
        strangers = [item for item in tensors if not isinstance(item, PretendTensor) and item.dim() > 0]
        if strangers:
            shapes = [tuple(item.shape) for item in strangers]
            raise RuntimeError(f"{func}: all tensors must be on one device, and {shapes} are on the CPU")

    def _count(self, func: Callable, args: tuple) -> None:
        if func in WAITS:
            self.wait(WAITS[func])
        if func in INDEXING:
            for index in (item for item in args[1] if item is not None):
                if index.dtype in (torch.bool, torch.uint8):
                    self.wait("an index is a mask")
                if not isinstance(index, PretendTensor):
                    self.copies.append(Copy(index.nbytes, _where()))

    def _count_copy(self, target: bool | torch.Tensor, source: torch.Tensor, *_: Any) -> None:
        to_gpu = target if isinstance(target, bool) else isinstance(target, PretendTensor)
        from_gpu = isinstance(source, PretendTensor)
        if to_gpu and not from_gpu:
            self.copies.append(Copy(source.nbytes, _where()))
        if from_gpu and not to_gpu:
            self.wait("values are copied to the host")


def _on_host(leaf: Any) -> Any:
    return leaf.values_on_host if isinstance(leaf, PretendTensor) else leaf


def _cpu(device: Any) -> dict[str, torch.device]:
    return {} if device is None else {"device": torch.device("cpu")}


def _where() -> str:
    """File and line of the innermost frame in this project, transformers or peft."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if any(package in code.co_filename for package in PACKAGES) and "pretend_gpu" not in code.co_filename:
            return f"{code.co_filename.rpartition('site-packages/')[2]}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextmanager
def pretend_gpu(monkeypatch, *, capability: tuple[int, int] = (9, 0)) -> Iterator[PretendGpu]:
    """The mode, on a card of this compute capability."""
    make = torch.tensor

    def tensor(*args, device=None, **kwargs):  # torch.tensor fills a new tensor without the dispatcher
        made = make(*args, **kwargs)
        return made if device is None else made.to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    mode = PretendGpu()
    with mode, torch.no_grad():
        yield mode
