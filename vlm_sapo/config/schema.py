"""The sections of a config file and their rules. A field's text below it is its help."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vlm_sapo.config.data import Count, DataConfig, NotNegative, Positive, Rate, RowsConfig, Section
from vlm_sapo.config.rollout import RolloutConfig
from vlm_sapo.config.run import AlarmsConfig, CheckpointConfig, LogConfig, RunConfig
from vlm_sapo.config.secrets import check_address, check_secrets

Share = Annotated[float, Field(ge=0, lt=1)]


Part = Literal["vision", "merger", "language"]


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters."""
    alpha: Rate = 32.0
    """The adapters' output is multiplied by alpha / rank."""
    parts: Annotated[list[Part], Field(min_length=1)] = ["language"]
    """Parts whose linear layers get adapters. Experts and the router of a mixture get none."""
    bits: Literal[4] | None = None
    """4 holds the linear layers of the adapted parts in 4 bits (QLoRA, needs bitsandbytes); null as
    `model.dtype` says."""
    adapter: str | None = None
    """Folder with an adapter of the same base model to go on from; its rank, alpha and parts then count."""


class ModelConfig(Section):
    path: str
    """Folder or hub id of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 checkpoint with its processor."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights that are trained. float32 with `train.precision: bf16` keeps small updates."""
    freeze: list[Literal["vision", "merger", "language", "router"]] = []
    """Parts that are not trained. With `vision` and `merger` each picture is encoded once per step and its
    features serve rollout and updates; with `vision` alone it is encoded again in every pass. `router` is
    what chooses the experts of a mixture; `language` leaves it out."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and nothing else. The reference model is then the model without them."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    min_pixels: Positive | None = None
    """Smallest area of a resized picture, in pixels; null for the processor's own."""
    max_pixels: Positive | None = None
    """Largest area of a resized picture, in pixels; null for the processor's own."""

    @model_validator(mode="after")
    def _adapted_parts_are_trained(self):
        both = sorted(set(self.lora.parts) & set(self.freeze)) if self.lora else []
        if both:
            raise ValueError(f"lora.parts and freeze both name {', '.join(both)}; take it out of one of them")
        return self


class RewardPartConfig(Section):
    name: str
    """A verifier (docs/rewards.md lists them), `path/to/file.py:function`, `package.module:function` or an
    installed entry point."""
    label: str | None = None
    """Name in the logs; by default the verifier's or function's own."""
    weight: float = 1.0
    """Factor of this part in the reward."""
    gate: float | None = None
    """Where this part scores below, the whole reward is 0."""
    batched: bool = False
    """The function takes lists of responses and examples and returns a list."""
    args: dict[str, Any] = {}
    """Keyword arguments of the verifier or function."""

    @field_validator("args")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_secrets(value, "args")
        if "url" in value:
            check_address(str(value["url"]), "args.url")
        return value


RESERVED = {"mean", "zero_variance", "environment"}
"""Names under `reward/` in the logs that are no part's."""


