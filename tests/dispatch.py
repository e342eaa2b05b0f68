"""What PyTorch does within a block: memory that is in use, bytes that processes gather."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

PLAIN = {torch.Tensor, torch.nn.Parameter}


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were made within the block and were still referenced."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its parts come here by themselves
        result = function(*args, **(kwargs or {}))
        before = {item.untyped_storage()._cdata for item in args if type(item) in PLAIN}
        if type(result) in PLAIN and result.untyped_storage()._cdata not in before:
            storage = result.untyped_storage()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())
        return result

    def free(self, size: int) -> None:
        self.now -= size


class Traffic(TorchDispatchMode):
    """Bytes that are gathered, by the dtype of matrices, and bytes of tensors whose values are thrown away."""

    def __init__(self):
        super().__init__()
        self.gathered: Counter[str] = Counter()
        self.dropped = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # its parts come here by themselves
        result = function(*args, **(kwargs or {}))
        if "all_gather" in str(function):
            self.gathered[str(args[0].dtype).removeprefix("torch.")] += result.nbytes
        if (
            function is torch.ops.aten._to_copy.default
            and args[0].device.type != "meta"
            and result.device.type == "meta"
        ):
            self.dropped += args[0].nbytes
        return result
