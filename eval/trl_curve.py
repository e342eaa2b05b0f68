"""The stability study's task under TRL's GRPOTrainer with its SAPO loss, and whether its update is ours.

    python eval/trl_curve.py train --seeds 1 2 3
    python eval/trl_curve.py update

Both need an environment with TRL and this project (`make .venv-trl/installed`). `train` runs the steps
of configs/shapes_hard.yaml with TRL's data order and sampling, measures its models with our evaluation, and
adds the results to docs/stability/trl.json. `update` lets TRL sample one rollout batch and make its updates,
gives the same responses and advantages to our trainer, and prints how far gradients and weights differ.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import closing, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from vlm_sapo import load_config
from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.data.sources import build_examples
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.plugins import locate, resolve
from vlm_sapo.types import Example

CONFIG = "shapes_hard"
RESULTS = Path(__file__).resolve().parent.parent / "docs/stability/trl.json"
COLUMNS = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Image()),
        "row": Value("int64"),
    }
)


def trainer(
    config: TrainConfig, examples: list[Example], folder: str, *, steps: int, seed: int
) -> GRPOTrainer:
    """TRL's, with the config's sizes and its reward."""
    train, sizes = config.train, config.rollout
    noisy = config.reward.parts[0]
    reward = resolve(noisy.name, field="reward.parts")
    rows = [
        {"prompt": [{"role": "user", "content": item.problem}], "images": list(item.images), "row": row}
        for row, item in enumerate(examples)
    ]

    def score(completions, row, **_) -> list[float]:
        return [
            reward(completion[0]["content"], examples[index], **noisy.args)
            for completion, index in zip(completions, row, strict=True)
        ]

    path = locate(config.model.path)
    return GRPOTrainer(
        model=AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32),
        args=GRPOConfig(
            output_dir=folder,
            loss_type="sapo",
            beta=0.0,
            num_generations=sizes.group,
            per_device_train_batch_size=train.prompts_per_step // train.minibatches * sizes.group,
            steps_per_generation=train.minibatches,
            gradient_accumulation_steps=1,
            max_steps=steps * train.minibatches,
            max_completion_length=sizes.max_tokens,
            temperature=sizes.temperature,
            learning_rate=train.lr,
            lr_scheduler_type=train.schedule,
            max_grad_norm=train.max_grad_norm,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="steps",
            save_steps=max(1, config.eval.every * train.minibatches),
            save_only_model=True,
            logging_steps=train.minibatches,
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_list(rows, features=COLUMNS),
        processing_class=AutoProcessor.from_pretrained(path),
        reward_funcs=score,
    )


def measure(config: TrainConfig, model: Path) -> float:
    """Held-out pass@1 of a model, as a run of the config measures it."""

    from vlm_sapo.reporting.console import Console
    from vlm_sapo.training.build import build_training
    from vlm_sapo.training.folder import open_folder
    from vlm_sapo.training.launch import join

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        changed = config.model_copy(deep=True)
        changed.model.path, changed.run.dir = str(model), folder
        processes = join(changed, Console())
        opened, changed = open_folder(changed, processes)
        run, _ = build_training(changed, opened, processes)
        with closing(run):
            run.evaluate(0, last=-1)
            return run.folder.read("evaluations.jsonl")[0]["pass@1"]


def train_curve(config: TrainConfig, seed: int) -> dict[str, Any]:
    """One run: held-out pass@1 by step, and seconds of training."""
    with tempfile.TemporaryDirectory() as folder:
        examples = list(build_examples(config.data.tasks[0], task="train"))
        grpo_trainer = trainer(config, examples, folder, steps=config.train.steps, seed=seed)
        started = time.perf_counter()
        grpo_trainer.train()
        seconds = time.perf_counter() - started
        curve = [[0, measure(config, Path(locate(config.model.path)))]]
        for path in sorted(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name[11:])):
            grpo_trainer.processing_class.save_pretrained(path)
            curve.append([int(path.name[11:]) // config.train.minibatches, round(measure(config, path), 4)])
    return {
        "seed": seed,
        "evaluations": curve,
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


class Recorder(TrainerCallback):
    """Records the mini-batches of TRL's first rollout batch, each update's gradient, and the weights."""

    def __init__(self, grpo_trainer: GRPOTrainer):
        self.batches: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.model, self.prepare = grpo_trainer.model, grpo_trainer._prepare_inputs
        grpo_trainer._prepare_inputs = self._prepared

    def _prepared(self, batch):
        inputs = self.prepare(batch)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
        self.batches.append({name: inputs[name].clone() for name in names})
        return inputs

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.gradients.append(
            {name: item.grad.clone() for name, item in self.model.named_parameters() if item.grad is not None}
        )


def compare_updates(config: TrainConfig) -> list[str]:
    """Lines of a table: by update, the relative distance of clipped gradients, and of weights afterwards."""
    from vlm_sapo.config.schema import AlgoConfig
    from vlm_sapo.training.loss import build_loss

    rows = build_examples(config.data.tasks[0], task="train")
    examples = list({item.problem: item for item in rows}.values())  # a prompt's text identifies its image
    with tempfile.TemporaryDirectory() as folder:
        grpo_trainer = trainer(config, examples, folder, steps=1, seed=0)
        recorder = Recorder(grpo_trainer)
        grpo_trainer.add_callback(recorder)
        grpo_trainer.train()
    vlm = load_vlm(str(locate(config.model.path)))
    vlm.banned = []  # TRL bans no image tokens
    before = {name: item.detach().clone() for name, item in vlm.model.named_parameters()}
    encode = Encoder(vlm)
    prompts = {tuple(prompt.ids.tolist()): prompt for prompt in map(encode, examples)}
    policy, loss = our_policy(vlm, config.train.lr), build_loss(AlgoConfig(), max_tokens=1)
    policy.set_step(0)
    minibatches = [policy.score(our_batch(batch, prompts), fresh=False) for batch in recorder.batches]
    lines = ["| update | gradients differ by | weights' changes differ by |", "| --- | --- | --- |"]
    theirs = dict(grpo_trainer.model.named_parameters())
    gradients = Gradients(policy)
    for number, (minibatch, gradient) in enumerate(zip(minibatches, recorder.gradients, strict=True), 1):
        policy.update(minibatch, loss)
        own = gradients.latest
        apart = distance([own[name] for name in gradient], list(gradient.values()))
        lines.append(f"| {number} | {apart:.1e} | |")
    own = {name: item.detach() - before[name] for name, item in vlm.model.named_parameters()}
    apart = distance(list(own.values()), [theirs[name].detach() - before[name] for name in own])
    lines[-1] = lines[-1].removesuffix(" |") + f"{apart:.1e} |"
    return lines


class Gradients:
    """The clipped gradients of a policy's latest update."""

    def __init__(self, policy):
        self.policy, self.latest = policy, {}
        policy.optimizer.register_step_pre_hook(self._record)

    def _record(self, *_) -> None:
        named = self.policy.vlm.model.named_parameters()
        self.latest = {name: item.grad.clone() for name, item in named if item.grad is not None}


