"""Reinforcement learning: the loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from vlm_sapo.config.schema import TrainConfig
from vlm_sapo.reporting.callbacks import Callback
from vlm_sapo.rollout.sampler import Rollouts
from vlm_sapo.training.assignment import reassign
from vlm_sapo.training.batch import collate
from vlm_sapo.training.build import build_training
from vlm_sapo.training.folder import open_folder
from vlm_sapo.training.hub_use import publish, say_finished
from vlm_sapo.training.launch import join
from vlm_sapo.training.loss import PolicyLoss
from vlm_sapo.training.policy import Policy
from vlm_sapo.training.run import TrainingRun


def train(config: TrainConfig, callbacks: Sequence[Callback] = ()) -> dict:
    """Trains with a config; returns the summary. For a finished run only returns its summary."""
    processes = join(config)
    folder, config = open_folder(config, processes)
    if (summary := processes.world.on_main(folder.summary)) is not None:
        say_finished(config, folder, processes.console)
        return summary
    run, loss = build_training(config, folder, processes)
    with closing(run), run.interruption.handling_signals(), run.calling(callbacks):
        summary = loop(run, loss, config.train.steps)
    publish(config, folder, processes)
    return summary


def loop(run: TrainingRun, loss: PolicyLoss, steps: int) -> dict:
    """Runs the remaining of `steps` steps; returns the summary."""
    run.evaluate(run.progress.step, last=steps)
    with run.console.progress("train", steps, run.progress.step) as show:
        for step in range(run.progress.step + 1, steps + 1):
            show(step, train_step(step, run, run.rollouts, run.policy, loss))
            run.evaluate(step, last=steps)
            run.checkpoint_if_due(step, last=steps)
    return run.finish(steps)


def train_step(step: int, run: TrainingRun, rollouts: Rollouts, policy: Policy, loss: PolicyLoss) -> str:
    """One step: sample and score groups, update in mini-batches. Returns the console line."""
    run.begin_step()
    lr = policy.set_step(step - 1)
    with run.before_update("draw"):
        rollout = rollouts.next(step, policy.vlm)  # sync weights, sample, score
    with run.before_update("check"):
        checked = run.check(step, rollout)  # shared == plain, engine == trainer
    behind = policy.vlm.version - rollout.version
    batch = collate(
        rollout.groups,
        minibatches=run.minibatches,
        mask_truncated=run.mask_truncated,
        keep_zero_advantages=run.keep_zero_advantages,
        rewards_decide=run.advantage.rewards_decide,
        world=run.world,
    )
    scored_first = not run.advantage.rewards_decide  # the advantage may read log-probs
    with run.watch.time("old_logprobs"):
        batch = policy.score(batch, fresh=behind == 0) if scored_first else batch
    batch = batch.replace(advantages=run.advantage(batch))
    assigned, balance = reassign(batch, slots=rollout.slots, layout=policy.layout, world=run.world)
    with run.watch.time("old_logprobs"):  # and the reference's
        assigned = assigned if scored_first else policy.score(assigned, fresh=behind == 0)
    with run.watch.time("update"):
        updates = [policy.update(minibatch, loss) for minibatch in assigned.split()]
    run.end_step(step)
    epochs = run.stream.epochs(rollout.after)
    further = {"lr": lr, "rollout/updates_behind": behind} | epochs | checked | balance
    return run.log(step, rollout, (batch, assigned), updates, further)
