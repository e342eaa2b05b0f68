"""The model that is trained, with its optimizer and schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch.nn.functional import pad
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vlm_sapo.distributed import World
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.experts import ExpertRoutes, ExpertUsage, RoutedPass
from vlm_sapo.models.forward import Pass, Scores
from vlm_sapo.models.packing import GroupSlice, Inputs, Layout, Plain, SharedPrefix
from vlm_sapo.models.parallel import Parallelism
from vlm_sapo.models.vlm import PARTS, VLM
from vlm_sapo.models.weights import whole
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.metrics import UpdateStats
from vlm_sapo.training.batch import Batch, MicroBatch
from vlm_sapo.training.optimizer import (
    OptimizerSettings,
    Write,
    build_optimizer,
    load_state,
    state_parts,
)

ADAPTER = "adapter"
"""Folder of a checkpoint's adapter."""
T = TypeVar("T")


class NumbersError(ValueError):
    """Several updates in a row would have spoilt the weights."""


class Loss(Protocol):
    """What an update minimises; see training/loss.py."""

    needs_usage: bool
    """Whether it reads the routers' probabilities, with their gradient."""

    def __call__(self, passed: ForwardPass, micro: MicroBatch, minibatch: Batch) -> torch.Tensor:
        """A micro-batch's share of the mini-batch's loss."""

    def prepare(self, logprobs: torch.Tensor, minibatch: Batch) -> torch.Tensor | None:
        """[N, T] that the objective wants to know of the whole mini-batch, from its present log-probs."""

    @property
    def prepares(self) -> bool:
        """Whether `prepare` has to be called, after a pass without gradients."""


@dataclass(frozen=True)
class ForwardPass:
    """What a pass says of a micro-batch; log-probs, entropies and old log-probs are [N, T]."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    old: torch.Tensor
    usage: ExpertUsage | None
    """How the pass used the experts of an MoE model."""


@dataclass(frozen=True)
class PolicyState:
    """What a checkpoint keeps of a policy beside weights and optimizer."""

    updates: int
    skipped_in_a_row: int
    reuse_sampled: bool


class Unadapted(Pass):
    """The policy's pass without its adapters: a reference that costs no memory."""

    def forward(self, inputs: Inputs, routed: RoutedPass | None = None) -> Scores:
        with adapters.switched_off(self.vlm.model):
            return super().forward(inputs, routed)


