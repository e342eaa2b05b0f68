"""The trained model with its optimizer: log-probs, gradients, updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch.nn.functional import pad
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vlm_sapo.distributed import World
from vlm_sapo.models import lora as adapters
from vlm_sapo.models.device import out_of_memory, release_memory, shortage_reason
from vlm_sapo.models.experts import ExpertRoutes, ExpertUsage, RoutedPass
from vlm_sapo.models.forward import Pass, Scores
from vlm_sapo.models.packing import GroupSlice, Inputs, Layout, Plain, SharedPrefix
from vlm_sapo.models.parallel import Parallelism
from vlm_sapo.models.vlm import PARTS, VLM
from vlm_sapo.models.weights import full_tensor, save_index, save_share
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.metrics import UpdateStats
from vlm_sapo.training.batch import Batch, MicroBatch
from vlm_sapo.training.optimizer import (
    OptimizerSettings,
    Shares,
    Write,
    build_optimizer,
    load_state,
    state_parts,
)

ADAPTER = "adapter"
"""Folder of a checkpoint's adapter."""
T = TypeVar("T")


class NumbersError(ValueError):
    """Too many updates in a row were not finite."""


class Loss(Protocol):
    """What an update minimizes; see training/loss.py."""

    needs_usage: bool
    """Whether it needs the routers' probabilities, with their gradient."""

    def __call__(self, passed: ForwardPass, micro: MicroBatch, minibatch: Batch) -> torch.Tensor:
        """The micro-batch's share of the mini-batch's loss."""

    def prepare(self, logprobs: torch.Tensor, minibatch: Batch) -> torch.Tensor | None:
        """[N, T] that the objective computes for the whole mini-batch, from its current log-probs."""

    @property
    def prepares(self) -> bool:
        """Whether `prepare` must be called, after a pass without gradients."""


@dataclass(frozen=True)
class ForwardPass:
    """Results of a pass over a micro-batch; log-probs, entropies and old log-probs are [N, T]."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    old: torch.Tensor
    usage: ExpertUsage | None
    """Use of the experts of an MoE model."""


@dataclass(frozen=True)
class Learnt:
    """A micro-batch whose gradient was added; its tensors are in host memory."""

    micro: MicroBatch
    passed: ForwardPass
    loss: float
    """Its share of the mini-batch's loss."""


@dataclass(frozen=True)
class PolicyState:
    """State of a policy in a checkpoint, besides weights and optimizer."""

    updates: int
    skipped_in_a_row: int
    reuse_sampled: bool


class Unadapted(Pass):
    """The policy's pass without its adapters: a reference model that needs no memory."""

    def forward(self, inputs: Inputs, routed: RoutedPass | None = None) -> Scores:
        with adapters.disabled(self.vlm.model):
            return super().forward(inputs, routed)


class MemoryBudget:
    """The most tokens of a micro-batch.

    When a pass runs out of memory, the budget is halved for the rest of the run and the pass is retried. The
    result is the same, since no gradient depends on how a mini-batch is split. `can_shrink` is False if all
    processes must run the same passes.
    """

    def __init__(self, tokens: int, console: Console, *, can_shrink: bool = True):
        self.tokens, self.console, self.can_shrink = tokens, console, can_shrink
        self.shortages = 0

    def shrink(self, tokens: int, reason: str, *, row: str | None = None) -> None:
        """Halves the budget, after `tokens` were too many. `row` names the row of a single response, which
        can't be split: raises ValueError."""
        release_memory()
        remedy = "use model.gradient_checkpointing=true, model.lora, train.offload or smaller images"
        if not self.can_shrink:
            raise SystemExit(  # the others wait for this process on their devices, not for a message
                f"error: a micro-batch of {tokens} tokens ran out of memory ({reason}), and a sharded model "
                f"can't split it; set train.tokens_per_microbatch={tokens // 2}, or {remedy}"
            )
        if row is not None:
            raise ValueError(
                f"one response to {row}, {tokens} tokens with its prompt, does not fit into memory "
                f"({reason}); lower rollout.max_tokens, or {remedy}"
            )
        self.shortages += 1
        self.tokens = min(self.tokens, tokens) // 2
        self.console.warn(
            f"out of memory with {tokens} tokens ({reason}); continuing with micro-batches of {self.tokens}: "
            f"set train.tokens_per_microbatch={self.tokens} to avoid the retry"
        )

    def shrink_below(self, micro: MicroBatch, reason: str, layout: Layout) -> None:
        """Halves the budget, after a micro-batch ran out of memory."""
        row = micro.groups[0].prompt.example.label if len(micro.rows) == 1 else None
        self.shrink(layout.size(micro.groups), reason, row=row)


