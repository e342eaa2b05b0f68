"""The loss of an update: an objective on log-ratios, a KL term, and a reduction, which combine freely."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any, Protocol, runtime_checkable

import torch

from vlm_sapo.algo import objectives
from vlm_sapo.algo.advantages import ADVANTAGES
from vlm_sapo.algo.balance import sequence_balance
from vlm_sapo.algo.correction import CORRECTIONS, correction_metrics, importance, mismatch_metrics
from vlm_sapo.algo.diagnostics import (
    effective_update,
    gate_deviation,
    gate_metrics,
    histograms,
    update_metrics,
)
from vlm_sapo.algo.objectives import OBJECTIVES, TOKEN_TENSORS, TokenTensors, k3
from vlm_sapo.algo.reductions import DENOMINATORS, REDUCTIONS
from vlm_sapo.config.schema import AlgoConfig, OwnFunctionConfig
from vlm_sapo.models.device import out_of_memory
from vlm_sapo.models.experts import ExpertUsage
from vlm_sapo.plugins import check_call, resolve, resolve_call
from vlm_sapo.reporting.metrics import UpdateStats
from vlm_sapo.training.batch import Batch, MicroBatch
from vlm_sapo.training.policy import ForwardPass

TRACED_SEQUENCES = 32
"""Most sequences of a mini-batch whose variance and gate deviation are logged."""


@contextmanager
def naming_function(field: str, name: str) -> Iterator[None]:
    """Raises ValueError with the traceback, then the field, for what a user's function raises. That memory
    ran out stays as it is: the pass is repeated with fewer tokens."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or out_of_memory(error):
            raise
        lines = "".join(traceback.format_exception(error))
        raise ValueError(f"{lines}{field} ({name}) failed: {type(error).__name__}: {error}") from error


class Objective:
    """A function of tensors that it asks for by name (algo.objectives.TokenTensors), with its parameters."""

    def __init__(self, function: Callable[..., torch.Tensor], **parameters: Any):
        self.function, self.parameters = function, parameters
        self.names = [name for name in signature(function).parameters if name in TOKEN_TENSORS]

    def __call__(self, tensors: TokenTensors) -> torch.Tensor:
        """The losses [N, T]."""
        return self.function(**tensors.named(self.names), **self.parameters)


class OwnObjective(Objective):
    """A function of the user's. Raises ValueError if its losses have another shape or no gradient."""

    def __init__(self, function: Callable[..., torch.Tensor], name: str, **parameters: Any):
        super().__init__(function, **parameters)
        self.name = name

    def __call__(self, tensors: TokenTensors) -> torch.Tensor:
        """The losses [N, T]."""
        with naming_function("algo.objective.function", self.name):
            losses = super().__call__(tensors)
        shape = list(tensors.logprobs.shape)
        if not isinstance(losses, torch.Tensor) or list(losses.shape) != shape:
            kind = f"one {list(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
            raise ValueError(
                f"algo.objective.function ({self.name}) must return a tensor {shape}, the loss of each "
                f"token; it returned {kind}"
            )
        if tensors.logprobs.requires_grad and not losses.requires_grad:
            raise ValueError(
                f"algo.objective.function ({self.name}) must return losses that depend on logprobs or ratio"
            )
        return losses


@runtime_checkable
class Prepares(Protocol):
    """An objective with a computation over the whole mini-batch, before it is split into micro-batches."""

    def prepare(self, tensors: TokenTensors) -> torch.Tensor:
        """[N, T] of the mini-batch's tokens, which the objective then gets as `prepared`. No gradients; the
        mask is that of the responses which go through the model."""


