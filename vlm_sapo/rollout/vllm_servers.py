"""vLLM servers as one engine: prompts are distributed over them, and failed ones are retried elsewhere.

A prompt is sent once with its images, and the answer is a whole group. Each response names the weights that
it was sampled with; if these are not the current ones it is discarded and its server gets the weights again.
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
from vlm_sapo.hub import repo_of_snapshot
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.engine import EngineNeeds, RolloutError, server_in_turn
from vlm_sapo.rollout.vllm_client import START, AdapterLost, Server, Unavailable, decode_experts
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
"""Prompts that a server gets at the same time."""
CHECKPOINT_WEIGHTS = "default"
"""vLLM's name for the checkpoint's own weights."""
BACK_OFF = 5.0
"""Seconds after a failure in which a server gets requests only if no other can."""
FIRST_PAUSE = 0.25
"""Seconds before the second attempt; each further pause is twice as long, up to BACK_OFF."""


class VllmServers:
    """Generates on servers that serve the checkpoint at `needs.path`.

    `transfer` sends them new weights, from the main process; all processes sample. Without a transfer the
    servers keep their checkpoint's weights. A request that fails is retried for `patience` seconds, with a
    warning.
    """

    in_background = True
    shares_weights = False

    def __init__(
        self,
        needs: EngineNeeds,
        servers: Sequence[Server],
        transfer: Transfer | None,
        *,
        patience: float,
    ):
        self.world = needs.world or World()
        self.vlm, self.servers, self.transfer = needs.vlm, list(servers), transfer
        self.patience, self.warn, self.records_experts = patience, needs.warn, needs.experts
        self.name = self.world.all_gather(uuid.uuid4().hex[:8])[0]
        self.staged: int | None = None
        self.version: str | None = None
        self.running: asyncio.Task | None = None
        self.closed = False
        self.syncing = False
        self._run(lambda: self._handshake(needs.path, needs.longest))

    def problems_at_once(self, samples: int) -> int:
        return PROBLEMS_AT_ONCE

    def sync(self, vlm: VLM) -> None:
        """See RolloutEngine. A server that can't be reached now gets the weights when it is back."""
        if self.transfer is None or self.staged == vlm.version:
            return
        version = f"{self.name}-{vlm.version}"
        self.transfer.stage(vlm, version)
        self.staged, self.version = vlm.version, version
        self.transfer.deliver(self._push)
        for server in self.servers:  # assumed; each response names its weights
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
        responses = self._run(lambda: self._sample(requests, sampling, contexts))
        return by_context(requests, responses, len(contexts))

    def close(self) -> None:
        """Cancels requests under way; the servers keep running."""
        self.closed = True
        running = self.running
        if running is not None:
            with suppress(RuntimeError):  # its loop may have ended
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
            raise RolloutError("the engine was closed while it sampled responses") from error
        finally:
            self.running = None

    async def _handshake(self, path: str, longest: int) -> None:
        """Waits for the servers and checks which model they serve. A server may also start later."""

        async def check(server: Server) -> None:
            model = await self._retry([server], lambda server: server.model(self.client), "at the start")
            if model["max_model_len"] < longest:
                raise ValueError(
                    f"{server.url} takes {model['max_model_len']} tokens in all, and a prompt and its "
                    f"response may have {longest}; {START}, or with --max-model-len {longest}"
                )
            names = {Path(path).name, Path(repo_of_snapshot(path) or path).name}
            if self.transfer is None and Path(model["root"]).name not in names:
                self.warn(f"{server.url} serves {model['root']}, and the model here is {path}")

        outcomes = await asyncio.gather(*map(check, self.servers), return_exceptions=True)
        failures = [error for error in outcomes if error is not None]
        for error in failures:
            if len(failures) == len(self.servers) or not isinstance(error, RolloutError):
                raise error
            self.warn(f"{error}. The run begins without it")

    async def _push_all(self) -> None:
        outcomes = await asyncio.gather(*map(self._ensure_weights, self.servers), return_exceptions=True)
        failures = [
            (server, error) for server, error in zip(self.servers, outcomes, strict=True) if error is not None
        ]
        for server, error in failures:
            if not isinstance(error, Unavailable):
                raise error
            self._back_off(server, error)
        if len(failures) == len(self.servers):
            await self._retry(self.servers, self._ensure_weights, "with new weights")

    async def _ensure_weights(self, server: Server) -> None:
        """Sends a server the current weights, unless it has them."""
        async with self.locks[server.url]:
            if self.transfer is None or server.version == self.version:
                return
            if self.transfer.live and not (self.syncing and self.world.main):
                raise Unavailable("it has other weights and gets the current ones before the next step")
            server.version = None
            sent = server.last_version_sent
            restarted = sent is None or await server.weights(self.client) != sent
            await server.name(self.client, f"loading-{self.version}")  # marks responses in between
            await self.transfer.send(self.client, server, restarted=restarted)
            await server.forget(self.client)
            await server.name(self.client, self.version)
            server.version = self.version

    async def _sample(
        self, requests: Sequence[Request], sampling: Sampling, contexts: Sequence[Context]
    ) -> list[list[Response]]:
        limit = asyncio.Semaphore(REQUESTS_AT_ONCE * len(self.servers))

        async def sample(request: Request) -> list[Response]:
            async def ask(server: Server) -> list[Response]:
                await self._ensure_weights(server)
                adapter = self.version if self.transfer is not None and self.transfer.adapter else None
                try:
                    answer = await server.generate(
                        self.client, request.unexpanded, request.prompt, request.parameters, adapter=adapter
                    )
                except AdapterLost:
                    self._needs_weights(server)
                    raise
                return self._read(server, request, answer, sampling)

            async with limit:
                first = server_in_turn(request.context, len(contexts), self.world) % len(self.servers)
                order = [*self.servers[first:], *self.servers[:first]]
                responses = await self._retry(order, ask, f"for {request.prompt.example.label}")
            if request.so_far is None:  # the whole group
                contexts[request.context].report(responses)
            return responses

        tasks = [asyncio.create_task(sample(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _needs_weights(self, server: Server) -> None:
        if server.version == self.version:
            server.version = None

    def _read(
        self, server: Server, request: Request, answer: dict[str, Any], sampling: Sampling
    ) -> list[Response]:
        expected = CHECKPOINT_WEIGHTS if self.transfer is None else self.version
        spans = (choice.get("weight_versions") or [{}] for choice in answer["choices"])
        names = {str(span.get("version")) for span in itertools.chain.from_iterable(spans)}
        if names - {expected}:
            if self.transfer is None:
                raise RolloutError(
                    f"{server.url} has the weights {', '.join(sorted(names))}, which a training run sent "
                    "it, and not those of its checkpoint; restart it"
                )
            self._needs_weights(server)
            raise Unavailable(
                f"it sampled with the weights {', '.join(sorted(names))} and not with {expected}: it was "
                "restarted, or another run sends it weights"
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
        """The first success on any of the servers. Raises RolloutError after `patience` seconds."""
        deadline: float | None = None
        for attempt in itertools.count():
            server = self._next_server(servers, attempt)
            try:
                return await act(server)
            except Unavailable as error:
                self._back_off(server, error)
                deadline = deadline or time.monotonic() + self.patience
                if time.monotonic() >= deadline and attempt + 1 >= len(servers):
                    names = ", ".join(server.url for server in servers)
                    raise RolloutError(
                        f"no server of {names} answered {about} within {self.patience:g} s: {error}. "
                        f"Look at its log; {START}, and the same command resumes from the last checkpoint"
                    ) from error
                await asyncio.sleep(min(FIRST_PAUSE * 2 ** min(attempt, 10), BACK_OFF))
        raise AssertionError

    def _next_server(self, servers: Sequence[Server], attempt: int) -> Server:
        """The next server in turn that doesn't back off; if all do, the next one."""
        turn = [servers[(attempt + step) % len(servers)] for step in range(len(servers))]
        now = time.monotonic()
        return next((server for server in turn if server.backs_off_until <= now), turn[0])

    def _back_off(self, server: Server, error: Unavailable) -> None:
        if server.backs_off_until <= time.monotonic():
            self.warn(f"{server.url}: {error}; retrying for up to {self.patience:g} s")
        server.backs_off_until = time.monotonic() + BACK_OFF