class MemoryBudget:
    """The most tokens of a micro-batch, for the rest of the run.

    Where a pass runs out of memory its work is undone and done again with half of them: the result is the
    same, since no gradient depends on how a mini-batch is split. `can_shrink` is False where processes must
    run the same passes.
    """

    def __init__(self, tokens: int, console: Console, *, can_shrink: bool = True):
        self.tokens, self.console, self.can_shrink = tokens, console, can_shrink
        self.shortages = 0

    def shrink(self, tokens: int, reason: str, *, row: str | None = None) -> None:
        """Less than `tokens`, which were too many, from now on. `row` is that of a single response, which
        can't be made smaller: raises ValueError."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        remedy = "use model.gradient_checkpointing=true, model.lora, train.offload or smaller images"
        if not self.can_shrink:
            raise SystemExit(  # at once: the others wait for this process on their devices, not for a message
                f"error: a micro-batch of {tokens} tokens ran out of memory ({reason}), and a sharded model "
                f"can't run it in parts; set train.tokens_per_microbatch={tokens // 2}, or {remedy}"
            )
        if row is not None:
            raise ValueError(
                f"one response to {row}, {tokens} tokens with its prompt, does not fit into memory "
                f"({reason}); lower rollout.max_tokens, or {remedy}"
            )
        self.shortages += 1
        self.tokens = min(self.tokens, tokens) // 2
        self.console.warn(
            f"out of memory with {tokens} tokens ({reason}); goes on with micro-batches of {self.tokens}: "
            f"set train.tokens_per_microbatch={self.tokens} to save the attempts"
        )

    def shrink_below(self, micro: MicroBatch, reason: str, layout: Layout) -> None:
        """A micro-batch ran out of memory."""
        row = micro.groups[0].prompt.example.label if len(micro.rows) == 1 else None
        self.shrink(layout.size(micro.groups), reason, row=row)


class UpdateGuard:
    """Inspects every micro-batch's loss and importance ratios and each update's gradient, and skips updates
    that are not finite.

    `limit` updates in a row may be skipped; one more raises NumbersError. The micro-batch at fault goes to
    `folder`, as tensors and plain values.
    """

    def __init__(self, folder: Path | None, console: Console, *, limit: int, world: World):
        self.folder, self.console, self.limit, self.world = folder, console, limit, world
        self.skipped_in_a_row = 0
        self._first: tuple[str, MicroBatch, ForwardPass] | None = None

    def inspect(self, micro: MicroBatch, passed: ForwardPass, loss: float) -> None:
        """A micro-batch after its backward pass."""
        if self._first is None and (fault := _fault(micro, passed, loss)):
            self._first = fault, micro, passed

    def should_skip(self, norm: float, step: int) -> bool:
        """Whether the update that these micro-batches make must be left out; `norm` is its gradient's. All
        processes call it."""
        first, self._first = self._first, None
        faults = [fault for fault in self.world.all_gather(first and first[0]) if fault]
        if not faults and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return False
        self.skipped_in_a_row += 1
        fault = faults[0] if faults else f"the gradient's norm is {norm}"
        path = self._write(*first, step) if first else None
        path = next((path for path in self.world.all_gather(path) if path), "")
        text = f"step {step}: an update is left out, since {fault}" + (f"; see {path}" if path else "")
        if self.skipped_in_a_row > self.limit:
            raise NumbersError(
                f"{text}. It is number {self.skipped_in_a_row} in a row (train.bad_updates is {self.limit}); "
                "lower train.lr, use model.dtype=float32, or look at the rows that it names"
            )
        self.console.warn(text)
        return True

    def _write(self, fault: str, micro: MicroBatch, passed: ForwardPass, step: int) -> str:
        """Writes a micro-batch; returns where, or nothing without a folder or room."""
        if self.folder is None:
            return ""
        path = self.folder / f"step_{step:06d}_process_{self.world.rank}.pt"
        contents: dict[str, Any] = {
            "wrong": fault,
            "rows": [group.prompt.example.label for group in micro.groups],
            "prompts": [group.prompt.ids for group in micro.groups],
            "responses": [[response.ids for response in group.responses] for group in micro.groups],
            "logprobs": passed.logprobs.detach().cpu(),
            "old": passed.old.cpu(),
            "advantages": micro.advantages.cpu(),
            "mask": micro.mask.cpu(),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(contents, path)
        except (OSError, RuntimeError) as error:
            self.console.warn(f"{path} could not be written ({error})")
            return ""
        return str(path)


def _fault(micro: MicroBatch, passed: ForwardPass, loss: float) -> str:
    """What is not finite in a micro-batch, and in which row; or nothing."""
    ratios = torch.where(micro.mask, (passed.logprobs.detach() - passed.old).exp(), 1.0)
    if not bool((bad := ~ratios.isfinite()).any()):
        return "" if math.isfinite(loss) else f"the loss is {loss}"
    number, token = (int(index) for index in bad.nonzero()[0])
    rows = [group.prompt.example.label for group in micro.groups for _ in group.responses]
    value = float(ratios[number, token])
    return f"the importance ratio of token {token} of a response to {rows[number]} is {value}"


@dataclass(frozen=True)
class PolicySettings:
    """How a policy is trained."""

    optimizer: OptimizerSettings
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    """Log-probs are of logits divided by it."""
    reuse_sampled: bool = False
    """The engine's log-probs serve as the old ones, which are computed otherwise. An update of the very
    weights that sampled the responses needs neither: its own pass gives them."""
    replay: bool = False
    """Experts are those of the engine, where it reported them, else those of the pass that gave the old
    log-probs."""
    score_all: bool = False
    """Old log-probs are computed for all mini-batches, also where the update's own pass would give them."""


