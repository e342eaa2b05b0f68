"""Sends weights from the trainer to servers: through a folder, or by NCCL."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx2 as httpx
import torch
from safetensors.torch import save_file

from vlm_sapo.distributed import World
from vlm_sapo.models.file_modes import use_umask
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.vllm_client import Server, Unavailable

T = TypeVar("T")
SHARD_BYTES = 2**30
"""Size from which the next weights go to another file, and so what a writer needs of host memory."""


class Transfer(Protocol):
    """Sends weights to servers: `stage` once per version, in all processes; then `deliver`, in all processes,
    which runs `push` in the main one; `send` once per server, in the main process. `restarted` says that the
    server lost the weights that were sent last, or had none."""

    live: bool
    """Whether `send` reads the live parameters, and must not run while they are trained."""
    adapter: bool
    """Whether it sends an adapter, which requests must name by its version."""

    def stage(self, vlm: VLM, version: str) -> None: ...

    def deliver(self, push: Callable[[], None]) -> None: ...

    async def send(self, client: httpx.AsyncClient, server: Server, *, restarted: bool) -> None: ...

    def close(self) -> None: ...


class Folder:
    """Writes safetensors files into `folder`, which the servers must see under the same path. Each version
    stays until the next is written, for servers that restart."""

    live = False
    adapter = False

    def __init__(self, folder: Path, *, dtype: torch.dtype, world: World):
        self.folder, self.dtype, self.is_new_folder = folder.resolve(), dtype, not folder.exists()
        self.world = world
        self.current: Path | None = None

    def stage(self, vlm: VLM, version: str) -> None:
        if self.world.main:
            weights = vlm.stream_weights(self.dtype)
            try:
                self._write(version, partial(write_shards, weights))
            finally:
                exhaust(weights)  # the others gather to the end
        elif vlm.sharded:
            exhaust(vlm.stream_weights(self.dtype))
        self.current = self.folder / version

    def _write(self, version: str, write: Callable[[Path], None]) -> None:
        target = self.folder / version
        unfinished = self.folder / f".{version}.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write(unfinished)
        use_umask(unfinished)
        unfinished.rename(target)
        self._remove()

    def deliver(self, push: Callable[[], None]) -> None:
        self.world.on_main(push)

    async def send(self, client: httpx.AsyncClient, server: Server, *, restarted: bool) -> None:
        await server.load(client, str(self.current))

    def close(self) -> None:
        self._remove()
        if self.is_new_folder and self.world.main:
            with suppress(OSError):  # not there, or not empty
                self.folder.rmdir()

    def _remove(self) -> None:
        if self.current is not None and self.world.main:
            shutil.rmtree(self.current)
        self.current = None


class AdapterFolder(Folder):
    """Writes the adapter in peft's format, and servers add it beside their base model under the version's
    name."""

    adapter = True

    def __init__(self, folder: Path, *, world: World):
        super().__init__(folder, dtype=torch.float32, world=world)
        self.loaded: dict[str, str] = {}
        """The version that each server has, by its URL."""

    def stage(self, vlm: VLM, version: str) -> None:
        weights = vlm.adapter_weights(keep=self.world.main)
        if self.world.main:
            self._write(version, partial(vlm.save_adapter, weights=weights))
        self.current = self.folder / version

    async def send(self, client: httpx.AsyncClient, server: Server, *, restarted: bool) -> None:
        await server.load_adapter(client, self.current.name, str(self.current))
        previous = self.loaded.get(server.url)
        if previous not in (None, self.current.name) and not restarted:
            await server.unload_adapter(client, previous)
        self.loaded[server.url] = self.current.name


def write_shards(weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Writes weights to files of about SHARD_BYTES, each when it is full."""
    shard: dict[str, torch.Tensor] = {}
    number = size = 0
    try:
        for name, weight in weights:
            shard[name] = to_host(weight)
            size += weight.nbytes
            if size >= SHARD_BYTES:
                save_file(shard, folder / f"model-{number:05d}.safetensors")
                shard, size, number = {}, 0, number + 1
        if shard:
            save_file(shard, folder / f"model-{number:05d}.safetensors")
    finally:
        exhaust(weights)