class UpdateGuard:
    """Skips updates with a non-finite loss, importance ratio or gradient.

    `limit` updates in a row may be skipped; one more raises NumbersError. The faulty micro-batch is saved in
    `folder`, as tensors and plain values.
    """

    def __init__(self, folder: Path | None, console: Console, *, limit: int, world: World):
        self.folder, self.console, self.limit, self.world = folder, console, limit, world
        self.skipped_in_a_row = 0
        self._first: tuple[str, MicroBatch, ForwardPass] | None = None

    def inspect(self, micro: MicroBatch, passed: ForwardPass, loss: float) -> None:
        """Inspects a micro-batch after its backward pass."""
        if self._first is None and (fault := _fault(micro, passed, loss)):
            self._first = fault, micro, passed

    def should_skip(self, norm: float, step: int) -> bool:
        """Whether to skip the update that the inspected micro-batches make; `norm` is its gradient's. All
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
        text = f"step {step}: an update is skipped: {fault}" + (f"; see {path}" if path else "")
        if self.skipped_in_a_row > self.limit:
            raise NumbersError(
                f"{text}. That makes {self.skipped_in_a_row} skipped updates in a row, and train.bad_updates "
                f"allows {self.limit}; lower train.lr, use model.dtype=float32, or look at the rows in "
                "`bad_updates` in the run's folder"
            )
        self.console.warn(text)
        return True

    def _write(self, fault: str, micro: MicroBatch, passed: ForwardPass, step: int) -> str:
        """Saves a micro-batch. Returns the path; empty without a folder or if it can't be written."""
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
    """What is not finite in a micro-batch, and in which row; empty if all is finite."""
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
    """Whether the engine's log-probs are the old ones; else these are recomputed. The first update of the
    weights that sampled the responses needs neither: its own pass gives them."""
    replay: bool = False
    """Whether MoE experts are replayed: the engine's if it reported them, else those of the pass that gave
    the old log-probs."""
    score_all: bool = False
    """Whether old log-probs are computed for all mini-batches, although an update's own pass could give
    them."""
    layout: Layout = field(default_factory=SharedPrefix)
    """How prompts and responses are arranged in a pass."""