def our_policy(vlm, lr: float):
    """A policy with the defaults of a run."""
    from accelerate import Accelerator

    from vlm_sapo.distributed import World
    from vlm_sapo.models.parallel import Replicated
    from vlm_sapo.reporting.console import Console
    from vlm_sapo.training.optimizer import OptimizerSettings
    from vlm_sapo.training.policy import MemoryBudget, Policy, PolicySettings, UpdateGuard

    accelerator, console = Accelerator(cpu=True), Console()
    return Policy(
        vlm,
        accelerator,
        PolicySettings(OptimizerSettings(lr=lr, total_steps=1)),
        parallelism=Replicated(World(), accelerator.device),
        memory=MemoryBudget(2**40, console),
        guard=UpdateGuard(None, console, limit=0, world=World()),
    )


def our_batch(batch: dict[str, torch.Tensor], prompts: dict):
    """One of TRL's mini-batches, each prompt with its responses, with TRL's advantages."""
    from vlm_sapo.training.batch import collate
    from vlm_sapo.types import Group, Response

    groups: dict[tuple, list[tuple[Response, float]]] = {}
    for row, advantage in enumerate(batch["advantages"].tolist()):
        key = tuple(batch["prompt_ids"][row][batch["prompt_mask"][row].bool()].tolist())
        ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        response = Response.sampled(
            prompts[key].positions, ids, torch.zeros(len(ids)), text="", finish="stop"
        )
        groups.setdefault(key, []).append((response, advantage))
    collated = collate(
        [Group(prompts[key], tuple(item for item, _ in rows), ()) for key, rows in groups.items()],
        minibatches=1,
        rewards_decide=False,
    )
    values = torch.tensor([value for rows in groups.values() for _, value in rows], dtype=torch.float64)
    return collated.replace(advantages=values[:, None].expand(collated.mask.shape))


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """|a - b| / |b| over all tensors."""
    difference = sum(float(((a - b).double() ** 2).sum()) for a, b in zip(one, other, strict=True))
    return (difference / sum(float((b.double() ** 2).sum()) for b in other)) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["train", "update"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--override", action="append", default=[], help="of the config, as for vlm-sapo train"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.verb == "train" and args.override and args.results == RESULTS:
        parser.error(f"--override makes another task than the one in {RESULTS}; give --results")
    config = load_config(CONFIG, *args.override)
    if args.verb == "update":
        print("\n".join(compare_updates(config)))
        return
    rows = json.loads(args.results.read_text()) if args.results.is_file() else []
    for seed in (seed for seed in args.seeds if seed not in [row["seed"] for row in rows]):
        rows.append(train_curve(config, seed))
        lines = ",\n".join(json.dumps(row) for row in rows)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(f"[\n{lines}\n]\n")
        print(json.dumps(rows[-1]))


if __name__ == "__main__":
    main()
