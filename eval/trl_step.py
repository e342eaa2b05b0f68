"""Times TRL's GRPOTrainer with its SAPO loss on the workload of eval/speed.py and prints one JSON line.

One further rollout batch runs first and is not counted. Runs in an environment of its own (`make bench`
makes one); imports nothing of this project. Keys as in eval/speed.py: `update` is what a rollout batch takes
beside generation, old log-probs and rewards.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

TIMED = {
    "generation": "_generate",
    "old_logprobs": "_get_per_token_logps_and_entropies",
    "scoring": "_generate_and_score_completions",
    "all": "training_step",
}


def rows(args: argparse.Namespace) -> list[dict]:
    """Noise images with a short question; prompts for two updates a step."""
    generator = np.random.default_rng(0)
    shape = (args.side, args.side, 3)
    return [
        {
            "prompt": [{"role": "user", "content": "how many circles are there? " * 3}],
            "images": [
                Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)) for _ in range(args.images)
            ],
        }
        for _ in range(2 * args.prompts * (args.steps + 2))
    ]


def reward(completions, **_) -> list[float]:
    """A number that differs within every group."""
    return [float(sum(map(ord, str(completion))) % 7) for completion in completions]


class Stopwatch(TrainerCallback):
    """Wall-clock seconds of a trainer's methods and in all, from the end of update `after` on."""

    def __init__(self, trainer: GRPOTrainer, *, after: int):
        self.after = after
        self.on_step_end(None, None, None)
        for label, name in TIMED.items():
            setattr(trainer, name, self._timed(label, getattr(trainer, name)))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state is None or state.global_step == self.after:
            self.seconds, self.start = dict.fromkeys(TIMED, 0.0), time.perf_counter()

    def _timed(self, label: str, method):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[label] += time.perf_counter() - start
            return result

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name, default in {
        "side": 512,
        "images": 1,
        "group": 8,
        "prompts": 4,
        "tokens": 64,
        "steps": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--unequal", action="store_true", help="responses end at random")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    print(json.dumps(measure(parser.parse_args())))


def measure(args: argparse.Namespace) -> dict:
    """Trains for the given rollout batches."""
    torch.manual_seed(0)
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    if args.unequal:
        model.generation_config.eos_token_id = list(range(7, len(processor.tokenizer), args.tokens))
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="sapo",
        beta=0.0,
        num_generations=args.group,
        per_device_train_batch_size=args.group * args.prompts // 2,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        max_steps=2 * (args.steps + 1),
        max_completion_length=args.tokens,
        generation_kwargs={} if args.unequal else {"min_new_tokens": args.tokens},
        temperature=1.0,
        learning_rate=1e-5,
        use_cpu=args.device == "cpu",
        bf16=args.device == "cuda" and args.dtype == "bfloat16",
        gradient_checkpointing=args.checkpointing,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows(args)),
        processing_class=processor,
        reward_funcs=reward,
    )
    watch = Stopwatch(trainer, after=2)
    trainer.add_callback(watch)
    trainer.train()
    seconds = {label: value / args.steps for label, value in watch.seconds.items()}
    result = {
        "seconds_per_rollout_batch": (time.perf_counter() - watch.start) / args.steps,
        "generation": seconds["generation"],
        "old_logprobs": seconds["scoring"] - seconds["generation"],
        "update": seconds["all"] - seconds["scoring"],
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    if args.device == "cuda":
        result["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {key: round(value, 3) for key, value in result.items()}


if __name__ == "__main__":
    main()
