"""The model that is trained, with its optimizer and schedule."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from vlm_sapo.models.logprobs import Inputs, PlainPass
from vlm_sapo.models.vlm import VLM
from vlm_sapo.training.batch import MicroBatch, MiniBatch


def schedule_factor(step: int, *, kind: str, warmup: int, total: int) -> float:
    """Factor of the peak learning rate at a step (0-based) of `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[kind]


class Policy:
    """Log-probs, gradients and updates of one model; `reference` is a frozen model for the KL term."""

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
    ):
        self.vlm, self.accelerator, self.max_grad_norm = vlm, accelerator, max_grad_norm
        trained = [parameter for parameter in vlm.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("model.freeze must leave something to train; remove a part from it")
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay)
        self.forward_pass, self.optimizer = accelerator.prepare(PlainPass(vlm, temperature), optimizer)
        self.reference = (
            None if reference is None else PlainPass(reference, temperature).requires_grad_(False)
        )
        self.schedule = {"kind": schedule, "warmup": warmup_steps, "total": total_steps}
        self.lr = lr

    def logprobs(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies [N, T] of the response tokens."""
        return self.forward_pass(inputs.to(self.accelerator.device))

    @torch.no_grad()
    def score(self, minibatches: list[MiniBatch]) -> list[MiniBatch]:
        """Fills in the old (and reference) log-probs of every micro-batch, before any update."""
        for minibatch in minibatches:
            minibatch.micros = [self._score(micro) for micro in minibatch.micros]
        return minibatches

    def _score(self, micro: MicroBatch) -> MicroBatch:
        device = self.accelerator.device
        inputs = micro.inputs().to(device)
        old, _ = self.forward_pass(inputs)
        reference = None
        if self.reference is not None:
            with self.accelerator.autocast():
                reference, _ = self.reference(inputs)
        moved = {"advantages": micro.advantages.to(device), "mask": micro.mask.to(device)}
        return replace(micro, old=old, reference=reference, **moved)

    def backward(self, loss: torch.Tensor) -> float:
        """Adds the loss's gradient; returns the loss."""
        self.accelerator.backward(loss)
        return float(loss.detach())

    def step(self) -> float:
        """One optimizer update; returns the gradient's norm before clipping."""
        norm = self.accelerator.clip_grad_norm_(self.forward_pass.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
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
