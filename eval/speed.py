"""Times our trainer's own step on synthetic images and prints one JSON line.

    python eval/speed.py MODEL_DIR --side 512 --group 8 --prompts 4 --tokens 64 --steps 3 [--plain]

Every response has exactly --tokens tokens (with --unequal they end at random, at --tokens at the latest).
With --turns 2 it has two turns of so many, and an environment returns a quarter of the image between them.
Two optimizer updates per rollout batch. One further step runs first and is reported as `first_step`: it holds
the self-check of the shared prefix. Keys: seconds per rollout batch in all and by part, peak memory in GB,
`update_tokens`, the tokens that the update's forward passes read, and `model_flops_utilisation`: three times
the forward pass's operations over the update's seconds and the speed of a large matrix product on the same
device.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow imports are inside the functions, since the reward's processes import this script
    import torch

    from vlm_sapo.config.schema import TrainConfig


PARTS = {"generation": "rollout", "old_logprobs": "old_logprobs", "update": "update", "data": "data"}


def configure(args: argparse.Namespace, folder: str) -> TrainConfig:
    """The run that is timed."""
    from vlm_sapo.config.schema import TrainConfig

    here = str(Path(__file__).resolve().with_name("workload.py"))
    sizes = {"count": args.prompts * (args.steps + 1), "side": args.side, "images": args.images}
    rollout = {"group": args.group, "max_tokens": args.tokens, "prompts_per_batch": args.prompts}
    if args.turns > 1:
        rollout["max_tokens"] = response_limit(args)
        rollout["environment"] = {
            "type": "own",
            "function": f"{here}:Cropper",
            "args": {"turns": args.turns},
            "max_turns": args.turns,
            "max_turn_tokens": args.tokens,
        }
    return TrainConfig.model_validate(
        {
            "run": {"dir": folder},
            "model": {
                "path": args.model,
                "dtype": args.dtype,
                "freeze": ["vision", "merger"] if args.frozen_vision else [],
                "gradient_checkpointing": args.checkpointing,
                "min_pixels": (args.side if args.turns == 1 else args.side // 2) ** 2,
                "max_pixels": args.side**2,
            },
            "data": {"source": f"{here}:rows", "args": sizes},
            "rollout": rollout,
            "reward": [{"name": f"{here}:reward"}],
            "train": {
                "steps": args.steps + 1,
                "lr": 1e-5,
                "prompts_per_step": args.prompts,
                "minibatches": 2,
                "tokens_per_microbatch": args.budget,
                "layout": "plain" if args.plain else "shared",
            },
            "checkpoint": {"every": 0},
        }
    )


def response_limit(args: argparse.Namespace) -> int:
    """Enough tokens for a response of several turns and the crops between them."""
    return args.turns * args.tokens + (args.turns - 1) * (args.side**2 // 1024 + 64)


def end_turns(tokens: int, end: int) -> None:
    """Makes `end` every turn's last of so many tokens, with the log-prob that it has there."""
    import torch

    from vlm_sapo.rollout import hf

    sample, steps = hf.sample, itertools.count(1)

    def ending(logits, uniforms, temperature):
        ids, logprobs = sample(logits, uniforms, temperature)
        if next(steps) % tokens:
            return ids, logprobs
        return torch.full_like(ids, end), (logits / temperature).log_softmax(-1)[:, end]

    hf.sample = ending


def matmul_speed(device: torch.device, dtype: torch.dtype, *, size: int | None = None) -> float:
    """Operations per second of a large matrix product, of `size` rows and columns."""
    import torch

    size = size or (8192 if device.type == "cuda" else 1024)
    one = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        one @ one
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options, by default those of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--turns", type=int, default=1, help="with a crop of the image after each but the last"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", type=int, default=16384, help="tokens per micro-batch")
    parser.add_argument("--plain", action="store_true", help="every response with its own prompt and image")
    parser.add_argument("--unequal", action="store_true", help="responses end at random")
    parser.add_argument("--frozen-vision", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(words)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU; none is visible here")
    if args.turns > 1 and args.unequal:
        parser.error("--unequal is for single turns; leave it or --turns out")
    return args


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, folder)))


def measure(args: argparse.Namespace, folder: str) -> dict:
    """Runs the steps; the timed ones are all but the first."""
    import torch

    from vlm_sapo.reporting.console import Console
    from vlm_sapo.training.build import build_training
    from vlm_sapo.training.folder import open_folder
    from vlm_sapo.training.launch import join
    from vlm_sapo.training.trainer import loop

    config = configure(args, folder)
    processes = join(config, Console())
    folder, config = open_folder(config, processes)
    run, loss = build_training(config, folder, processes)
    vlm = run.policy.vlm
    vlm.stops = list(range(7, vlm.vocabulary, args.tokens)) if args.unequal else [-1]
    if args.turns > 1:
        end_turns(args.tokens, vlm.tokenizer.eos_token_id)
    with closing(run):
        loop(run, loss, config.train.steps)
        peak = peaks(vlm.device)
        forward, tokens = count_forward(run, config)
    first, *timed = run.folder.read("metrics.jsonl")

    def mean(name: str) -> float:
        return round(sum(row[f"time/{name}"] for row in timed) / len(timed), 3)

    result = {"seconds_per_rollout_batch": mean("step"), "first_step": round(first["time/step"], 3)}
    result |= {key: mean(name) for key, name in PARTS.items()}
    result["response_tokens"] = round(timed[-1]["response/tokens"], 1)
    if args.turns > 1 and result["response_tokens"] != args.turns * args.tokens:
        raise RuntimeError(f"responses have {result['response_tokens']} tokens, not {args.turns} full turns")
    result["update_tokens"] = tokens
    result |= peak
    speed = matmul_speed(vlm.device, getattr(torch, args.dtype))
    result["model_flops_utilisation"] = round(3 * forward / max(result["update"], 1e-9) / speed, 3)
    return result


def peaks(device: torch.device) -> dict[str, float]:
    """Peak memory so far, in GB."""
    import torch

    peak = {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    if device.type == "cuda":
        peak["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {name: round(value, 3) for name, value in peak.items()}


def count_forward(run, config: TrainConfig) -> tuple[int, int]:
    """Operations of the forward passes of one step's update, and the tokens that they read."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from vlm_sapo.training.batch import collate

    policy = run.policy
    groups = run.rollouts.next(config.train.steps, policy.vlm).groups
    batch = collate(groups, minibatches=run.minibatches, world=run.world)
    batch = batch.replace(advantages=run.advantage(batch))
    tokens: list[int] = []
    embeddings = policy.vlm.language.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, inputs, output: tokens.append(inputs[0].numel()))
    with hook, FlopCounterMode(display=False) as counter, torch.no_grad():
        for minibatch in batch.split():
            for micro in minibatch.fit(policy.memory.tokens, policy.layout):
                policy.run(micro.groups)
    return counter.get_total_flops(), sum(tokens)


if __name__ == "__main__":
    main()
