"""How weights get from the trainer to servers."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Protocol

import httpx2 as httpx
import torch
from safetensors.torch import save_file

from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.server import Server, Unavailable


class Transfer(Protocol):
    """Brings weights to servers: `stage` once for each version of them, `send` once for each server."""

    def stage(self, vlm: VLM, version: str) -> None: ...

    async def send(self, client: httpx.AsyncClient, server: Server) -> None: ...

    def close(self) -> None: ...


class Folder:
    """Writes a safetensors file into `folder`, which the servers see under the same path. It stays until the
    next one is there, for servers that come back."""

    def __init__(self, folder: Path, *, dtype: torch.dtype):
        self.folder, self.dtype, self.made = folder.resolve(), dtype, not folder.exists()
        self.current: Path | None = None

    def stage(self, vlm: VLM, version: str) -> None:
        target = self.folder / version
        partial = self.folder / f".{version}.partial"
        partial.mkdir(parents=True)
        weights = {name: weight.cpu().contiguous() for name, weight in vlm.weights(self.dtype).items()}
        save_file(weights, partial / "model.safetensors")
        partial.rename(target)
        self._remove()
        self.current = target

    async def send(self, client: httpx.AsyncClient, server: Server) -> None:
        await server.load(client, str(self.current))

    def close(self) -> None:
        self._remove()
        if self.made and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _remove(self) -> None:
        if self.current is not None:
            shutil.rmtree(self.current)
            self.current = None


class Nccl:
    """Sends from GPU to GPU with vLLM's weight transfer; `address` is this machine's, as servers see it."""

    def __init__(self, address: str, *, dtype: torch.dtype):
        self.address, self.dtype = address, dtype
        self.weights: dict[str, torch.Tensor] = {}
        self.senders: dict[str, object] = {}

    def stage(self, vlm: VLM, version: str) -> None:
        self.weights = vlm.weights(self.dtype)

    async def send(self, client: httpx.AsyncClient, server: Server) -> None:
        world = 1 + (await server.call(client, "get_world_size"))["world_size"]
        try:
            if server.url not in self.senders:
                self.senders[server.url] = await asyncio.to_thread(self._connect, server, world)
            await asyncio.to_thread(self.senders[server.url].send_weights)
        except (OSError, RuntimeError) as error:  # a server that starts anew knows nothing of the old group
            self.senders.pop(server.url, None)
            raise Unavailable(f"weights could not be sent by NCCL ({error})") from error

    def close(self) -> None:
        self.weights, self.senders = {}, {}

    def _connect(self, server: Server, world: int):
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            ParamMeta,
            WeightSource,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        transfer = self

        class Source(WeightSource):
            def metadata(self):
                return [ParamMeta(name, item.dtype, item.shape) for name, item in transfer.weights.items()]

            def __iter__(self):
                return iter(transfer.weights.items())

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        info = NCCLTrainerInitInfo(master_address=self.address, master_port=port, world_size=world, rank=0)
        client = HTTPVLLMWeightSyncClient(server.url)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())
