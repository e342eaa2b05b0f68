"""The model that is trained, with its optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vlm_sapo.distributed import World
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.experts import RoutedPass
from vlm_sapo.models.forward import Pass
from vlm_sapo.models.packing import GroupSlice, Inputs, Layout, SharedPrefix
from vlm_sapo.models.parallel import Parallelism, Replicated
from vlm_sapo.models.vlm import PARTS, VLM
from vlm_sapo.models.weights import whole
from vlm_sapo.reporting.console import Console
from vlm_sapo.training.batch import MicroBatch, MiniBatch
from vlm_sapo.training.guard import Guard
from vlm_sapo.training.memory import Memory
from vlm_sapo.training.optimizer import Write, build_optimizer, load_state, schedule_factor, state_parts

ADAPTER = "adapter"
"""Folder of a checkpoint's adapter."""


Loss = Callable[[torch.Tensor, MicroBatch, MiniBatch], torch.Tensor]
"""Log-probs [N, T] of a micro-batch to its share of the mini-batch's loss."""
UNLIMITED = 2**62


class Unadapted(Pass):
    """The policy's pass without its adapters: a reference that costs no memory."""

    def forward(self, inputs: Inputs, routed: RoutedPass | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        with adapters.switched_off(self.vlm.model):
            return super().forward(inputs, routed)


class Policy:
    """Log-probs, gradients and updates of one model. `reference` is a frozen model for the KL term, or the
    same model where that is meant without its adapters.

    `layout` is how responses go through the model. With `reuse_sampled` the engine's log-probs serve as the
    old ones; otherwise the old ones are computed. An update of the very weights that drew the responses needs
    neither: its own pass gives them. With `replay` the experts of a mixture are those of the engine, where it
    told them, else those of the pass that gave the old log-probs. `balance` says that the loss wants the
    routers' probabilities with their gradient. `copies` says how several processes hold the
    model, `memory` how large a micro-batch may be, `guard` which updates must be left out.
    """

    def __init__(
        self,
        vlm: VLM,
        accelerator: Accelerator,
        *,
        total_steps: int,
        lr: float,
        schedule: str = "constant",
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        max_grad_norm: float = 1.0,
        temperature: float = 1.0,
        optimizer: str = "adamw",
        reference: VLM | None = None,
        layout: Layout | None = None,
        reuse_sampled: bool = False,
        parallelism: Parallelism | None = None,
        memory: Memory | None = None,
        replay: bool = False,
        balance: bool = False,
        guard: Guard | None = None,
    ):
        self.vlm, self.accelerator, self.max_grad_norm = vlm, accelerator, max_grad_norm
        self.temperature = temperature
        self.layout, self.reuse_sampled = layout or SharedPrefix(), reuse_sampled
        self.parallelism = parallelism or Replicated(World(), accelerator.device)
        self.memory = memory or Memory(UNLIMITED, Console())
        self.guard = guard or Guard(None, Console(), limit=0, world=World())
        self.parallelism.distribute(vlm)
        self.replay, self.balance = replay, balance
        self.named = {name: item for name, item in vlm.named_parameters() if item.requires_grad}
        self.trained = list(self.named.values())
        if not self.trained:
            raise ValueError("model.freeze must leave something to train; remove a part from it")
        self.forward_pass = Pass(vlm, temperature)
        self.optimizer = build_optimizer(
            optimizer, self.trained, lr=lr, betas=betas, weight_decay=weight_decay
        )
        self.reference = None if reference is None else self._reference(reference)
        self.schedule = {"kind": schedule, "warmup": warmup_steps, "total": total_steps}
        self.lr = lr

    def _reference(self, vlm: VLM) -> Pass:
        if vlm is self.vlm:
            return Unadapted(vlm, self.temperature)
        vlm.freeze(list(PARTS))
        self.parallelism.distribute(vlm)
        return Pass(vlm, self.temperature)

    def run(self, groups: Sequence[GroupSlice], layout: Layout | None = None):
        """Log-probs and entropies [N, T] of the response tokens."""
        return self._run(self.forward_pass, groups, layout or self.layout)

    def _run(self, forward_pass: Pass, groups: Sequence[GroupSlice], layout: Layout):
        inputs = layout.inputs(groups).to(self.accelerator.device)
        with self.autocast():
            return self.parallelism.run(forward_pass, inputs)

    def autocast(self) -> AbstractContextManager:
        """The precision of every pass."""
        return self.accelerator.autocast()

    def logprobs(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [N, T] of a micro-batch. Where it has no old log-probs yet, the model is
        still the one that drew it, and these are the old ones."""
        logprobs, entropies = self._pass(micro, first=micro.old is None)
        if micro.old is None:
            micro.old = logprobs.detach()
        return logprobs, entropies

    def _pass(self, micro: MicroBatch, *, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [N, T] of a micro-batch, and the usage of its experts. The first pass's
        experts are the old ones, unless the engine told its own."""
        inputs = self.layout.inputs(micro.groups).to(self.accelerator.device)
        replayed = micro.routes if self.replay else None
        routed = self.vlm.routers.watch(inputs, replayed, gradient=self.balance)
        with self.autocast():
            found = self.parallelism.run(self.forward_pass, inputs, routed)
        if routed is not None:
            micro.usage = routed.usage(micro.routes)
            if first and micro.routes is None:
                micro.routes = routed.routes()
        return found

    @torch.no_grad()
    def score(self, minibatches: list[MiniBatch], *, fresh: bool = True) -> None:
        """Fills in old and reference log-probs where they will be needed, before any update. `fresh` says
        that the present weights drew the responses."""
        trained = [minibatch for minibatch in minibatches if minibatch.micros]
        for minibatch in trained:
            own_pass = minibatch is trained[0] and (fresh or not self.reuse_sampled)
            done = self.memory.fitting(
                minibatch.micros, partial(self._score, own_pass=own_pass), layout=self.layout
            )
            minibatch.micros = [micro for micro, _ in done]

    def _score(self, micro: MicroBatch, *, own_pass: bool) -> None:
        self._move(micro)
        if not own_pass:
            micro.old = micro.sampled if self.reuse_sampled else self._pass(micro, first=True)[0]
        if self.reference is not None:
            micro.reference, _ = self._run(self.reference, micro.groups, self.layout)

    def accumulate(self, minibatch: MiniBatch, loss: Loss) -> Iterator[dict[str, Any]]:
        """Adds the gradient of a mini-batch's loss; what a meter wants to know of each micro-batch."""

        def learn(micro: MicroBatch) -> dict[str, Any]:
            logprobs, entropies = self.logprobs(micro)
            value = self.backward(loss(logprobs, micro, minibatch))
            self.guard.inspect(micro, logprobs.detach(), value)
            return {"loss": value, "logprobs": logprobs.detach(), "entropies": entropies}

        done = self.memory.fitting(minibatch.micros, learn, layout=self.layout, undo=self.optimizer.zero_grad)
        return (found | micro.tensors() for micro, found in done)

    def _move(self, micro: MicroBatch) -> None:
        device = self.accelerator.device
        micro.advantages, micro.mask = micro.advantages.to(device), micro.mask.to(device)
        micro.sampled = micro.sampled.to(device)

    def backward(self, loss: torch.Tensor) -> float:
        """Adds the loss's gradient; returns the loss."""
        loss.backward()
        return float(loss.detach())

    def step(self) -> float:
        """One optimizer update; returns the gradient's norm before clipping, NaN where the update was left
        out because it would have spoilt the weights."""
        norm = self.grad_norm()
        if self.guard.should_skip(float(norm)):
            self.optimizer.zero_grad()
            return math.nan
        clip_grads_with_norm_(self.trained, self.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.vlm.version += 1
        return float(norm)

    def grad_norm(self) -> torch.Tensor:
        """Norm of the gradient of all processes."""
        self.parallelism.reduce(self.trained)
        grads = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        return whole(get_total_norm(grads))

    def load_optimizer(self, folder: Path) -> None:
        """Takes over the optimizer's state from a checkpoint."""
        load_state(self.optimizer, self.named, folder)

    def set_step(self, step: int) -> float:
        """Sets the learning rate of a step (0-based) and returns it."""
        self.guard.step = step + 1
        rate = self.lr * schedule_factor(step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def parts(self, *, keep: bool = True, copy: bool = False) -> Iterator[Write]:
        """What writes a checkpoint into a folder, part by part: what `load_vlm` needs to go on (the adapter,
        where there is one, or else the model) and the optimizer. With `copy` no part changes when training
        goes on. Of a sharded model all processes go through it, and one keeps it."""
        attached = adapters.attached(self.vlm.model)
        weights = (self.vlm.adapter_weights if attached else self.vlm.weights)(keep=keep)
        if copy:
            weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items() if keep}
        if attached:
            yield lambda folder: self.vlm.save_adapter(folder / ADAPTER, weights)
        else:
            yield lambda folder: self.vlm.save(folder, weights)
        yield from state_parts(self.optimizer, self.named, keep=keep)

    def export(self, folder: Path, *, write: bool = True) -> None:
        """Writes model and processor, loadable by transformers' Auto classes, and beside it the adapter."""
        weights = self.vlm.weights(keep=write)
        if write:
            self.vlm.save(folder, weights)
        if adapters.attached(self.vlm.model):
            weights = self.vlm.adapter_weights(keep=write)
            if write:
                self.vlm.save_adapter(folder / ADAPTER, weights)
