"""One vLLM server, as seen over HTTP: what it serves, responses, new weights."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from contextlib import suppress
from typing import Any

import httpx2 as httpx
import numpy as np

from vlm_sapo.rollout.engine import RolloutError
from vlm_sapo.types import Prompt, RowError

MOST_BYTES = 64 * 2**20
"""Largest size of a prompt's images, compressed."""
CONNECT_TIMEOUT = 10.0
"""Seconds to reach a server."""
CACHES = ("reset_prefix_cache?reset_running_requests=true", "reset_mm_cache", "reset_encoder_cache")
NAMES_ADAPTER = {"model", "lora_name"}
"""Fields of a request that name an adapter."""
PLAIN = ("v1/load_lora_adapter", "v1/unload_lora_adapter")
"""Routes that answer with text."""
START = "start it with `vlm-sapo serve`"


class Unavailable(Exception):
    """A server that fails now and may answer later, or a response that may be requested again."""


class AdapterLost(Unavailable):
    """A server that doesn't have the adapter that a request names."""


class Server:
    """A server at `url`; a request may take `timeout` seconds."""

    def __init__(self, url: str, *, timeout: float):
        self.url, self.timeout = url.rstrip("/"), httpx.Timeout(timeout, connect=CONNECT_TIMEOUT)
        self.version: str | None = None
        """Name of the weights that it has; None if it needs new ones."""
        self.last_version_sent: str | None = None
        """Name that was sent to it last."""
        self.backs_off_until = 0.0
        """Time of the monotonic clock before which it gets requests only if no other server can."""

    async def generate(
        self,
        client: httpx.AsyncClient,
        ids: list[int],
        prompt: Prompt,
        sampling: dict[str, Any],
        *,
        adapter: str | None = None,
    ) -> dict[str, Any]:
        """Samples responses to a prompt, with an adapter of this name; returns the answer with
        `prompt_token_ids` and `choices`. Raises AdapterLost if the server has none."""
        body = {"token_ids": ids, "return_token_ids": True, "sampling_params": sampling}
        body |= {} if adapter is None else {"model": adapter}
        if prompt.images:
            urls = await asyncio.to_thread(image_urls, prompt)
            body["content_parts"] = [{"type": "image_url", "url": url} for url in urls]
        return await self.call(client, "inference/v1/generate", body, about=prompt.example.label)

    async def model(self, client: httpx.AsyncClient) -> dict[str, Any]:
        """The served model: `root`, the checkpoint's path, and `max_model_len`."""
        return (await self.call(client, "v1/models"))["data"][0]

    async def load(self, client: httpx.AsyncClient, folder: str) -> None:
        """Loads new weights from a folder."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self.call(client, "collective_rpc", body, about=f"weights in {folder}")

    async def load_adapter(self, client: httpx.AsyncClient, name: str, folder: str) -> None:
        """Loads an adapter from a folder, also a second time."""
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        await self.call(client, "v1/load_lora_adapter", body, about=f"the adapter in {folder}")

    async def unload_adapter(self, client: httpx.AsyncClient, name: str) -> None:
        """Drops an adapter."""
        await self.call(client, "v1/unload_lora_adapter", {"lora_name": name}, about=f"the adapter {name}")

    async def name(self, client: httpx.AsyncClient, version: str) -> None:
        """Sets the name of its weights, which it reports with each response."""
        self.last_version_sent = version
        await self.call(client, "update_weight_version", {"new_version": version})

    async def weights(self, client: httpx.AsyncClient) -> str:
        """The name of the weights that it has."""
        return (await self.call(client, "weight_info"))["weight_version"]

    async def forget(self, client: httpx.AsyncClient) -> None:
        """Clears the caches that older weights filled."""
        for cache in CACHES:
            answer = await self.call(client, cache, {})
            if answer.get("success") is False:
                raise Unavailable("its caches of the old weights could not be cleared")

    async def call(
        self, client: httpx.AsyncClient, route: str, body: dict[str, Any] | None = None, *, about: str = ""
    ) -> dict[str, Any]:
        """POSTs a body, or GETs without one. Raises Unavailable if a retry may help, else RolloutError."""
        method, url = "GET" if body is None else "POST", f"{self.url}/{route}"
        try:
            response = await client.request(method, url, json=body, timeout=self.timeout)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise RolloutError(
                f"rollout.engine.servers ({self.url}) must be an address such as http://127.0.0.1:8000; "
                f"{error}"
            ) from error
        except httpx.TimeoutException as error:
            raise Unavailable(f"no answer in time ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise Unavailable(str(error) or type(error).__name__) from error
        if response.status_code == 404 and body is not None and NAMES_ADAPTER & set(body):
            _raise_if_lost(response, about)
        return self._read(response, route, about)

    def _read(self, response: httpx.Response, route: str, about: str) -> dict[str, Any]:
        summary = f"{self.url}/{route} answered {response.status_code} ({_reason(response)})"
        if response.status_code in (404, 405):
            raise RolloutError(
                f"{summary}: the server was started without VLLM_SERVER_DEV_MODE=1 or is older than vLLM "
                f"0.32; {START}"
            )
        if response.status_code == 403:
            raise RolloutError(f"{summary}: it lacks an option that training needs; {START}")
        summary = f"{about}: {summary}" if about else summary
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            raise Unavailable(summary)
        if response.status_code == 401:
            raise RolloutError(
                f"{summary}; it requires an API key, which is not supported; start it without one"
            )
        if response.status_code >= 400:
            raise RolloutError(summary)
        if route in PLAIN:
            return {}
        try:
            return response.json() if response.content else {}
        except json.JSONDecodeError as error:
            raise Unavailable(f"{summary}: the answer is truncated") from error


def _raise_if_lost(response: httpx.Response, about: str) -> None:
    """Raises AdapterLost if vLLM knows the route and not the adapter, or not its folder."""
    with suppress(json.JSONDecodeError):
        if "error" in response.json():
            raise AdapterLost(f"{about}: it has no such adapter ({_reason(response)})")


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:400]
    except (ValueError, KeyError, TypeError):
        return response.text[:400]


def decode_experts(text: str | None) -> np.ndarray | None:
    """The experts of a response's tokens, from base64 of a `.npy` file."""
    return None if text is None else np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def image_urls(prompt: Prompt) -> list[str]:
    """The resized images as data URLs of PNG files, which are lossless and smaller than raw pixels.

    Raises RowError if they are too large to send.
    """
    urls = []
    for image in prompt.images:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        urls.append(f"data:image/png;base64,{base64.b64encode(file.getbuffer()).decode()}")
    size = sum(map(len, urls))
    if size > MOST_BYTES:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in prompt.images)
        raise RowError(
            f"{prompt.example.label}: its images ({sizes}) take {size / 2**20:.0f} MB to send to a "
            f"server, over {MOST_BYTES / 2**20:.0f}; lower model.max_pixels"
        )
    return urls