def exhaust(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Takes what is left of the weights: the other processes gather a sharded model to its end, also if this
    one failed."""
    for _ in weights:
        pass


def to_host(weight: torch.Tensor) -> torch.Tensor:
    """Copies a device's tensor into pinned memory, several times as fast as into other memory."""
    if weight.device.type == "cpu":
        return weight
    return torch.empty(weight.shape, dtype=weight.dtype, pin_memory=True).copy_(weight)


class Nccl:
    """Sends the live parameters from the main process's GPU to those of servers with vLLM's weight transfer,
    one server after the other; `address` is this machine's, as servers see it. A server that was restarted
    gets a new NCCL group. The other processes take part in gathering a sharded model, once per server."""

    live = True
    adapter = False

    def __init__(self, address: str, *, dtype: torch.dtype, timeout: float, world: World):
        if not torch.cuda.is_available():
            raise ValueError("rollout.engine.weights (nccl) needs a GPU in this process; use folder")
        self.address, self.dtype, self.timeout, self.world = address, dtype, timeout, world
        self.vlm: VLM | None = None
        self.senders: dict[str, Any] = {}
        self.gathering: SharedIterator | None = None
        self.sending: int | None = None
        """The thread that sends now; it and `gathering` change together, under `lock`."""
        self.lock = threading.Lock()
        self.turn = asyncio.Lock()

    def stage(self, vlm: VLM, version: str) -> None:
        self.vlm = vlm

    def deliver(self, push: Callable[[], None]) -> None:
        self.turn = asyncio.Lock()  # a lock belongs to one event loop
        if not self.vlm.sharded:
            self.world.on_main(push)
            return
        if self.world.main:
            try:
                push()
            except Exception as error:
                self.world.fail_everywhere(error)
                raise
            self.world.all_gather(False)
            return
        while self.world.all_gather(True)[0]:  # the main process says whether it gathers once more
            exhaust(self.vlm.stream_weights(self.dtype))

    async def send(self, client: httpx.AsyncClient, server: Server, *, restarted: bool) -> None:
        async with self.turn:
            if restarted:
                self._drop(server)
            world = 1 + (await server.call(client, "get_world_size"))["world_size"]

            def work() -> None:
                with self.lock:
                    self.sending = threading.get_ident()
                torch.cuda.synchronize()  # vLLM reads the parameters on streams of its own
                if server.url not in self.senders:
                    self.senders[server.url] = self._connect(server, world)
                self.senders[server.url].send_weights()

            try:
                await asyncio.wait_for(in_daemon(work), self.timeout)
            except (OSError, RuntimeError) as error:  # timeouts included
                self._drop(server)
                if self.gathering is not None and self.gathering.failed:
                    raise  # the other processes wait in the middle, so that a retry would hang
                raise Unavailable(f"weights could not be sent by NCCL ({error!r})") from error
            finally:
                with self.lock:
                    self.sending, gathering, self.gathering = None, self.gathering, None
                if gathering is not None:
                    gathering.finish()

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

        weights = [
            ParamMeta(item.name, item.dtype_in(self.dtype), item.shape) for item in self.vlm.stored_weights()
        ]
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        info = NCCLTrainerInitInfo(master_address=self.address, master_port=port, world_size=world, rank=0)
        client = HTTPVLLMWeightSyncClient(server.url, timeout=self.timeout)
        source = weight_source(WeightSource, weights, self._gather)
        return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)

    def _gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        with self.lock:
            if self.sending != threading.get_ident():
                raise RuntimeError("this transfer took too long and was given up")
            self.gathering = gathering = SharedIterator(self._announced())
        return gathering

    def _announced(self) -> Iterator[tuple[str, torch.Tensor]]:
        if self.vlm.sharded:
            self.world.all_gather(True)
        yield from self.vlm.stream_weights(self.dtype)


class SharedIterator(Iterator[T]):
    """An iterator that a second thread may bring to its end, after the first one's failure."""

    def __init__(self, items: Iterator[T]):
        self.items, self.lock = items, threading.Lock()
        self.started = self.failed = False

    def __next__(self) -> T:
        with self.lock:
            self.started = True
            try:
                return next(self.items)
            except StopIteration:
                raise
            except BaseException:
                self.failed = True
                raise

    def finish(self) -> None:
        """Takes what is left, or nothing if nothing was taken; nothing can be taken afterwards."""
        with self.lock:
            for _ in self.items if self.started else ():
                pass
            self.items = iter(())


def weight_source(
    base: type, metadata: list[Any], iterate: Callable[[], Iterator[tuple[str, torch.Tensor]]]
) -> Any:
    """A `WeightSource` of the installed vLLM: what is sent, and an iterator over it for each time."""
    if "iter_full" in vars(base):  # vLLM 0.33

        class Source(base):
            @cached_property
            def metadata(self):
                return metadata

            def iter_full(self):
                return iterate()

    else:  # vLLM 0.32

        class Source(base):
            def metadata(self):
                return metadata

            def __iter__(self):
                return iterate()

    return Source()


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
