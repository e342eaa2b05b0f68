"""Compares the memory that `vlm-sapo plan` predicts with the measured peak of the trainer's steps: a table.

    python eval/memory.py MODEL_DIR --side 256 [--device cuda]

On a CPU the bytes of all live tensors are counted, including the weights and the prepared images; on a GPU
the allocator's own peak is taken. Two steps of two updates each; every response has exactly
--tokens tokens, and every prompt is as long as the plan assumes.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow imports are inside the functions, since the reward's processes import workload.py
    from vlm_sapo.config.schema import TrainConfig

CASES: dict[str, dict[str, dict]] = {
    "everything trained": {},
    "vision frozen": {"model": {"freeze": ["vision", "merger"]}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "checkpointing, vision frozen": {
        "model": {"gradient_checkpointing": True, "freeze": ["vision", "merger"]}
    },
    "twice the budget": {"train": {"tokens_per_microbatch": 2}},
    "half the budget": {"train": {"tokens_per_microbatch": 0.5}},
    "bf16 autocast": {"train": {"precision": "bf16"}},
    "bfloat16 weights, checkpointing": {"model": {"dtype": "bfloat16", "gradient_checkpointing": True}},
    "adapters": {"model": {"lora": {"rank": 8}}},
    "adapters, bf16 autocast, checkpointing": {
        "model": {"lora": {"rank": 8}, "gradient_checkpointing": True},
        "train": {"precision": "bf16"},
    },
    "kl": {"algo": {"kl": 0.1}},
    "kl, vision frozen, one prompt per batch": {
        "algo": {"kl": 0.1},
        "model": {"freeze": ["vision", "merger"]},
        "rollout": {"prompts_per_batch": 1},
    },
}


def configure(args: argparse.Namespace, case: dict[str, dict], folder: str) -> TrainConfig:
    """The run that is measured; a budget in `case` is a factor of a group's tokens."""
    from vlm_sapo.config.schema import TrainConfig
    from vlm_sapo.data.sources import build_examples
    from vlm_sapo.models.encode import Encoder
    from vlm_sapo.models.loading import load_outline

    here = str(Path(__file__).resolve().with_name("workload.py"))
    sizes = {"count": 2 * args.prompts, "side": args.side, "images": 1}
    pixels = {"min_pixels": args.side**2, "max_pixels": args.side**2}
    values: dict[str, dict] = {
        "run": {"dir": folder, "overwrite": True},
        "model": {"path": args.model, "dtype": args.dtype, **pixels},
        "data": {"source": f"{here}:rows", "args": sizes},
        "rollout": {"group": args.group, "max_tokens": args.tokens, "prompts_per_batch": args.prompts},
        "reward": {"parts": [{"name": f"{here}:reward"}]},
        "train": {"steps": 2, "lr": 1e-5, "prompts_per_step": args.prompts, "minibatches": 2},
        "checkpoint": {"every": 0},
    }
    for section, fields in case.items():
        values[section] = values.get(section, {}) | fields
    [task] = TrainConfig.model_validate(values | {"train": {"steps": 1}}).data.tasks
    prompt = len(Encoder(load_outline(args.model), **pixels)(build_examples(task)[0]).ids)
    values["data"]["max_prompt_tokens"] = prompt
    factor = values["train"].pop("tokens_per_microbatch", 1)
    values["train"]["tokens_per_microbatch"] = int(factor * (prompt + args.group * args.tokens))
    return TrainConfig.model_validate(values)


def predict(config: TrainConfig, device: str) -> float:
    """The peak of tensor memory that the plan predicts, in bytes."""
    from vlm_sapo.tools.plan.estimate import Estimator
    from vlm_sapo.tools.plan.memory import GB, GPU_ONLY, OUTSIDE, Gpus

    estimate = Estimator(config, Gpus(1, 1, 1000 * GB)).estimate()
    pixels = dict(estimate.host)["image pixels"] if device == "cpu" else 0
    totals = estimate.without(GPU_ONLY if device == "cpu" else OUTSIDE)
    return max(totals["training"], totals["generating"]) + pixels


def measure(config: TrainConfig, device: str) -> float:
    """The peak memory of the steps, in bytes."""
    import gc

    import torch
    from accelerate.state import AcceleratorState

    from vlm_sapo.reporting.console import Console
    from vlm_sapo.tools.plan.simulate import MemoryCounter
    from vlm_sapo.training.build import build_training
    from vlm_sapo.training.folder import open_folder
    from vlm_sapo.training.launch import join
    from vlm_sapo.training.trainer import loop

    AcceleratorState._reset_state(reset_partial_state=True)  # each case may have another precision
    gc.collect()  # an earlier case's model
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    processes = join(config, Console())
    folder, config = open_folder(config, processes)
    run, loss = build_training(config, folder, processes)
    policy = run.policy
    policy.vlm.stops = [-1]
    models = [policy.vlm] + ([policy.reference.vlm] if config.algo.kl else [])
    weights = sum(parameter.nbytes for vlm in models for parameter in vlm.parameters())
    with closing(run), MemoryCounter() as counter:
        loop(run, loss, config.train.steps)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return counter.peak + weights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only these")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU; none is visible here")
    lines = ["| setting | predicted | measured | predicted / measured |", "|---|---|---|---|"]
    for name in args.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            config = configure(args, CASES[name], folder)
            predicted, measured = predict(config, args.device), measure(config, args.device)
        ratio = predicted / measured
        lines.append(f"| {name} | {predicted / 1e6:.1f} MB | {measured / 1e6:.1f} MB | {ratio:.3f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
