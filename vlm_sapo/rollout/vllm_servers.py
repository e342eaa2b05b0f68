"""vLLM servers as one engine: prompts are spread over them, and what one can't do another does.

A prompt travels once with its pictures and comes back as a whole group. Each response names the weights that
it was drawn with; one that names others is thrown away and its server given the present ones.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx

from vlm_sapo.distributed import World
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import RolloutError
from vlm_sapo.rollout.vllm_client import START, Server, Unavailable, decode_experts
from vlm_sapo.rollout.vllm_requests import (
    PROBLEMS_AT_ONCE,
    Incomplete,
    Request,
    VllmOutput,
    by_context,
    check_ids,
    sampling_requests,
    to_responses,
)
from vlm_sapo.rollout.weight_transfer import Transfer
from vlm_sapo.types import Context, Response, Sampling

T = TypeVar("T")
REQUESTS_AT_ONCE = 64
"""Prompts that a server has at the same time."""
CHECKPOINT_WEIGHTS = "default"
"""vLLM's name of the weights of the checkpoint."""
REST = 5.0
"""Seconds that a server which failed is asked only if there is no other."""
PAUSE = 0.25
"""Seconds before the second try; each further pause is twice as long, up to REST."""


class VllmServers:
    """Generates on servers that serve the checkpoint which `vlm` was loaded from.

    `transfer` brings them weights; without one they must have those of the checkpoint that they serve, which
    should be the one at `path`. The main process of `world` brings them, and all draw. `longest` is the most
    tokens of a prompt and its response; what fails is tried again for `patience` seconds; `warn` is told.
    """

    in_background = True
    shares_weights = False
    problems_at_once = PROBLEMS_AT_ONCE

    def __init__(
        self,
        vlm: VLM,
        servers: Sequence[Server],
        transfer: Transfer | None,
        *,
        path: str,
        longest: int,
        patience: float,
        warn: Callable[[str], None],
        world: World,
        experts: bool = False,
    ):
        self.world = world
        self.vlm, self.servers, self.transfer = vlm, list(servers), transfer
        self.patience, self.warn, self.records_experts = patience, warn, experts
        self.name = world.on_main(lambda: uuid.uuid4().hex[:8])
        self.staged: int | None = None
        self.version: str | None = None
        self.running: asyncio.Task | None = None
        self.closed = False
        self.syncing = False
        self._run(lambda: self._handshake(path, longest))

    def sync(self, vlm: VLM) -> None:
        """See RolloutEngine. A server that can't be reached now gets the weights when it comes back."""
        if self.transfer is None or self.staged == vlm.version:
            return
        version = f"{self.name}-{vlm.version}"
        self.transfer.stage(vlm, version)
        self.staged, self.version = vlm.version, version
        self.world.on_main(self._push)
        for server in self.servers:  # each response names its weights, so none is taken on trust
            server.version = version if not self.world.main else server.version

    def _push(self) -> None:
        self.syncing = True
        try:
            self._run(self._push_all)
        finally:
            self.syncing = False

    def generate(self, contexts: Sequence[Context], sampling: Sampling) -> list[list[Response]]:
        """See RolloutEngine."""
        requests = sampling_requests(self.vlm, contexts, sampling)
        return by_context(requests, self._run(lambda: self._sample(requests, sampling)), len(contexts))

    def close(self) -> None:
        """Breaks off what is being drawn; the servers go on."""
        self.closed = True
        running = self.running
        if running is not None:
            with suppress(RuntimeError):  # its loop may have ended meanwhile
                running.get_loop().call_soon_threadsafe(running.cancel)
        if self.transfer is not None:
            self.transfer.close()

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async def main() -> T:
            self.running = asyncio.current_task()
            if self.closed:
                raise asyncio.CancelledError
            self.locks = {server.url: asyncio.Lock() for server in self.servers}
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, trust_env=False) as self.client:
                return await work()

        try:
            return asyncio.run(main())
        except asyncio.CancelledError as error:
            raise RolloutError("the engine was closed while it drew responses") from error
        finally:
            self.running = None

    async def _handshake(self, path: str, longest: int) -> None:
        """Waits for the servers and checks what they serve. One that doesn't answer may come later."""

        async def meet(server: Server) -> None:
            model = await self._retry([server], lambda server: server.model(self.client), "at the start")
            if model["max_model_len"] < longest:
                raise ValueError(
                    f"{server.url} takes {model['max_model_len']} tokens in all, and a prompt and its "
                    f"response may have {longest}; {START}, or with --max-model-len {longest}"
                )
            if self.transfer is None and Path(model["root"]).name != Path(path).name:
                self.warn(f"{server.url} serves {model['root']}, and the model here is {path}")

        found = await asyncio.gather(*map(meet, self.servers), return_exceptions=True)
        failures = [error for error in found if error is not None]
        for error in failures:
            if len(failures) == len(self.servers) or not isinstance(error, RolloutError):
                raise error
            self.warn(f"{error}. The run begins without it")

    async def _push_all(self) -> None:
        found = await asyncio.gather(*map(self._ensure_weights, self.servers), return_exceptions=True)
        failures = [
            (server, item) for server, item in zip(self.servers, found, strict=True) if item is not None
        ]
        for server, error in failures:
            if not isinstance(error, Unavailable):
                raise error
            self._back_off(server, error)
        if len(failures) == len(self.servers):
            await self._retry(self.servers, self._ensure_weights, "with new weights")

    async def _ensure_weights(self, server: Server) -> None:
        """Sees to it that a server has the present weights."""
        async with self.locks[server.url]:
            if self.transfer is None or server.version == self.version:
                return
            if self.transfer.live and not (self.syncing and self.world.main):
                raise Unavailable("it has other weights and gets the present ones before the next step")
            server.version = None
            known = server.given is not None and await server.weights(self.client) == server.given
            await server.name(self.client, f"loading-{self.version}")  # no response may bear a whole name
            await self.transfer.send(self.client, server, known=known)
            await server.forget(self.client)
            await server.name(self.client, self.version)
            server.version = self.version

    async def _sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Response]]:
        at_once = asyncio.Semaphore(REQUESTS_AT_ONCE * len(self.servers))

        async def sample(request: Request) -> list[Response]:
            async def ask(server: Server) -> list[Response]:
                await self._ensure_weights(server)
                answer = await server.generate(
                    self.client, request.unexpanded, request.prompt, request.parameters
                )
                return self._read(server, request, answer, sampling)

            async with at_once:
                first = request.context % len(self.servers)
                order = [*self.servers[first:], *self.servers[:first]]
                return await self._retry(order, ask, f"for {request.prompt.example.label}")

        tasks = [asyncio.create_task(sample(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _read(
        self, server: Server, request: Request, answer: dict[str, Any], sampling: Sampling
    ) -> list[Response]:
        expected = CHECKPOINT_WEIGHTS if self.transfer is None else self.version
        spans = (choice.get("weight_versions") or [{}] for choice in answer["choices"])
        names = {str(span.get("version")) for span in itertools.chain.from_iterable(spans)}
        if names - {expected}:
            if self.transfer is None:
                raise RolloutError(
                    f"{server.url} has the weights {', '.join(sorted(names))}, which a training run gave "
                    "it, and not those of its checkpoint; start it anew"
                )
            if server.version == self.version:
                server.version = None
            raise Unavailable(
                f"it sampled with the weights {', '.join(sorted(names))} and not with {expected}: it was "
                "restarted, or another run gives it weights"
            )
        check_ids(self.vlm, request, answer["prompt_token_ids"])
        outputs = [
            VllmOutput(
                choice["token_ids"],
                [item["logprob"] for item in (choice["logprobs"] or {}).get("content") or ()],
                choice["finish_reason"],
                decode_experts(choice.get("routed_experts")),
            )
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]
        try:
            return to_responses(
                self.vlm, request, outputs, sampling, experts=self.records_experts, version=self.staged
            )
        except Incomplete as error:
            raise Unavailable(str(error)) from error

    async def _retry(self, servers: Sequence[Server], act: Callable[[Server], Awaitable[T]], about: str) -> T:
        """The first success on any of the servers. Raises RolloutError when patience has run out."""
        given_up: float | None = None
        for attempt in itertools.count():
            server = self._choose(servers, attempt)
            try:
                return await act(server)
            except Unavailable as error:
                self._back_off(server, error)
                given_up = given_up or time.monotonic() + self.patience
                if time.monotonic() >= given_up and attempt + 1 >= len(servers):
                    names = ", ".join(server.url for server in servers)
                    raise RolloutError(
                        f"no server of {names} answered {about} within {self.patience:g} s: {error}. "
                        f"Look at its log; {START}, and the same command goes on from the last checkpoint"
                    ) from error
                await asyncio.sleep(min(PAUSE * 2 ** min(attempt, 10), REST))
        raise AssertionError

    def _choose(self, servers: Sequence[Server], attempt: int) -> Server:
        """The next server in turn that isn't resting; where all are, the next one."""
        turn = [servers[(attempt + step) % len(servers)] for step in range(len(servers))]
        now = time.monotonic()
        return next((server for server in turn if server.rests_until <= now), turn[0])

    def _back_off(self, server: Server, error: Unavailable) -> None:
        if server.rests_until <= time.monotonic():
            self.warn(f"{server.url}: {error}; trying again for up to {self.patience:g} s")
        server.rests_until = time.monotonic() + REST