class RewardConfig(Section):
    parts: list[RewardPartConfig] = []
    """The parts of the reward; their weighted sum is what is trained. `reward: NAME` and `reward: [...]` are
    short for one part and for parts."""
    timeout: Rate = 10.0
    """Seconds for a response; what takes longer is stopped, scores 0 and is counted."""
    on_error: Literal["stop", "zero"] = "stop"
    """When a function raises: stop the run, or score 0 and count it."""
    workers: Positive | None = None
    """Processes that grade; null for one per core, at most 8."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        value = {"parts": value} if isinstance(value, str | list) else value
        if isinstance(value, dict) and isinstance(value.get("parts"), str):
            value = value | {"parts": [{"name": value["parts"]}]}
        return value

    @model_validator(mode="after")
    def _labels_differ(self):
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"two parts of one name ({', '.join(self.labels)}); give each its own `label`")
        if taken := set(self.labels) & RESERVED:
            raise ValueError(f"a part's label ({', '.join(taken)}) is the name of a metric; give it another")
        return self

    @property
    def measured(self) -> str:
        """The label of the first part that reads the gold answer."""
        reading = [
            place
            for place, part in enumerate(self.parts)
            if part.name not in ("format", "length", "language")
        ]
        return self.labels[reading[0] if reading else 0]

    @property
    def labels(self) -> list[str]:
        return [part.label or part.name.rpartition(":")[2] for part in self.parts]


class SapoConfig(Section):
    type: Literal["sapo"] = "sapo"
    tau_pos: Rate = 1.0
    """Temperature of the gate for positive advantages."""
    tau_neg: Rate = 1.05
    """Temperature of the gate for negative advantages; larger fades faster off policy."""


class GrpoConfig(Section):
    type: Literal["grpo"]
    low: NotNegative = 0.2
    """Ratios under 1 - low are clipped for negative advantages."""
    high: NotNegative = 0.2
    """Ratios over 1 + high are clipped for positive advantages (.28 for DAPO's clip-higher)."""


class GspoConfig(Section):
    type: Literal["gspo"]
    low: NotNegative = 3e-4
    """Sequence ratios under 1 - low are clipped for negative advantages."""
    high: NotNegative = 4e-4
    """Sequence ratios over 1 + high are clipped for positive advantages."""


class CispoConfig(Section):
    type: Literal["cispo"]
    cap: Rate = 5.0
    """Largest weight of a token: an absolute ratio, not 1 + epsilon."""


class DppoConfig(Section):
    type: Literal["dppo"]
    low: NotNegative = 0.2
    """Tokens with a negative advantage leave the loss once their probability has fallen by more than this."""
    high: NotNegative = 0.2
    """Tokens with a positive advantage leave the loss once their probability has risen by more than this."""


class VespoConfig(Section):
    type: Literal["vespo"]
    k_pos: NotNegative = 2.0
    """Power of the sequence ratio W in its weight W^k exp(lambda (1 - W)), for positive advantages."""
    lambda_pos: NotNegative = 3.0
    """Decay of that weight, for positive advantages."""
    k_neg: NotNegative = 3.0
    """Power for negative advantages."""
    lambda_neg: NotNegative = 2.0
    """Decay for negative advantages."""


class CorrectionConfig(Section):
    type: Literal["truncated", "masked"]
    """What becomes of importance weights over `high`: set to it, or to 0 (as are those under `low`)."""
    level: Literal["token", "sequence"] = "token"
    """Weight of each token, or the product of a response's weights for all of its tokens."""
    low: NotNegative = 0.0
    """Smallest weight that `masked` lets count."""
    high: Rate = 2.0
    """Largest weight."""

    @model_validator(mode="after")
    def _bounds(self):
        if self.type == "truncated" and self.low:
            raise ValueError(f"low ({self.low}) has no part in type truncated; remove it, or set type=masked")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be under high ({self.high})")
        return self


class OwnFunctionConfig(Section):
    type: Literal["own"]
    function: str
    """`path/to/file.py:name` or `package.module:name` of a function or class; docs/algorithm.md says what it
    gets, docs/examples shows one of each kind."""
    args: dict[str, Any] = {}
    """Its keyword arguments."""


class AlgoConfig(Section):
    objective: Annotated[
        SapoConfig | GrpoConfig | GspoConfig | CispoConfig | DppoConfig | VespoConfig | OwnFunctionConfig,
        Field(discriminator="type"),
    ] = SapoConfig()
    """What a token's importance ratio and advantage contribute."""
    ratio: Literal["token", "sequence"] = "token"
    """Level of the importance ratio."""
    advantage: Literal["zscore", "centred", "leave_one_out"] | OwnFunctionConfig = "zscore"
    """How rewards of a group become advantages; `{type: own, function: ...}` for a function of the batch."""
    reduction: Literal["sequence_mean", "token_mean", "constant"] | OwnFunctionConfig = "sequence_mean"
    """How token losses become one number; `constant` divides by sequences times `rollout.max_tokens`;
    `{type: own, function: ...}` for a function of losses, mask and denominators."""
    kl: NotNegative = 0.0
    """Weight of the k3 estimate of KL(policy, reference), the reference being the model at the start."""
    correction: CorrectionConfig | None = None
    """Corrects for the engine's log-probs not being the policy's: each token's loss is weighed by policy over
    engine before the update, as a constant outside the gate. Needs old log-probs from the policy."""
    replay: Literal["none", "r2", "r3"] = "none"
    """Which experts of a mixture an update uses: those that its routers choose (`none`), those of the pass
    that gives the old log-probs (`r2`), or those that the rollout engine used (`r3`). Replayed experts are
    weighed by the present router, which keeps its gradient (docs/moe.md)."""
    balance: NotNegative = 0.0
    """Weight of a loss that spreads each response's tokens over a mixture's experts (docs/moe.md)."""
    mask_truncated: bool = False
    """Leave responses that hit the length limit out of the loss and of its denominator."""

    @field_validator("objective", "correction", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @field_validator("objective", mode="before")
    @classmethod
    def _sapo_by_default(cls, value: Any) -> Any:
        return {"type": "sapo"} | value if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _gspo_is_sequence_level(self):
        if self.objective.type == "gspo" and self.ratio != "sequence":
            raise ValueError(
                "objective.type gspo is defined on the sequence ratio; set algo.ratio=sequence, "
                "or objective.type=grpo for the clip on token ratios"
            )
        return self


class OptimConfig(Section):
    steps: Positive
    """Number of steps: rollout batches for `train`, updates for `sft`."""
    lr: Rate = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warm-up; linear and cosine end at 0."""
    warmup_steps: Count = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates."""
    max_grad_norm: Rate = 1.0
    """Gradients are scaled down to this norm."""
    bad_updates: Count = 3
    """Updates in a row that may be left out because their loss, gradient or an importance ratio is not
    finite; with one more the run stops. The batch at fault goes to `bad_updates/` in the run's folder."""
    precision: Annotated[
        Literal["no", "bf16"],
        BeforeValidator(lambda given: "no" if given is False else given),  # what YAML makes of no
    ] = "no"
    """`bf16` computes in bfloat16 under autocast, log-probs and weights staying as they are."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """`adamw_8bit` holds the optimizer's two moments in 8 bits, `paged_...` besides lets them move to host
    memory when the GPU is full; both need bitsandbytes."""
    shard: Positive | Literal["all"] = 1
    """Processes (GPUs) that share one copy of the weights, gradients and optimizer state; a divisor of their
    number, or all. With 1 each has a whole copy."""
    offload: bool = False
    """Keep weights (except a frozen vision tower's), gradients and optimizer state in host memory and bring
    each layer to the GPU when it is needed: slow, and the least memory."""
    tokens_per_microbatch: Positive = 16384
    """Most tokens, padding included, that go through the model at once; it never changes the gradient."""
    layout: Literal["shared", "plain"] = "shared"
    """`shared` runs a prompt once for all its responses, `plain` once for each; the results are the same, and
    the start of a run checks that they are."""


class TrainerConfig(OptimConfig):
    prompts_per_step: Positive = 32
    """Prompts (groups) per step."""
    minibatches: Positive = 4
    """Optimizer updates per step; with 1 every ratio is 1 and all objectives are the same."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Where the log-probs before the update come from: a pass of the policy (`recompute`), the engine
    (`rollout`), or the engine if the start of the run shows that its log-probs agree with the policy's to
    rounding (`auto`). On policy the first update's own pass gives its own."""

    @model_validator(mode="after")
    def _divides(self):
        if self.prompts_per_step % self.minibatches:
            below = self.prompts_per_step - self.prompts_per_step % self.minibatches
            options = " or ".join(str(n) for n in (below, below + self.minibatches) if n)
            raise ValueError(
                f"prompts_per_step ({self.prompts_per_step}) must be divisible by minibatches "
                f"({self.minibatches}); use {options}"
            )
        return self


class SftTrainerConfig(OptimConfig):
    rows_per_step: Positive = 32
    """Demonstrations per update."""


class EvalConfig(Section):
    data: RowsConfig | None = None
    """Held-out rows. Where they say nothing else, `system`, `template` and `verifier` are those of `data`."""
    benchmarks: list[str] = []
    """Benchmarks to evaluate on besides, each `NAME` or `NAME=FILE` with the benchmark's rows in a local
    file; eval/README.md lists them. Their responses may be as long as the benchmark's definition says."""
    limit: Positive | None = None
    """Use the first so many problems of each benchmark."""
    every: Count = 0
    """Evaluate every so many steps, besides before and after; 0 for never."""
    samples: Positive = 1
    """Responses per problem; pass@1 is their mean."""
    temperature: NotNegative = 1.0
    """Sampling temperature of the evaluation; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: Count = 0
    """Sample from the so many likeliest tokens; 0 for all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample from tokens at least this share as likely as the likeliest."""
    part: str | None = None
    """Reward part that is measured; null for the first one that reads the gold answer."""


PROMPT = ("system", "template", "verifier")


def with_prompt_of(data: DataConfig, rows: RowsConfig | None) -> RowsConfig | None:
    """Held-out rows with the training rows' prompt where they have none of their own."""
    if rows is None or data.mixture:
        return rows
    own = rows.model_fields_set
    return rows.model_copy(update={name: value for name, value in data if name in PROMPT and name not in own})


class TrainConfig(Section):
    """What `vlm-sapo train` runs."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    algo: AlgoConfig = AlgoConfig()
    train: TrainerConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _reward_and_evaluation(self):
        self.eval.data = with_prompt_of(self.data, self.eval.data)
        self.checkpoint.check_best(self.eval.every, self.eval.data or self.eval.benchmarks)
        if not self.reward.parts:
            raise ValueError("reward.parts must name at least one verifier or function")
        if self.algo.correction and self.train.old_logprobs == "rollout":
            raise ValueError(
                "algo.correction weighs the policy's old log-probs against the engine's, and "
                "train.old_logprobs (rollout) makes them the same; set train.old_logprobs=recompute"
            )
        if self.algo.replay == "r2" and self.train.old_logprobs == "rollout":
            raise ValueError(
                "algo.replay (r2) replays the experts of the policy's pass that gives the old log-probs, and "
                "with train.old_logprobs (rollout) there is none; set train.old_logprobs=recompute, or "
                "algo.replay=r3"
            )
        if self.eval.part is not None and self.eval.part not in self.reward.labels:
            raise ValueError(
                f"eval.part ({self.eval.part}) must be one of the reward's parts: "
                f"{', '.join(self.reward.labels)}"
            )
        return self


class SftConfig(Section):
    """What `vlm-sapo sft` runs: supervised learning on demonstrations."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    train: SftTrainerConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _complete(self):
        self.eval.data = with_prompt_of(self.data, self.eval.data)
        self.checkpoint.check_best(self.eval.every, self.eval.data)
        if any("response" not in task.columns for task in self.data.tasks):
            raise ValueError("data.columns.response must name the column with the demonstrations; add it")
        if self.eval.data and not self.reward.parts:
            raise ValueError("eval.data needs a reward to measure with; add reward.parts or remove eval.data")
        return self
