"""The model that is trained, with its optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from vlm_sapo.models.layout import Branches, Layout, SharedPrefix
from vlm_sapo.models.logprobs import Pass
from vlm_sapo.models.vlm import VLM
from vlm_sapo.training.batch import MicroBatch, MiniBatch


def schedule_factor(step: int, *, kind: str, warmup: int, total: int) -> float:
    """Factor of the peak learning rate at a step (0-based) of `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]


class Policy:
    """Log-probs, gradients and updates of one model; `reference` is a frozen model for the KL term.

    `layout` is how responses go through the model. With `reuse_sampled` the engine's log-probs serve as the
    old ones; otherwise the old ones are computed. An update of the very weights that drew the responses needs
    neither: its own pass gives them. With `replay` the experts of a mixture are those of the engine, where it
    told them, else those of the pass that gave the old log-probs. `balance` says that the loss wants the
    routers' probabilities with their gradient.
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
        reference: VLM | None = None,
        layout: Layout | None = None,
        reuse_sampled: bool = False,
        replay: bool = False,
        balance: bool = False,
    ):
        self.vlm, self.accelerator, self.max_grad_norm = vlm, accelerator, max_grad_norm
        self.temperature = temperature
        self.layout, self.reuse_sampled = layout or SharedPrefix(), reuse_sampled
        self.replay, self.balance = replay, balance
        trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("model.freeze must leave something to train; remove a part from it")
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
        self.forward_pass, self.optimizer = accelerator.prepare(Pass(vlm, temperature), optimizer)
        self.reference = None if reference is None else Pass(reference, temperature).requires_grad_(False)
        self.schedule = {"kind": schedule, "warmup": warmup_steps, "total": total_steps}
        self.lr = lr

    def run(self, groups: Sequence[Branches], layout: Layout | None = None):
        """Log-probs and entropies [N, T] of the response tokens."""
        inputs = (layout or self.layout).inputs(groups)
        return self.forward_pass(inputs.to(self.accelerator.device))

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
        found = self.forward_pass(inputs, routed)
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
            for micro in minibatch.micros:
                self._move(micro)
                own_pass = minibatch is trained[0] and (fresh or not self.reuse_sampled)
                if not own_pass:
                    micro.old = micro.sampled if self.reuse_sampled else self._pass(micro, first=True)[0]
                if self.reference is not None:
                    inputs = self.layout.inputs(micro.groups).to(self.accelerator.device)
                    with self.accelerator.autocast():
                        micro.reference, _ = self.reference(inputs)

    def _move(self, micro: MicroBatch) -> None:
        device = self.accelerator.device
        micro.advantages, micro.mask = micro.advantages.to(device), micro.mask.to(device)
        micro.sampled = micro.sampled.to(device)

    def backward(self, loss: torch.Tensor) -> float:
        """Adds the loss's gradient; returns the loss."""
        self.accelerator.backward(loss)
        return float(loss.detach())

    def step(self) -> float:
        """One optimizer update; returns the gradient's norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self.forward_pass.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.vlm.version += 1
        return float(norm)

    def set_step(self, step: int) -> float:
        """Sets the learning rate of a step (0-based) and returns it."""
        rate = self.lr * schedule_factor(step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def save(self, folder: Path) -> None:
        """Writes model and processor, loadable by transformers' Auto classes."""
        self.vlm.save(folder)