class Policy:
    """Log-probs, gradients and updates of one model.

    `reference` is a frozen model for the KL term; the same model means the model without its adapters.
    `parallelism` distributes the model over processes, `memory` limits micro-batches, `guard` decides which
    updates are skipped.
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
        reference: VLM | None = None,
    ):
        self.vlm, self.accelerator, self.settings = vlm, accelerator, settings
        self.parallelism, self.memory, self.guard = parallelism, memory, guard
        self.layout, self.reuse_sampled = settings.layout, settings.reuse_sampled
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
        """Whether all computation is in float32."""
        return self.accelerator.mixed_precision == "no" and self.vlm.model.dtype == torch.float32

    @property
    def precision(self) -> str:
        """The precision of matrix products."""
        rounded = {"bf16": "bfloat16", "fp16": "float16"}
        return rounded.get(self.accelerator.mixed_precision, str(self.vlm.model.dtype).removeprefix("torch."))

    def with_full_params(self, work: Callable[[], T]) -> T:
        """Runs `work` with the full parameters in each process, without gradients."""
        return self.parallelism.with_full_params(self.vlm, work)

    def use_plain_layout(self) -> None:
        """Switches to the plain layout: each response with its own copy of the prompt."""
        self.layout = Plain()

    def recompute_old_logprobs(self) -> None:
        """From now on recomputes old log-probs instead of reusing the engine's."""
        self.reuse_sampled = False

    def run(
        self,
        groups: Sequence[GroupSlice],
        layout: Layout | None = None,
        *,
        forward_pass: Pass | None = None,
        autocast: Callable[[], AbstractContextManager] | None = None,
    ) -> Scores:
        """Log-probs and entropies of the response tokens, by default with the policy's own pass, layout and
        precision."""
        inputs = (layout or self.layout).inputs(groups).to(self.device)
        with (autocast or self.autocast)():
            return self.parallelism.run(forward_pass or self.forward_pass, inputs)

    def run_routed(
        self,
        groups: Sequence[GroupSlice],
        layout: Layout,
        *,
        replayed: ExpertRoutes | None = None,
        autocast: Callable[[], AbstractContextManager] | None = None,
    ) -> tuple[Scores, ExpertRoutes | None]:
        """Log-probs and entropies with the policy's own pass, and the experts of an MoE model: the replayed
        ones if given."""
        inputs = layout.inputs(groups).to(self.device)
        routed = self.vlm.routers.watch(inputs, replayed, gradient=False)
        with (autocast or self.autocast)():
            scores = self.parallelism.run(self.forward_pass, inputs, routed)
        return scores, None if routed is None else replayed or routed.routes()

    def autocast(self) -> AbstractContextManager:
        """The precision context of every pass."""
        return self.accelerator.autocast()

    def forward(
        self, micro: MicroBatch, *, usage_gradient: bool = False
    ) -> tuple[ForwardPass, ExpertRoutes | None]:
        """A pass over a micro-batch, and the experts that it used. Without old log-probs the weights are
        still those that sampled it, and the pass's own log-probs are the old ones."""
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
        """Adds the old and reference log-probs that the updates need; called before the first. `fresh` says
        that the current weights sampled the responses."""
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
                    with naming_micro_batch(micro):
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
        """One optimizer update; None if no process has a group to train on. All processes call it."""
        if not any(self.world.all_gather(any(minibatch.trained))):
            return None
        if loss.prepares:
            minibatch = self._prepare(minibatch, loss)
        learnt = self._accumulate(minibatch, loss)
        norm = self.step()
        return collect_stats(learnt, norm, reused=self.reuse_sampled and not _all_on_policy(minibatch))

    def _accumulate(self, minibatch: Batch, loss: Loss) -> list[Learnt]:
        """Adds the gradient of a mini-batch's loss, micro-batch by micro-batch."""
        while True:
            try:
                micros = self._micro_batches(minibatch)
                learnt = to_host([(micro, *self._learn(micro, minibatch, loss)) for micro in micros])
                break
            except MemoryShortage as error:
                shortage = error.micro, error.reason
            self.optimizer.zero_grad()
            self.memory.shrink_below(*shortage, self.layout)
        for item in learnt:
            self.guard.inspect(item.micro, item.passed, item.loss)
        return learnt

    def _learn(self, micro: MicroBatch, minibatch: Batch, loss: Loss) -> tuple[ForwardPass, torch.Tensor]:
        """Adds the gradient of a micro-batch. Returns its pass and its share of the loss, without waiting for
        the device."""
        with naming_micro_batch(micro):
            micro = micro.to(self.device)
            passed, _ = self.forward(micro, usage_gradient=loss.needs_usage)
            value = loss(passed, micro, minibatch)
            value.backward()
        detached = replace(passed, logprobs=passed.logprobs.detach(), entropies=passed.entropies.detach())
        return detached, value.detach()

    @torch.no_grad()
    def _prepare(self, minibatch: Batch, loss: Loss) -> Batch:
        """Adds what the objective prepares for the whole mini-batch, from its current log-probs."""
        while True:
            logprobs = torch.zeros_like(minibatch.sampled)
            try:
                for micro in self._micro_batches(minibatch):
                    with naming_micro_batch(micro):
                        passed, _ = self.forward(micro)
                    _write_rows(logprobs, micro, passed.logprobs)
                return minibatch.replace(prepared=loss.prepare(logprobs, minibatch))
            except MemoryShortage as error:
                shortage = error.micro, error.reason
            self.memory.shrink_below(*shortage, self.layout)

    def _micro_batches(self, minibatch: Batch) -> list[MicroBatch]:
        """Splits a mini-batch, in host memory; of a sharded model into equally many in all processes."""
        micros = minibatch.fit(self.memory.tokens, self.layout)
        missing = self.parallelism.align(len(micros)) - len(micros)
        return [*micros, *[minibatch.idle()] * missing]

    def backward(self, loss: torch.Tensor) -> float:
        """Adds the loss's gradient; returns the loss."""
        loss.backward()
        return float(loss.detach())

    def step(self) -> float:
        """One optimizer step. Returns the gradient's norm before clipping, NaN if the update was skipped."""
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
        """Norm of the gradient, reduced over all processes."""
        self.parallelism.reduce(self.trained)
        grads = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        return full_tensor(get_total_norm(grads))

    def set_step(self, step: int) -> float:
        """Sets the learning rate of a step (0-based) and returns it."""
        self.current_step = step + 1
        rate = self.settings.optimizer.rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def load(self, folder: Path, state: PolicyState) -> None:
        """Restores the optimizer from a checkpoint, and the rest of the policy's state."""
        load_state(self.optimizer, self.named, folder)
        self.vlm.version, self.reuse_sampled = state.updates, state.reuse_sampled
        self.guard.skipped_in_a_row = state.skipped_in_a_row

    def state(self) -> PolicyState:
        """The state for a checkpoint, besides weights and optimizer."""
        return PolicyState(self.vlm.version, self.guard.skipped_in_a_row, self.reuse_sampled)

    @property
    def writers(self) -> int:
        """The number of processes that write a checkpoint: all that hold a part of the model, else one."""
        return self.world.size if self.vlm.sharded else 1

    def parts(self, *, copy: bool = False) -> Iterator[Write]:
        """Functions that write this process's part of a checkpoint into a folder: of what `load_vlm` needs to
        resume (the adapter, if there is one, else the model) and of the optimizer. With `copy` they don't
        change while training continues. All processes must iterate to the end."""
        shares = Shares(self.world.rank, self.writers)
        if adapters.attached(self.vlm.model):
            weights = self.vlm.adapter_weights(keep=self.world.main)
            if self.world.main:
                weights = _copied(weights) if copy else weights
                yield lambda folder: self.vlm.save_adapter(folder / ADAPTER, weights)
        else:
            yield from self._model_parts(shares, copy=copy)
        yield from state_parts(self.optimizer, self.named, shares)

    def _model_parts(self, shares: Shares, *, copy: bool) -> Iterator[Write]:
        weights, writer_of = {}, {}
        for item in self.vlm.stored_weights():
            writer_of[item.name] = shares.deal(item.parameter.nbytes)
            own = writer_of[item.name] == shares.rank
            weight = item.gather() if own else item.drop()
            if own:
                weights[item.name] = weight
        weights = _copied(weights) if copy else weights
        if shares.writers == 1:
            if self.world.main:
                yield lambda folder: self.vlm.save(folder, weights)
            return
        counts = {"writers": shares.writers}
        if weights:
            yield partial(save_share, weights=weights, writer=shares.rank, **counts)
        if self.world.main:
            yield self.vlm.save_config
            yield partial(save_index, writer_of=writer_of, size=sum(shares.sizes), **counts)

    def export(self, folder: Path, *, write: bool = True) -> None:
        """Writes model and processor, loadable by transformers' Auto classes, and the adapter if any."""
        weights = self.vlm.weights(keep=write)
        if write:
            self.vlm.save(folder, weights)
        if adapters.attached(self.vlm.model):
            weights = self.vlm.adapter_weights(keep=write)
            if write:
                self.vlm.save_adapter(folder / ADAPTER, weights)


