"""A server on loopback that speaks the routes of vLLM that training uses, with a real model behind them.

It makes the faults that a real server can't be told to make: `fault(route, body)` may return an answer to send
instead, a status to fail with, or HANG_UP, or may wait. The real one is tested in test_contract.py.
"""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import example, response
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import Adapters, load_vlm
from vlm_sapo.models.vlm import VLM
from vlm_sapo.rollout.hf import HfEngine
from vlm_sapo.types import Context, Prompt, Sampling

HANG_UP = object()
OPENING = "<|im_start|>assistant\n"
"""Where a prompt ends and a response begins."""
LOADING = threading.Lock()
"""transformers loads one model at a time."""
CACHES = ("reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache")


class ModelServer:
    """Serves the model at `path` until `close`; `restart` comes back at the same port with the first weights."""

    def __init__(self, path, *, port: int = 0, max_model_len: int = 4096, experts: bool = False):
        self.path, self.max_model_len, self.experts = path, max_model_len, experts
        self.fault = lambda route, body: None
        self.requests: list[tuple[str, dict]] = []
        self.open(port)

    def open(self, port: int) -> None:
        self.vlm = load_vlm(str(self.path))
        self.encoder = Encoder(self.vlm)
        self.version, self.lock = "default", threading.Lock()
        self.adapters: dict[str, VLM] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self, None)

            def do_POST(self):
                server.answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def restart(self) -> None:
        self.close()
        self.open(self.port)

    def answer(self, handler, body) -> None:
        route = handler.path.strip("/").partition("?")[0]
        self.requests.append((route, body))
        answer = self.fault(route, body)
        if answer is HANG_UP:
            handler.connection.close()
            return
        if answer is None:
            answer = self.act(route, body)
        status = answer if isinstance(answer, int) else 200
        error = {"error": {"message": "made by the test"}}
        text = (
            answer if isinstance(answer, str) else json.dumps(answer if status == 200 else error)
        ).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text)
        except OSError:
            pass  # the client went away

    def act(self, route: str, body: dict):
        if route == "v1/models":
            return {"data": [{"root": str(self.path), "max_model_len": self.max_model_len}]}
        if route == "collective_rpc":
            state = {}
            for file in Path(body["kwargs"]["weights_path"]).glob("*.safetensors"):
                state |= load_file(file)
            missing, unexpected = self.vlm.model.load_state_dict(state, strict=False)
            assert not unexpected and missing in ([], ["lm_head.weight"])
            self.vlm.version += 1
            return {}
        if route == "v1/load_lora_adapter":
            lora = Adapters("base", folder=Path(body["lora_path"]))
            with LOADING:
                self.adapters[body["lora_name"]] = load_vlm(str(self.path), lora=lora)
            return "Success: the adapter was added."
        if route == "v1/unload_lora_adapter":
            return "Success: removed." if self.adapters.pop(body["lora_name"], None) else 404
        if route == "weight_info":
            return {"weight_version": self.version}
        if route == "update_weight_version":
            self.version = body["new_version"]
            return {}
        if route in CACHES:
            return {"success": True}
        assert route == "inference/v1/generate", route
        if "model" in body and body["model"] not in self.adapters:
            return 404
        with self.lock:
            return self.generate(body)

    def generate(self, body: dict):
        asked, prompt, before = body["sampling_params"], self.prompt(body), self.split(body)[1]
        assert set(map(int, asked["logit_bias"])) == set(self.vlm.banned)
        longest, start = len(before) + asked["max_tokens"], len(before)
        sampling = Sampling(asked["n"], longest, asked["temperature"], asked["seed"])
        vlm = self.adapters.get(body.get("model"), self.vlm)
        engine = HfEngine(vlm, prompts_per_batch=1, experts=self.experts)
        context = Context(prompt, (response(before, prompt),), (0,)) if before else Context(prompt)
        [responses] = engine.generate([context], sampling)
        return {
            "prompt_token_ids": [*prompt.ids.tolist(), *before],
            "choices": [
                {
                    "index": index,
                    "token_ids": item.ids[start:].tolist(),
                    "logprobs": {"content": [{"logprob": value} for value in item.logprobs[start:].tolist()]},
                    "finish_reason": item.finish,
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(item.ids) - start}],
                    "routed_experts": encoded(item.experts) if self.experts else None,
                }
                for index, item in enumerate(responses)
            ],
        }

    def split(self, body: dict) -> tuple[list[int], list[int]]:
        """The ids of the prompt, and those of the response so far behind it."""
        ids, opening = body["token_ids"], self.vlm.tokenizer(OPENING)["input_ids"]
        ends = range(len(opening), len(ids) + 1)
        end = next(end for end in ends if ids[end - len(opening) : end] == opening)
        return ids[:end], ids[end:]

    def prompt(self, body: dict) -> Prompt:
        """What its processor makes of ids with one token per picture."""
        before = self.split(body)[0]
        urls = [part["url"] for part in body.get("content_parts", ())]
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        text = self.vlm.tokenizer.decode(before)
        encoded = self.vlm.processor(text=[text], images=images or None, do_resize=False, return_tensors="pt")
        ids, grid = encoded["input_ids"][0], encoded.get("image_grid_thw")
        assert torch.equal(ids[ids != self.vlm.model.config.image_token_id], self.bare(before))
        positions = self.vlm.rope_positions(ids, grid)
        return Prompt(example(), text, "", ids, positions, tuple(images), encoded.get("pixel_values"), grid)

    def bare(self, ids: list[int]) -> torch.Tensor:
        tokens = torch.tensor(ids)
        return tokens[tokens != self.vlm.model.config.image_token_id]


def encoded(experts: torch.Tensor) -> str:
    """As vLLM tells experts: base64 of a `.npy` file."""
    file = io.BytesIO()
    np.save(file, experts.numpy())
    return base64.b64encode(file.getvalue()).decode()
