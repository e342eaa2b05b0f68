"""One process of several that makes updates on groups of very uneven sizes.

python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed.updates FOLDER, with cases.json in it
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh

from tests.conftest import example
from tests.training.test_batch import loss_of
from vlm_sapo.algo.advantages import zscore
from vlm_sapo.distributed import World
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.packing import Plain, SharedPrefix
from vlm_sapo.models.parallel import FullySharded, Replicated
from vlm_sapo.reporting.console import Console
from vlm_sapo.training import assignment
from vlm_sapo.training.batch import collate
from vlm_sapo.training.loss import GroupAdvantage
from vlm_sapo.training.optimizer import OptimizerSettings
from vlm_sapo.training.policy import MemoryBudget, Policy, PolicySettings, UpdateGuard
from vlm_sapo.types import Group, Response, Reward

MINIBATCHES, GROUPS = 2, 16


def uneven_groups(encode: Encoder) -> list[Group]:
    """Long responses where the slot is a multiple of four, so on one process; a quarter has zero variance."""
    numbers, groups = random.Random(0), []
    for slot in range(GROUPS):
        prompt = encode(example(slot, images=slot % 3))
        responses = []
        for _ in range(6):
            length = numbers.randint(20, 60) if slot % 4 == 0 else numbers.randint(1, 20)
            ids = torch.tensor([numbers.randint(10, 150) for _ in range(length)])
            logprobs = torch.tensor([-numbers.uniform(4, 6) for _ in range(length)])
            responses.append(
                Response.sampled(prompt.positions, ids, logprobs, text="", finish="length", version=0)
            )
        rewards = [1.0] * 6 if slot % 4 == 3 else [float(numbers.random() < 0.5) for _ in range(5)] + [0.5]
        groups.append(Group(prompt, tuple(responses), tuple(Reward(value, {}) for value in rewards)))
    return groups


def make_policy(case: dict, world: World) -> Policy:
    accelerator = Accelerator(cpu=True)
    settings = PolicySettings(
        OptimizerSettings(lr=1e-3, total_steps=10),
        layout=Plain() if case.get("plain") else SharedPrefix(),
        replay=case.get("replay", False),
    )
    sharded = case.get("sharded", False)
    mesh = init_device_mesh("cpu", (world.size,)) if sharded else None
    return Policy(
        load_vlm(case["model"]),
        accelerator,
        settings,
        parallelism=FullySharded(mesh, world, dtype=None, offload=False)
        if mesh
        else Replicated(world, accelerator.device),
        memory=MemoryBudget(400, Console(), can_shrink=not sharded),
        guard=UpdateGuard(None, Console(), limit=0, world=world),
        reference=load_vlm(case["model"]) if case.get("kl") else None,
    )


def run(case: dict, world: World, folder: Path) -> None:
    """Two updates; writes weights, and the tokens of each process by mini-batch."""
    AcceleratorState._reset_state(reset_partial_state=world.size == 1)
    torch.manual_seed(0)
    policy = make_policy(case, world)
    groups, slots = uneven_groups(Encoder(policy.vlm)), range(world.rank, GROUPS, world.size)
    batch = collate([groups[slot] for slot in slots], minibatches=MINIBATCHES, world=world)
    score, reassign = partial(policy.score, fresh=False), assignment.reassign
    assignment.TOLERANCE = 1.05 if case.get("moves", True) else 1e9
    if case.get("scored_first"):
        batch = score(replace(batch, rewards_decide=False))
    batch = batch.replace(advantages=GroupAdvantage(zscore)(batch))
    batch, metrics = reassign(batch, slots=list(slots), layout=policy.layout, world=world)
    batch = batch if case.get("scored_first") else score(batch)
    loss = loss_of(kl=0.1 if case.get("kl") else 0.0)
    stats = [policy.update(minibatch, loss) for minibatch in batch.split()]
    micros = [minibatch.fit(10**9, policy.layout) for minibatch in batch.split()]
    costs = [
        [policy.layout.costs(group.sizes) for micro in parts for group in micro.groups] for parts in micros
    ]
    tokens = [sum(once + sum(each) for once, each in groups) for groups in costs]
    rows = [
        [minibatch.origins[row] for row in update.rows.tolist()]
        for minibatch, update in zip(batch.split(), stats, strict=True)
    ]
    results = {"tokens": world.all_gather(tokens), "rows": world.all_gather(rows), "metrics": metrics}
    weights = policy.vlm.weights(keep=True)
    if world.main:
        torch.save(weights, folder / f"{case['name']}.pt")
        (folder / f"{case['name']}.json").write_text(json.dumps(results))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    world = World()
    for case in json.loads((folder / "cases.json").read_text()):
        run(case, world, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