class MemoryShortage(Exception):
    """The device has too little memory for a micro-batch."""

    def __init__(self, micro: MicroBatch, reason: str):
        self.micro, self.reason = micro, reason


@contextmanager
def naming_micro_batch(micro: MicroBatch) -> Iterator[None]:
    """Turns running out of memory in the block into an error that names the micro-batch."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise MemoryShortage(micro, shortage_reason(error)) from None


def _unscored(minibatch: Batch, *, on_policy: bool = False) -> Batch:
    """The mini-batch with the engine's log-probs as old ones, and zeros as the reference's."""
    rows = torch.full((len(minibatch.mask),), on_policy)
    nothing = torch.zeros_like(minibatch.sampled)
    return minibatch.replace(on_policy=rows, old=minibatch.sampled.clone(), reference=nothing, routes=None)


def _copied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.to("cpu", copy=True) for name, weight in weights.items()}


def _write_rows(target: torch.Tensor, micro: MicroBatch, values: torch.Tensor) -> None:
    """Writes a micro-batch's values [n, t] to their rows of a mini-batch [N, T]; idle rows have none."""
    real = micro.rows >= 0
    target[micro.rows[real], : micro.mask.shape[1]] = values.cpu()[real]


def to_host(learnt: Sequence[tuple[MicroBatch, ForwardPass, torch.Tensor]]) -> list[Learnt]:
    """What the device computed, moved to host memory in one copy, which waits for the device once."""
    pieces = [piece for _, passed, loss in learnt for piece in (passed.logprobs, passed.entropies, loss)]
    if not pieces:
        return []
    flat = torch.cat([piece.flatten() for piece in pieces]).cpu().split([piece.numel() for piece in pieces])
    moved = iter([host.view(piece.shape).to(piece.dtype) for host, piece in zip(flat, pieces, strict=True)])
    items = []
    for micro, passed, _ in learnt:
        logprobs, entropies, loss = next(moved), next(moved), next(moved)
        old = logprobs if micro.old is None else micro.old
        passed = replace(passed, logprobs=logprobs, entropies=entropies, old=old)
        items.append(Learnt(micro, passed, loss.item()))
    return items


