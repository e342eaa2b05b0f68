"""Sends weights from the trainer to servers: through a folder, or by NCCL."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import httpx2 as httpx
import torch
from safetensors.torch import save_file

from vlm_sapo.distributed import World
from vlm_sapo.models.file_modes import use_umask
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.vllm_client import Server, Unavailable


class Transfer(Protocol):
    """Sends weights to servers: `stage` once per version, in all processes; `send` once per server, in the
    main process. `restarted` says that the server lost the weights that were sent last, or had none."""

    live: bool
    """Whether `send` reads the live parameters, and must not run while they are trained."""

    def stage(self, vlm: VLM, version: str) -> None: ...

    async def send(self, client: httpx.AsyncClient, server: Server, *, restarted: bool) -> None: ...

    def close(self) -> None: ...


class Folder:
    """Writes a safetensors file into `folder`, which the servers must see under the same path. Each version
    stays until the next is written, for servers that restart."""

    live = False

    def __init__(self, folder: Path, *, dtype: torch.dtype, world: World):
        self.folder, self.dtype, self.is_new_folder = folder.resolve(), dtype, not folder.exists()
        self.world = world
        self.current: Path | None = None

    def stage(self, vlm: VLM, version: str) -> None:
        weights = vlm.weights(keep=self.world.main)
        if self.world.main:
            self._write(weights, version)
        self.current = self.folder / version

    def _write(self, weights: dict[str, torch.Tensor], version: str) -> None:
        target = self.folder / version
        partial = self.folder / f".{version}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copies = {name: weight.to("cpu", self.dtype) for name, weight in weights.items()}
        save_file(contiguous(copies), partial / "model.safetensors")
        use_umask(partial)
        partial.rename(target)
        self._remove()

    async def send(self, client: httpx.AsyncClient, server: Server, *, restarted: bool) -> None:
        await server.load(client, str(self.current))

    def close(self) -> None:
        self._remove()
        if self.is_new_folder and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _remove(self) -> None:
        if self.current is not None and self.world.main:
            shutil.rmtree(self.current)
        self.current = None


def contiguous(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, as safetensors needs them."""
    return {name: weight.contiguous() for name, weight in weights.items()}


class Nccl:
    """Sends the live parameters from GPU to GPU with vLLM's weight transfer; `address` is this machine's, as
    servers see it. A server that was restarted gets a new NCCL group."""

    live = True

    def __init__(self, address: str, *, dtype: torch.dtype, timeout: float):
        if not torch.cuda.is_available():
            raise ValueError("rollout.engine.weights (nccl) needs a GPU in this process; use folder")
        self.address, self.dtype, self.timeout = address, dtype, timeout
        self.vlm: VLM | None = None
        self.senders: dict[str, Any] = {}

    def stage(self, vlm: VLM, version: str) -> None:
        self.vlm = vlm

    async def send(self, client: httpx.AsyncClient, server: Server, *, restarted: bool) -> None:
        if restarted:
            self._drop(server)
        world = 1 + (await server.call(client, "get_world_size"))["world_size"]

        def work() -> None:
            if server.url not in self.senders:
                self.senders[server.url] = self._connect(server, world)
            self.senders[server.url].send_weights()

        try:
            await asyncio.wait_for(in_daemon(work), self.timeout)
        except (OSError, RuntimeError) as error:  # timeouts included
            self._drop(server)
            raise Unavailable(f"weights could not be sent by NCCL ({error!r})") from error

    def close(self) -> None:
        for sender in self.senders.values():
            threading.Thread(target=sender.shutdown, daemon=True).start()
        self.senders = {}

    def _drop(self, server: Server) -> None:
        """Forgets a server's group; the shutdown may wait for the other side for ever."""
        if sender := self.senders.pop(server.url, None):
            threading.Thread(target=sender.shutdown, daemon=True).start()

    def _connect(self, server: Server, world: int):
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            ParamMeta,
            WeightSource,
            WeightTransferTrainerFactory,
        )
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        vlm, dtype = self.vlm, self.dtype

        class Source(WeightSource):
            def metadata(self):
                return [ParamMeta(name, dtype, tuple(item.shape)) for name, item in vlm.weights().items()]

            def __iter__(self):
                for name, item in vlm.weights().items():
                    yield name, item.to(dtype)

        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        info = NCCLTrainerInitInfo(master_address=self.address, master_port=port, world_size=world, rank=0)
        client = HTTPVLLMWeightSyncClient(server.url, timeout=self.timeout)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=Source())


def in_daemon(work: Callable[[], None]) -> asyncio.Future:
    """Runs work that may hang for ever, in a thread that doesn't delay the end of the process."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(None)

    def run() -> None:
        try:
            work()
        except Exception as error:  # raised where the future is awaited
            outcome: Exception | None = error
        else:
            outcome = None
        if not loop.is_closed():
            loop.call_soon_threadsafe(finish, outcome)

    threading.Thread(target=run, daemon=True).start()
    return future
