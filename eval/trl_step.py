"""Times TRL's GRPOTrainer with its SAPO loss on the workload of eval/speed.py and prints one JSON line.

One further rollout batch runs first and is not counted. Runs in an environment of its own (`make bench`
makes one); imports nothing of this project. Keys as in eval/speed.py: `update` is what a rollout batch takes
beside generation, old log-probs and rewards. With --turns 2 every turn but the last ends with a forced call,
which TRL's loop for tools answers with a quarter of the image; the tokens before it are sampled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import qwen3_template

TIMED = {
    "generation": "_generate",
    "old_logprobs": "_get_per_token_logps_and_entropies",
    "scoring": "_generate_and_score_completions",
    "all": "training_step",
}
CALL = '<tool_call>\n{"name": "crop", "arguments": {}}\n</tool_call>'
TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + ('user\\n<tool_response>' if message.role == 'tool' else message.role) + '\\n' }}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{- part.text }}
{%- endif %}
{%- endfor %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- ('\\n</tool_response>' if message.role == 'tool' else '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""The small model's chat layout with calls and their answers as Qwen3-VL's has them. It doesn't describe the
tools, so that prompts have as many tokens as ours."""


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


class Cropper:
    """Has a tool that returns a quarter of the image."""

    def reset(self, images, **_) -> None:
        self._image = images[0]

    def crop(self) -> list:
        """Shows a quarter of the image."""
        size = (self._image.width // 2, self._image.height // 2)
        return [{"type": "image", "image": self._image.crop((0, 0, *size))}]


class Ending(LogitsProcessor):
    """Ends sequences at the length `end` with `tail`, and keeps special tokens out before."""

    def __init__(self, end: int, tail: list[int], special: list[int]):
        self.end, self.tail, self.special = end, tail, special

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        left = self.end - input_ids.shape[1]
        if left > len(self.tail):
            scores[:, self.special] = float("-inf")
            return scores
        only = torch.full_like(scores, float("-inf"))
        only[:, self.tail[-left]] = 0.0
        return only


def take_turns(model, tokenizer, args: argparse.Namespace) -> None:
    """Makes the model's turns exactly as long as they shall be, all but the last with a call at the end."""
    generate, numbers = model.generate, itertools.cycle(range(1, args.turns + 1))
    call, end = tokenizer(CALL)["input_ids"], [tokenizer.eos_token_id]
    if len(call) >= args.tokens:
        raise ValueError(f"--tokens must exceed {len(call)}, the length of a call")

    def turn(input_ids, **inputs):
        if len(input_ids) != args.group * args.prompts:
            raise RuntimeError(f"only {len(input_ids)} of {args.group * args.prompts} responses go on")
        tail = end if next(numbers) == args.turns else call + end
        ending = Ending(input_ids.shape[1] + args.tokens, tail, tokenizer.all_special_ids)
        return generate(input_ids=input_ids, **inputs, logits_processor=LogitsProcessorList([ending]))

    model.generate = turn


class Stopwatch(TrainerCallback):
    """Wall-clock seconds of a trainer's methods and in all, and the tokens that forward passes with gradients
    read, from the end of update `after` on."""

    def __init__(self, trainer: GRPOTrainer, *, after: int):
        self.after = after
        self.on_step_end(None, None, None)
        for label, name in TIMED.items():
            setattr(trainer, name, self._timed(label, getattr(trainer, name)))
        trainer.model.get_input_embeddings().register_forward_hook(self._count)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state is None or state.global_step == self.after:
            self.seconds, self.start = dict.fromkeys(TIMED, 0.0), time.perf_counter()
            self.tokens = 0

    def _count(self, module, inputs, output) -> None:
        self.tokens += inputs[0].numel() if torch.is_grad_enabled() else 0

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
        "turns": 1,
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
    limit, options = args.tokens, {} if args.unequal else {"min_new_tokens": args.tokens}
    environment = None
    if args.turns > 1:
        limit = args.turns * args.tokens + (args.turns - 1) * (args.side**2 // 1024 + 64)
        options, environment = {}, Cropper
        processor.chat_template, processor.tokenizer.response_template = TEMPLATE, qwen3_template
        take_turns(model, processor.tokenizer, args)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="sapo",
        beta=0.0,
        num_generations=args.group,
        per_device_train_batch_size=args.group * args.prompts // 2,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        max_steps=2 * (args.steps + 1),
        max_completion_length=limit,
        generation_kwargs=options,
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
        environment_factory=environment,
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
        "update_tokens": watch.tokens // args.steps,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    if args.device == "cuda":
        result["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {key: round(value, 3) for key, value in result.items()}


if __name__ == "__main__":
    main()