def _all_on_policy(minibatch: Batch) -> bool:
    return minibatch.on_policy is None or bool(minibatch.on_policy.all())


def collect_stats(learnt: Sequence[Learnt], grad_norm: float, *, reused: bool) -> UpdateStats:
    """The data of an update, from its micro-batches. `reused` says that the engine's log-probs were the old
    ones."""
    micros = [item.micro for item in learnt]
    passes = [item.passed for item in learnt]
    sampled = None if reused else [micro.sampled for micro in micros]
    rows = torch.cat([torch.zeros(0, dtype=torch.long), *(micro.rows for micro in micros)])
    real = rows >= 0  # without what pads the number of passes
    empty = torch.zeros(0, 1)
    return UpdateStats(
        rows=rows[real],
        mask=_join([micro.mask for micro in micros], real, empty.bool()),
        advantages=_join([micro.advantages for micro in micros], real, empty),
        logprobs=_join([passed.logprobs for passed in passes], real, empty),
        entropies=_join([passed.entropies for passed in passes], real, empty),
        old=_join([passed.old for passed in passes], real, empty),
        sampled=None if sampled is None else _join(sampled, real, empty),
        reference=_join([micro.reference for micro in micros], real, None),
        prepared=_join([micro.prepared for micro in micros], real, None),
        usages=tuple(
            item.passed.usage.to_cpu(item.micro.rows >= 0) for item in learnt if item.passed.usage is not None
        ),
        loss=sum(item.loss for item in learnt),
        grad_norm=grad_norm,
        skipped=math.isnan(grad_norm),
    )


def _join(
    tensors: Sequence[torch.Tensor | None], real: torch.Tensor, empty: torch.Tensor | None
) -> torch.Tensor | None:
    """[N, T] in host memory of the real rows of tensors [n, t]; `empty` without tensors, None if one is
    missing."""
    if not tensors:
        return empty
    if any(item is None for item in tensors):
        return None
    width = max(item.shape[1] for item in tensors)
    return torch.cat([pad(item.detach().cpu(), (0, width - item.shape[1])) for item in tensors])[real]