class Policy:
    """Log-probs, gradients and updates of one model. `reference` is a frozen model for the KL term, or the
    same model where that is meant without its adapters. `layout` is how responses go through the model,
    `parallelism` how several processes hold it, `memory` how large a micro-batch may be, `guard` which
    updates must be skipped.
    """

    def __init__(
        self,
        vlm: VLM,
        accelerator: Accelerator,
        settings: PolicySettings,
        *,
        parallelism: Parallelism,
        memory: MemoryBudget,
        guard: UpdateGuard,
        layout: Layout | None = None,
        reference: VLM | None = None,
    ):
        self.vlm, self.accelerator, self.settings = vlm, accelerator, settings
        self.parallelism, self.memory, self.guard = parallelism, memory, guard
        self.layout, self.reuse_sampled = layout or SharedPrefix(), settings.reuse_sampled
        self.world, self.current_step = guard.world, 0
        self.parallelism.distribute(vlm)
        self.named = {name: item for name, item in vlm.named_parameters() if item.requires_grad}
        self.trained = list(self.named.values())
        if not self.trained:
            raise ValueError("model.freeze must leave something to train; remove a part from it")
        self.forward_pass = Pass(vlm, settings.temperature)
        self.optimizer = build_optimizer(self.trained, settings.optimizer)
        self.reference = None if reference is None else self._reference(reference)

    def _reference(self, vlm: VLM) -> Pass:
        if vlm is self.vlm:
            return Unadapted(vlm, self.settings.temperature)
        vlm.freeze(list(PARTS))
        self.parallelism.distribute(vlm)
        return Pass(vlm, self.settings.temperature)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_exact(self) -> bool:
        """Whether it computes in float32 throughout."""
        return self.accelerator.mixed_precision == "no" and self.vlm.model.dtype == torch.float32

    def with_full_params(self, work: Callable[[], T]) -> T:
        """Runs work in which each process uses the whole model as often as it likes, without gradients."""
        return self.parallelism.with_full_params(self.vlm, work)

    def use_plain_layout(self) -> None:
        """Every response with a prompt of its own, from now on."""
        self.layout = Plain()

    def recompute_old_logprobs(self) -> None:
        """The engine's log-probs are not close enough to serve as old ones."""
        self.reuse_sampled = False

    def run(
        self,
        groups: Sequence[GroupSlice],
        layout: Layout | None = None,
        *,
        forward_pass: Pass | None = None,
        autocast: Callable[[], AbstractContextManager] | None = None,
    ) -> Scores:
        """Log-probs and entropies of the sampled tokens, by the policy's own pass and precision or others."""
        inputs = (layout or self.layout).inputs(groups).to(self.device)
        with (autocast or self.autocast)():
            return self.parallelism.run(forward_pass or self.forward_pass, inputs)

    def autocast(self) -> AbstractContextManager:
        """The precision of every pass."""
        return self.accelerator.autocast()

    def forward(
        self, micro: MicroBatch, *, usage_gradient: bool = False
    ) -> tuple[ForwardPass, ExpertRoutes | None]:
        """A pass over a micro-batch, and the experts that it used. Where there are no old log-probs yet, the
        model is still the one that sampled it, and these are the old ones."""
        inputs = self.layout.inputs(micro.groups).to(self.device)
        replayed = micro.routes if self.settings.replay else None
        routed = self.vlm.routers.watch(inputs, replayed, gradient=usage_gradient)
        with self.autocast():
            scores = self.parallelism.run(self.forward_pass, inputs, routed)
        old = scores.logprobs.detach() if micro.old is None else micro.old
        usage = None if routed is None else routed.usage(micro.routes)
        routes = None if routed is None else micro.routes or routed.routes()
        return ForwardPass(scores.logprobs, scores.entropies, old, usage), routes

    @torch.no_grad()
    def score(self, batch: Batch, *, fresh: bool) -> Batch:
        """The batch with old and reference log-probs where they will be needed, before any update. `fresh`
        says that the present weights sampled the responses."""
        minibatches = batch.split()
        flags = self.world.all_gather([any(minibatch.trained) for minibatch in minibatches])
        trained = [any(anywhere) for anywhere in zip(*flags, strict=True)]
        own = trained.index(True) if any(trained) and (fresh or not self.reuse_sampled) else None
        own = None if self.settings.score_all else own
        parts = [
            self._score(minibatch, on_policy=index == own) if trained[index] else _unscored(minibatch)
            for index, minibatch in enumerate(minibatches)
        ]
        return batch.replace(
            on_policy=torch.cat([part.on_policy for part in parts]),
            old=torch.cat([part.old for part in parts]),
            reference=None if self.reference is None else torch.cat([part.reference for part in parts]),
            routes=ExpertRoutes.join([(len(part.mask), part.routes) for part in parts]),
        )

    def _score(self, minibatch: Batch, *, on_policy: bool) -> Batch:
        recompute = not on_policy and not self.reuse_sampled
        if not recompute and self.reference is None:
            return _unscored(minibatch, on_policy=on_policy)
        while True:
            scored = _unscored(minibatch, on_policy=on_policy)
            routes: list[tuple[torch.Tensor, ExpertRoutes]] = []
            try:
                for micro in self._micro_batches(minibatch):
                    with naming(micro):
                        if recompute:
                            passed, used = self.forward(micro)
                            _write_rows(scored.old, micro, passed.logprobs)
                            routes += [] if used is None else [(micro.rows, used)]
                        if self.reference is not None:
                            scores = self.run(micro.groups, forward_pass=self.reference)
                            _write_rows(scored.reference, micro, scores.logprobs)
                return scored.replace(routes=ExpertRoutes.scatter(routes, minibatch.mask))
            except MemoryShortage as error:
                shortage = error.micro, error.reason
            self.memory.shrink_below(*shortage, self.layout)

    def update(self, minibatch: Batch, loss: Loss) -> UpdateStats | None:
        """One optimizer update; None where no process has anything to train on. All processes call it."""
        if not any(self.world.all_gather(any(minibatch.trained))):
            return None
        if loss.prepares:
            minibatch = self._prepare(minibatch, loss)
        learnt = self._accumulate(minibatch, loss)
        norm = self.step()
        return collect_stats(learnt, norm, reused=self.reuse_sampled and not _all_on_policy(minibatch))

    def _accumulate(self, minibatch: Batch, loss: Loss) -> list[tuple[MicroBatch, ForwardPass, float]]:
        """Adds the gradient of a mini-batch's loss. Returns each micro-batch with its pass and its loss."""
        while True:
            try:
                return [self._learn(micro, minibatch, loss) for micro in self._micro_batches(minibatch)]
            except MemoryShortage as error:
                shortage = error.micro, error.reason
            self.optimizer.zero_grad()
            self.memory.shrink_below(*shortage, self.layout)

    def _learn(
        self, micro: MicroBatch, minibatch: Batch, loss: Loss
    ) -> tuple[MicroBatch, ForwardPass, float]:
        with naming(micro):
            passed, _ = self.forward(micro, usage_gradient=loss.needs_usage)
            value = self.backward(loss(passed, micro, minibatch))
        passed = replace(passed, logprobs=passed.logprobs.detach())
        self.guard.inspect(micro, passed, value)
        return micro, passed, value

    @torch.no_grad()
    def _prepare(self, minibatch: Batch, loss: Loss) -> Batch:
        """The mini-batch with what the objective prepares for it as a whole, from its present log-probs."""
        while True:
            logprobs = torch.zeros_like(minibatch.sampled)
            try:
                for micro in self._micro_batches(minibatch):
                    with naming(micro):
                        passed, _ = self.forward(micro)
                    _write_rows(logprobs, micro, passed.logprobs)
                return minibatch.replace(prepared=loss.prepare(logprobs, minibatch))
            except MemoryShortage as error:
                shortage = error.micro, error.reason
            self.memory.shrink_below(*shortage, self.layout)

    def _micro_batches(self, minibatch: Batch) -> list[MicroBatch]:
        """Those of a mini-batch; where the model is sharded, as many as in every other process."""
        micros = minibatch.fit(self.memory.tokens, self.layout)
        missing = self.parallelism.align(len(micros)) - len(micros)
        return [micro.to(self.device) for micro in (*micros, *[minibatch.idle()] * missing)]

    def backward(self, loss: torch.Tensor) -> float:
        """Adds the loss's gradient; returns the loss."""
        loss.backward()
        return float(loss.detach())

    def step(self) -> float:
        """One optimizer update; returns the gradient's norm before clipping, NaN where the update was skipped
        because it would have spoilt the weights."""
        norm = self.grad_norm()
        if self.guard.should_skip(float(norm), self.current_step):
            self.optimizer.zero_grad()
            return math.nan
        clip_grads_with_norm_(self.trained, self.settings.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.vlm.version += 1
        return float(norm)

    def grad_norm(self) -> torch.Tensor:
        """Norm of the gradient of all processes."""
        self.parallelism.reduce(self.trained)
        grads = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        return whole(get_total_norm(grads))

    def set_step(self, step: int) -> float:
        """Sets the learning rate of a step (0-based) and returns it."""
        self.current_step = step + 1
        rate = self.settings.optimizer.rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def load(self, folder: Path, state: PolicyState) -> None:
        """Takes over the optimizer's state from a checkpoint, and the rest of the policy's."""
        load_state(self.optimizer, self.named, folder)
        self.vlm.version, self.reuse_sampled = state.updates, state.reuse_sampled
        self.guard.skipped_in_a_row = state.skipped_in_a_row

    def state(self) -> PolicyState:
        """What a checkpoint keeps beside weights and optimizer."""
        return PolicyState(self.vlm.version, self.guard.skipped_in_a_row, self.reuse_sampled)

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


class MemoryShortage(Exception):
    """A micro-batch for whose pass the device has not enough memory."""

    def __init__(self, micro: MicroBatch, reason: str):
        self.micro, self.reason = micro, reason


@contextmanager
def naming(micro: MicroBatch) -> Iterator[None]:
    """Says which micro-batch ran out of memory in the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryShortage(micro, str(error).partition(". ")[0]) from None


def _unscored(minibatch: Batch, *, on_policy: bool = False) -> Batch:
    """A mini-batch with the engine's log-probs as old ones, and none of a reference."""
    rows = torch.full((len(minibatch.mask),), on_policy)
    nothing = torch.zeros_like(minibatch.sampled)
    return minibatch.replace(on_policy=rows, old=minibatch.sampled.clone(), reference=nothing, routes=None)


def _write_rows(target: torch.Tensor, micro: MicroBatch, values: torch.Tensor) -> None:
    """Writes a micro-batch's values [n, t] to their rows of a mini-batch [N, T]; idle rows have none."""
    real = micro.rows >= 0
    target[micro.rows[real], : micro.mask.shape[1]] = values.cpu()[real]


def _all_on_policy(minibatch: Batch) -> bool:
    return minibatch.on_policy is None or bool(minibatch.on_policy.all())


def collect_stats(
    learnt: Sequence[tuple[MicroBatch, ForwardPass, float]], grad_norm: float, *, reused: bool
) -> UpdateStats:
    """What an update saw, from its micro-batches. `reused` says that the engine's log-probs were the old
    ones."""
    width = max((micro.mask.shape[1] for micro, _, _ in learnt), default=1)

    def join(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        padded = [pad(item.detach().cpu(), (0, width - item.shape[1])) for item in tensors]
        return torch.cat(padded) if padded else torch.zeros(0, width)

    rows = torch.cat([micro.rows for micro, _, _ in learnt]) if learnt else torch.zeros(0, dtype=torch.long)
    real = rows >= 0
    referenced = [micro.reference for micro, _, _ in learnt if micro.reference is not None]
    prepared = [micro.prepared for micro, _, _ in learnt if micro.prepared is not None]
    tensors = {
        "mask": join(micro.mask for micro, _, _ in learnt).bool(),
        "advantages": join(micro.advantages for micro, _, _ in learnt),
        "logprobs": join(passed.logprobs for _, passed, _ in learnt),
        "entropies": join(passed.entropies for _, passed, _ in learnt),
        "old": join(passed.old for _, passed, _ in learnt),
        "sampled": None if reused else join(micro.sampled for micro, _, _ in learnt),
        "reference": join(referenced) if len(referenced) == len(learnt) > 0 else None,
        "prepared": join(prepared) if len(prepared) == len(learnt) > 0 else None,
    }
    usages = [passed.usage.to_cpu(micro.rows >= 0) for micro, passed, _ in learnt if passed.usage is not None]
    return UpdateStats(
        rows=rows[real],
        usages=tuple(usages),
        loss=sum(value for _, _, value in learnt),
        grad_norm=grad_norm,
        skipped=math.isnan(grad_norm),
        **{name: None if item is None else item[real] for name, item in tensors.items()},
    )