@dataclass(frozen=True)
class PolicyLoss:
    """`objective` on ratios of a `level`, reduced by `reduction`."""

    objective: Objective
    level: str
    reduction: Reduction
    kl: float = 0.0
    gate: Mapping[str, float] | None = None
    """SAPO's temperatures, where the objective is SAPO."""
    correction: Correction | None = None
    """Importance weights between the engine's distribution and the policy's."""
    balance: float = 0.0
    """Weight of the MoE load-balancing loss of each response."""
    preparation: Prepares | None = None

    @property
    def needs_usage(self) -> bool:
        return self.balance > 0

    @property
    def prepares(self) -> bool:
        return self.preparation is not None

    def __call__(self, passed: ForwardPass, micro: MicroBatch, minibatch: Batch) -> torch.Tensor:
        """The micro-batch's share of the mini-batch's loss."""
        tensors = TokenTensors(
            logprobs=passed.logprobs,
            old=passed.old,
            advantages=micro.advantages,
            mask=micro.mask,
            level=self.level,
            sampled=micro.sampled,
            reference=micro.reference,
            prepared=micro.prepared,
        )
        losses = self.objective(tensors)
        if self.correction is not None:
            losses = losses * self.correction(passed.old, micro.sampled, micro.mask)[1]
        if micro.reference is not None:
            losses = losses + self.kl * k3(passed.logprobs, micro.reference)
        loss = self.reduction(losses, micro.mask, minibatch.num_sequences, minibatch.num_tokens)
        if self.balance:
            loss = loss + self.balance * self._load_balance(passed.usage, micro) / minibatch.num_sequences
        return loss

    def _load_balance(self, usage: ExpertUsage, micro: MicroBatch) -> torch.Tensor:
        lengths = micro.mask.sum(-1)
        uneven = sequence_balance(usage.probabilities, usage.counts, lengths.clamp(min=1))
        return torch.where(lengths > 0, uneven, 0.0).sum()

    def prepare(self, logprobs: torch.Tensor, minibatch: Batch) -> torch.Tensor | None:
        """[N, T] that the objective computes for the whole mini-batch, from its current log-probs."""
        if self.preparation is None:
            return None
        own = minibatch.on_policy[:, None]
        return self.preparation.prepare(
            TokenTensors(
                logprobs=logprobs,
                old=torch.where(own, logprobs, minibatch.old),
                advantages=minibatch.advantages,
                mask=minibatch.trained_mask,
                level=self.level,
                sampled=minibatch.sampled,
                reference=minibatch.reference,
            )
        )

    def effective(self, stats: UpdateStats) -> torch.Tensor:
        """[N, T] share of the plain policy gradient that remains for each token."""
        return effective_update(self.objective, self._tensors(stats))

    def distributions(self, stats: UpdateStats) -> dict[str, list]:
        """Histograms of a whole mini-batch, and with SAPO `sequences`: of up to TRACED_SEQUENCES the variance
        of log r, the gate's deviation and tau^2/4."""
        log_ratio = objectives.token_log_ratio(stats.logprobs, stats.old, stats.mask)
        counts: dict[str, list] = histograms(log_ratio, self.effective(stats), stats.advantages, stats.mask)
        if self.gate is not None:
            deviation = gate_deviation(stats.logprobs, stats.old, stats.advantages, stats.mask, **self.gate)
            columns = (deviation.variance, deviation.deviation, deviation.tau**2 / 4)
            stride = max(-(-len(deviation.tau) // TRACED_SEQUENCES), 1)
            counts["sequences"] = [
                [float(f"{value:.5g}") for value in row] for row in torch.stack(columns, 1)[::stride].tolist()
            ]
        return counts

    def describe(self, stats: UpdateStats) -> dict[str, float]:
        """Metrics of the objective on a whole mini-batch."""
        logprobs, old, mask = stats.logprobs, stats.old, stats.mask
        metrics = update_metrics(self.effective(stats), stats.advantages, mask)
        if self.gate is not None:
            metrics |= gate_metrics(logprobs, old, stats.advantages, mask, **self.gate)
        if stats.sampled is not None:
            metrics |= mismatch_metrics(old, stats.sampled, mask)
        if stats.sampled is not None and self.correction is not None:
            metrics |= correction_metrics(*self.correction(old, stats.sampled, mask), mask)
        return metrics

    def _tensors(self, stats: UpdateStats) -> TokenTensors:
        return TokenTensors(
            logprobs=stats.logprobs,
            old=stats.old,
            advantages=stats.advantages,
            mask=stats.mask,
            level=self.level,
            sampled=stats.old if stats.sampled is None else stats.sampled,
            reference=stats.reference,
            prepared=stats.prepared,
        )


class Reduction:
    """Reduces token losses to a share of the update's loss; see algo/reductions.py."""

    def __init__(self, function: Callable[..., torch.Tensor], max_tokens: int, **parameters: Any):
        self.function, self.max_tokens, self.parameters = function, max_tokens, parameters
        self.names = [name for name in DENOMINATORS if name in signature(function).parameters]

    def __call__(
        self, losses: torch.Tensor, mask: torch.Tensor, num_sequences: int, num_tokens: int
    ) -> torch.Tensor:
        values = {"num_sequences": num_sequences, "num_tokens": num_tokens, "max_tokens": self.max_tokens}
        denominators = {name: values[name] for name in self.names}
        return self.function(losses, mask, **denominators, **self.parameters)


class OwnReduction(Reduction):
    """A function of the user's. Raises ValueError if it returns anything but one loss with a gradient."""

    def __init__(self, function: Callable[..., torch.Tensor], name: str, max_tokens: int, **parameters: Any):
        super().__init__(function, max_tokens, **parameters)
        self.name = name

    def __call__(
        self, losses: torch.Tensor, mask: torch.Tensor, num_sequences: int, num_tokens: int
    ) -> torch.Tensor:
        with naming_function("algo.reduction.function", self.name):
            loss = super().__call__(losses, mask, num_sequences, num_tokens)
        if not isinstance(loss, torch.Tensor) or loss.dim():
            kind = f"one {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(
                f"algo.reduction.function ({self.name}) must return a tensor [], the micro-batch's share "
                f"of the loss; it returned {kind}"
            )
        if losses.requires_grad and not loss.requires_grad:
            raise ValueError(
                f"algo.reduction.function ({self.name}) must return a loss that depends on losses"
            )
        return loss


@dataclass(frozen=True)
class Correction:
    """Importance weights from the engine's distribution to the policy's, bounded."""

    type: str
    level: str
    low: float
    high: float

    def __call__(
        self, policy: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights [N, T] before and after they are bounded."""
        weights = importance(policy, engine, mask, level=self.level).detach()
        return weights, CORRECTIONS[self.type](weights, low=self.low, high=self.high)


class GroupAdvantage:
    """Advantages from a group's rewards, equal for all tokens of a response."""

    rewards_decide = True

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.function = function

    def __call__(self, batch: Batch) -> torch.Tensor:
        """[N, T] float64."""
        rows = torch.cat([self.function(rewards) for rewards in batch.rewards.split(batch.sizes)])
        return rows[:, None].expand(batch.mask.shape)


class OwnAdvantage:
    """A user's function from a batch to advantages, [N] or [N, T]."""

    rewards_decide = False

    def __init__(self, function: Callable[..., torch.Tensor], name: str, **parameters: Any):
        self.function, self.name, self.parameters = function, name, parameters

    def __call__(self, batch: Batch) -> torch.Tensor:
        """[N, T] float64. Raises ValueError if the function returns anything else."""
        with naming_function("algo.advantage.function", self.name):
            values = self.function(batch, **self.parameters)
        rows, width = batch.mask.shape
        if not isinstance(values, torch.Tensor) or values.shape not in ((rows,), (rows, width)):
            shape = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise ValueError(
                f"algo.advantage.function ({self.name}) must return a tensor [{rows}] or [{rows}, {width}], "
                f"an advantage for each response or token; it returned {shape}"
            )
        values = values.detach().cpu()
        values = values.double() if values.dim() == 2 else values.double()[:, None].expand(rows, width)
        if not torch.where(batch.mask, values, 0.0).isfinite().all():
            raise ValueError(f"algo.advantage.function ({self.name}) must return finite advantages")
        return values


def build_advantage(section: str | OwnFunctionConfig) -> GroupAdvantage | OwnAdvantage:
    """Builds the configured advantage. Raises ValueError for a user's function that doesn't fit."""
    if isinstance(section, str):
        return GroupAdvantage(ADVANTAGES[section])
    field = "algo.advantage.function"
    function = resolve(section.function, field=field)
    check_call(function, None, name=section.function, field=field, args=section.args)
    return OwnAdvantage(function, section.function, **section.args)


def build_loss(algo: AlgoConfig, *, max_tokens: int) -> PolicyLoss:
    """Builds the configured loss. Raises ValueError for a user's function that doesn't fit."""
    section = algo.objective
    parameters = section.model_dump(exclude={"type"})
    objective, preparation = (
        _own_objective(section.function, section.args, has_reference=algo.kl > 0)
        if section.type == "own"
        else (Objective(OBJECTIVES[section.type], **parameters), None)
    )
    return PolicyLoss(
        objective=objective,
        level=algo.ratio,
        reduction=_reduction(algo.reduction, max_tokens),
        kl=algo.kl,
        gate=parameters if section.type == "sapo" else None,
        correction=Correction(**algo.correction.model_dump()) if algo.correction else None,
        balance=algo.balance,
        preparation=preparation,
    )


def _own_objective(
    name: str, args: Mapping[str, Any], *, has_reference: bool
) -> tuple[Objective, Prepares | None]:
    """A function of the user's, or an object of a class whose `__call__` is one. Raises ValueError where it
    asks for tensors that there will not be."""
    field = "algo.objective.function"
    function = resolve(name, field=field)
    if isinstance(function, type):
        instance = resolve_call(name, field=field, args=args)
        objective, args = OwnObjective(instance, name), {}
        preparation = instance if isinstance(instance, Prepares) else None
    else:
        objective, preparation = OwnObjective(function, name, **args), None
    try:
        check_call(
            objective.function, name=name, field=field, args=dict.fromkeys(objective.names) | dict(args)
        )
    except ValueError as error:
        asked = [
            name for name in signature(objective.function).parameters if name not in {*TOKEN_TENSORS, *args}
        ]
        close = [match for name in asked for match in difflib.get_close_matches(name, TOKEN_TENSORS, n=1)]
        hint = f"did you mean {close[0]}? An" if close else "an"
        raise ValueError(
            f"{error}; {hint} objective can ask for {', '.join(TOKEN_TENSORS)} by name"
        ) from error
    absent = {} if has_reference else {"reference": "set algo.kl above 0"}
    absent |= {} if preparation else {"prepared": "write a class with a method prepare"}
    parameters = signature(objective.function).parameters
    for tensor in absent.keys() & parameters.keys():
        if parameters[tensor].default is Parameter.empty:
            raise ValueError(
                f"{field} ({name}) must not ask for {tensor}, which is None here; {absent[tensor]}, or give "
                "the parameter a default"
            )
    return objective, preparation


def _reduction(section: str | OwnFunctionConfig, max_tokens: int) -> Reduction:
    if isinstance(section, str):
        return Reduction(REDUCTIONS[section], max_tokens)
    field = "algo.reduction.function"
    function = resolve(section.function, field=field)
    reduction = OwnReduction(function, section.function, max_tokens, **section.args)
    args = dict.fromkeys(reduction.names) | dict(section.args)
    check_call(function, None, None, name=section.function, field=field, args=args)
    return reduction
