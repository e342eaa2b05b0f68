"""The sections of a config file and their rules. A field's text below it is its help."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vlm_sapo.config.data import HELD_OUT, DataConfig, RowsConfig
from vlm_sapo.config.fields import (
    AlsoCalled,
    Count,
    Note,
    NotNegative,
    Positive,
    Probability,
    Rate,
    Section,
    TopP,
    noted,
)
from vlm_sapo.config.rollout import RolloutConfig
from vlm_sapo.config.run import AlarmsConfig, CheckpointConfig, HubConfig, LogConfig, RunConfig
from vlm_sapo.config.secrets import check_address, check_secrets

Share = Annotated[float, Field(ge=0, lt=1)]
Part = Literal["vision", "merger", "language"]


class LoraConfig(Section):
    example: ClassVar[str] = "{rank: 16}"

    rank: Annotated[Positive, AlsoCalled("r", "lora_r", "lora_rank")] = 16
    """Rank of the adapters."""
    alpha: Annotated[Rate, AlsoCalled("lora_alpha")] = 32.0
    """The adapters' output is scaled by alpha / rank."""
    parts: Annotated[list[Part], Field(min_length=1), AlsoCalled("target_modules", "lora_target_modules")] = [
        "language"
    ]
    """Parts of the model whose linear layers get adapters. Experts and router of an MoE model get none."""
    bits: Annotated[Literal[4] | None, AlsoCalled("load_in_4bit", "quantization")] = None
    """4 stores the linear layers of these parts in 4 bits (QLoRA, needs bitsandbytes); null keeps
    `model.dtype`."""
    adapter: Annotated[str | None, Note.PATH] = None
    """Folder of a trained adapter of the same base model to continue from; its rank, alpha and parts are
    used."""


class ModelConfig(Section):
    example: ClassVar[str] = "{path: Qwen/Qwen2.5-VL-3B-Instruct}"

    path: Annotated[
        str,
        Note.IN_REPORT,
        Note.PATH,
        AlsoCalled("name", "model_name_or_path", "model_path", "model", "model_name", "model_id"),
    ]
    """Folder or Hugging Face id of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 checkpoint with its
    processor."""
    revision: Annotated[str | None, AlsoCalled("model_revision")] = None
    """Branch, tag or commit of a Hugging Face id; null for its main branch. The stored config has the commit
    that was used, and a resumed run stays with it (docs/hub.md)."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], AlsoCalled("torch_dtype", "model_dtype", "params_dtype")
    ] = "float32"
    """Data type of the weights. Without `lora`, bfloat16 weights are rounded stochastically after each update
    (docs/gpus.md); float32 with `train.precision: bf16` is more exact. float16 is for a model with `lora`."""
    freeze: Annotated[
        list[Literal["vision", "merger", "language", "router"]],
        AlsoCalled(
            "freeze_vision_tower", "freeze_vision_modules", "freeze_vit", "freeze_llm", "freeze_aligner"
        ),
    ] = []
    """Parts that are not trained. With `vision` and `merger` frozen each image is encoded once per step, for
    rollout and updates together; with `vision` alone it is encoded in every pass. `router` is the part of an
    MoE model that selects experts; `language` doesn't include it."""
    lora: Annotated[
        LoraConfig | None,
        AlsoCalled("peft_config", "use_peft", "use_lora", "train_type", "tuner_type", "finetuning_type"),
    ] = None
    """Train low-rank adapters only. The reference model is then the model without adapters."""
    gradient_checkpointing: Annotated[
        bool, Note.FREE_ON_RESUME, AlsoCalled("enable_gradient_checkpointing", "activation_checkpointing")
    ] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    fused: Annotated[bool | None, Note.FREE_ON_RESUME, AlsoCalled("use_liger_kernel", "use_liger")] = None
    """Compute norms and SwiGLU with Liger's fused kernels: the same up to rounding, faster on a GPU. Null:
    where liger-kernel is installed and there is a GPU. Qwen3.5 has none."""
    min_pixels: Positive | None = None
    """Images smaller than this many pixels (width x height) are enlarged; null for the processor's
    default."""
    max_pixels: Positive | None = None
    """Images larger than this many pixels (width x height) are shrunk; null for the processor's default."""

    @model_validator(mode="after")
    def _adapted_parts_are_trained(self):
        both = sorted(set(self.lora.parts) & set(self.freeze)) if self.lora else []
        if both:
            raise ValueError(f"lora.parts and freeze both name {', '.join(both)}; remove it from one of them")
        return self


class RewardPartConfig(Section):
    example: ClassVar[str] = "{name: math}"

    name: Annotated[str, Note.FUNCTION]
    """A built-in verifier (docs/rewards.md lists them), `path/to/file.py:function`, `package.module:function`
    or an installed entry point."""
    fingerprint: str | None = None
    """Hash of the source text of a function that a Python program passed (`name: python:NAME`). Set by
    `train`."""
    label: str | None = None
    """Name in the logs; by default the name of the verifier or function."""
    weight: Annotated[float, AlsoCalled("reward_weights")] = 1.0
    """Weight of this part in the sum."""
    gate: float | None = None
    """If this part scores lower, the whole reward is 0."""
    batched: bool = False
    """The function takes lists of responses and examples and returns a list of scores."""
    args: dict[str, Any] = {}
    """Keyword arguments of the verifier or function."""

    @field_validator("args")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        check_secrets(value, "args")
        if "url" in value:
            check_address(str(value["url"]), "args.url")
        return value


RESERVED = {"mean", "std", "zero_variance", "environment"}
"""Metrics under `reward/` that are not of a part."""


class RewardConfig(Section):
    example: ClassVar[str] = "{parts: [{name: math}]}"
    list_field: ClassVar[str] = "parts"

    parts: Annotated[
        list[RewardPartConfig],
        Note.IN_REPORT,
        AlsoCalled(
            "reward_funcs",
            "reward_function",
            "functions",
            "custom_reward_function",
            "custom_reward_function.path",
            "custom_reward_function.name",
            "reward_manager",
            "external_plugins",
        ),
    ] = []
    """The parts of the reward; their weighted sum is trained. `reward: NAME` is short for one part and
    `reward: [...]` for several."""
    timeout: Rate = 10.0
    """Seconds to grade one response; a slower one is stopped, scores 0 and is counted."""
    on_error: Literal["stop", "zero"] = "stop"
    """When a reward function raises: `stop` the run, or score `zero` and count it."""
    workers: Annotated[Positive | None, Note.FREE_ON_RESUME, AlsoCalled("num_workers")] = None
    """Grading processes; null for one per core, at most 8."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        value = {cls.list_field: value} if isinstance(value, str | list) else value
        if isinstance(value, dict) and isinstance(value.get("parts"), str):
            value = value | {"parts": [{"name": value["parts"]}]}
        return value

    @model_validator(mode="after")
    def _labels_differ(self):
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"two parts of one name ({', '.join(self.labels)}); give each its own `label`")
        if reserved := set(self.labels) & RESERVED:
            raise ValueError(
                f"a part's label ({', '.join(reserved)}) is the name of a metric; choose another"
            )
        return self

    @property
    def measured(self) -> str:
        """The label of the first part that reads the gold answer."""
        with_gold = [
            label
            for label, part in zip(self.labels, self.parts, strict=True)
            if part.name not in ("format", "length", "language")
        ]
        return (with_gold or self.labels)[0]

    @property
    def labels(self) -> list[str]:
        return [part.label or part.name.rpartition(":")[2] for part in self.parts]


class SapoConfig(Section):
    type: Literal["sapo"] = "sapo"
    tau_pos: Rate = 1.0
    """Temperature of the gate for tokens with positive advantage."""
    tau_neg: Rate = 1.05
    """Temperature of the gate for tokens with negative advantage. The larger it is, the faster the gradient
    fades as the importance ratio moves away from 1."""


class GrpoConfig(Section):
    type: Literal["grpo"]
    low: Annotated[
        NotNegative,
        AlsoCalled("epsilon", "epsilon_low", "clip_ratio", "clip_ratio_low", "eps_clip", "clip_range"),
    ] = 0.2
    """Lower clip: for negative advantages, ratios below 1 - low are clipped."""
    high: Annotated[NotNegative, AlsoCalled("epsilon_high", "clip_ratio_high", "eps_clip_high")] = 0.2
    """Upper clip: for positive advantages, ratios above 1 + high are clipped (0.28 for DAPO's
    clip-higher)."""


class GspoConfig(Section):
    type: Literal["gspo"]
    low: Annotated[
        NotNegative,
        AlsoCalled("epsilon", "epsilon_low", "clip_ratio", "clip_ratio_low", "eps_clip", "clip_range"),
    ] = 3e-4
    """Lower clip: for negative advantages, sequence ratios below 1 - low are clipped."""
    high: Annotated[NotNegative, AlsoCalled("epsilon_high", "clip_ratio_high", "eps_clip_high")] = 4e-4
    """Upper clip: for positive advantages, sequence ratios above 1 + high are clipped."""


class CispoConfig(Section):
    type: Literal["cispo"]
    cap: Annotated[Rate, AlsoCalled("epsilon_high", "clip_ratio_high", "eps_clip_high")] = 5.0
    """Largest importance weight of a token: the ratio itself, not 1 + epsilon."""


class DppoConfig(Section):
    type: Literal["dppo"]
    low: NotNegative = 0.2
    """Tokens with negative advantage are masked once their probability has fallen by more than this."""
    high: NotNegative = 0.2
    """Tokens with positive advantage are masked once their probability has risen by more than this."""


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
    example: ClassVar[str] = "{type: truncated}"

    type: Literal["truncated", "masked"]
    """Weights above `high` are set to `high` (`truncated`), or to 0 together with those below `low`
    (`masked`)."""
    level: Literal["token", "sequence"] = "token"
    """A weight for each token, or one for each response: the product of its tokens' weights."""
    low: NotNegative = 0.0
    """Smallest weight that `masked` keeps."""
    high: Annotated[Rate, AlsoCalled("vllm_importance_sampling_cap")] = 2.0
    """Largest weight."""

    @model_validator(mode="after")
    def _bounds(self):
        if self.type == "truncated" and self.low:
            raise ValueError(
                f"low ({self.low}) has no effect with type truncated; remove it, or set type=masked"
            )
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        return self


class OwnFunctionConfig(Section):
    example: ClassVar[str] = "{type: own, function: my_file.py:name}"

    type: Literal["own"]
    function: Annotated[str, Note.FUNCTION]
    """`path/to/file.py:name` or `package.module:name` of a function or class. docs/algorithm.md lists its
    arguments; docs/examples has one of each kind."""
    args: dict[str, Any] = {}
    """Further keyword arguments of the function."""


class AlgoConfig(Section):
    objective: Annotated[
        SapoConfig | GrpoConfig | GspoConfig | CispoConfig | DppoConfig | VespoConfig | OwnFunctionConfig,
        Field(discriminator="type"),
        Note.IN_REPORT,
        AlsoCalled("policy_loss", "loss", "loss_mode"),
    ] = SapoConfig()
    """Policy objective: how importance ratio and advantage become the loss of a token. `objective: NAME` is
    short for `objective: {type: NAME}`; docs/algorithm.md compares them."""
    ratio: Annotated[
        Literal["token", "sequence"], Note.IN_REPORT, AlsoCalled("importance_sampling_level")
    ] = "token"
    """Level of the importance ratio: one per token, or one per response (GSPO)."""
    advantage: Annotated[
        Literal["zscore", "centred", "leave_one_out"] | OwnFunctionConfig,
        Note.IN_REPORT,
        AlsoCalled("scale_rewards", "adv_estimator", "advantage_estimator", "norm_adv_by_std_in_grpo"),
    ] = "zscore"
    """Advantage of a response within its group: reward minus mean, divided by the standard deviation
    (`zscore`, GRPO); reward minus mean (`centred`, Dr. GRPO); or reward minus the mean of the others
    (`leave_one_out`, RLOO). `{type: own, function: ...}` is a function of yours."""
    reduction: Annotated[
        Literal["sequence_mean", "token_mean", "constant"] | OwnFunctionConfig,
        AlsoCalled("loss_agg_mode", "loss_avg_mode"),
    ] = "sequence_mean"
    """How token losses are averaged: mean over each response, then over responses (`sequence_mean`, GRPO);
    mean over all tokens (`token_mean`, DAPO); or sum divided by responses times `rollout.max_tokens`
    (`constant`, Dr. GRPO). `{type: own, function: ...}` is a function of yours."""
    kl: Annotated[
        NotNegative,
        Note.IN_REPORT,
        AlsoCalled(
            "beta",
            "kl_coef",
            "kl_loss_coef",
            "kl_penalty",
            "init_kl_coef",
            "use_kl_loss",
            "use_kl_in_reward",
            "disable_kl",
            "kl_in_reward",
            "kl_ctrl",
        ),
    ] = 0.0
    """KL penalty: weight of the k3 estimate of KL(policy, reference). The reference is the initial model."""
    correction: Annotated[
        CorrectionConfig | None,
        AlsoCalled("vllm_importance_sampling_correction", "rollout_is", "tis", "tis_imp_ratio_cap"),
    ] = None
    """Corrects the train/inference mismatch: each token's loss is multiplied by the policy's probability over
    the engine's, both before the update, without gradient. Needs old log-probs from the policy."""
    replay: Annotated[Literal["none", "r2", "r3"], AlsoCalled("routing_replay", "router_replay")] = "none"
    """Routing replay of MoE models: updates use the experts that the router now selects (`none`), those of
    the pass that computed the old log-probs (`r2`), or those that the rollout engine used (`r3`). The present
    router weights the replayed experts and keeps its gradient (docs/moe.md)."""
    balance: Annotated[NotNegative, AlsoCalled("router_aux_loss_coef", "aux_loss_coef")] = 0.0
    """Weight of the load-balancing loss of MoE models, computed per response (docs/moe.md)."""
    mask_truncated: Annotated[
        bool, AlsoCalled("mask_truncated_completions", "overlong_filtering", "overlong_filter")
    ] = False
    """Exclude responses that hit the length limit from the loss and its denominator."""

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
                "objective.type gspo needs sequence ratios; set algo.ratio=sequence, or objective.type=grpo "
                "to clip token ratios"
            )
        return self


def _no_is_a_word(value: Any) -> Any:
    """YAML reads `no` as false."""
    return "no" if value is False else value


class OptimConfig(Section):
    example: ClassVar[str] = "{steps: 100}"

    steps: Annotated[
        Positive,
        AlsoCalled("max_steps", "total_training_steps", "num_steps", "total_steps", "max_train_steps"),
    ]
    """Number of steps: rollout batches for `train`, updates for `sft`."""
    lr: Annotated[Rate, Note.IN_REPORT, AlsoCalled("learning_rate")] = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        AlsoCalled("lr_scheduler_type", "lr_scheduler", "warmup_style"),
    ] = "constant"
    """Learning-rate schedule after the warm-up; linear and cosine decay to 0."""
    warmup_steps: Annotated[
        Count,
        AlsoCalled(
            "lr_warmup_steps",
            "warmup",
            "warmup_ratio",
            "lr_warmup_ratio",
            "lr_warmup_steps_ratio",
            "num_warmup_steps",
        ),
    ] = 0
    """Steps of linear learning-rate warm-up."""
    weight_decay: NotNegative = 0.0
    """Weight decay of AdamW."""
    betas: Annotated[tuple[Share, Share], AlsoCalled("adam_betas", "adam_beta1", "adam_beta2")] = (0.9, 0.999)
    """Betas of AdamW."""
    max_grad_norm: Annotated[
        Rate, AlsoCalled("grad_clip", "clip_grad", "clip_grad_norm", "max_norm", "gradient_clipping")
    ] = 1.0
    """Gradients are clipped to this norm."""
    bad_updates: Annotated[Count, Note.FREE_ON_RESUME] = 3
    """Skip updates whose loss, gradient or importance ratio is NaN or infinite; stop the run after more than
    this many in a row. Their batches are saved to `bad_updates/` in the run's folder."""
    precision: Annotated[
        Literal["no", "bf16"],
        BeforeValidator(_no_is_a_word),
        AlsoCalled("bf16", "mixed_precision", "autocast"),
    ] = "no"
    """`bf16` computes with bfloat16 autocast; weights and log-probs keep their type."""
    optimizer: Annotated[Literal["adamw", "adamw_8bit", "paged_adamw_8bit"], AlsoCalled("optim")] = "adamw"
    """`adamw_8bit` stores the optimizer state in 8 bits; `paged_adamw_8bit` also moves it to host memory when
    the GPU is full. Both need bitsandbytes."""
    shard: Annotated[
        Positive | Literal["all"],
        Note.FREE_ON_RESUME,
        AlsoCalled("fsdp", "fsdp_size", "fsdp_config", "zero_stage", "deepspeed"),
    ] = 1
    """FSDP group size: GPUs that share one copy of weights, gradients and optimizer state. It must divide the
    number of GPUs; `all` uses all of them, 1 is plain data parallelism."""
    reduce_dtype: Annotated[
        Literal["float32", "bfloat16"],
        AlsoCalled("fsdp_reduce_dtype", "mp_reduce_dtype", "grad_reduce_dtype"),
    ] = "float32"
    """Type in which the GPUs that share a model add up a pass's gradients. `bfloat16` halves this traffic,
    which is the largest between nodes, and rounds each sum; it needs `shard` and `precision: bf16`."""
    offload: Annotated[
        bool,
        Note.FREE_ON_RESUME,
        AlsoCalled(
            "cpu_offload", "param_offload", "optimizer_offload", "offload_params", "offload_optimizer"
        ),
    ] = False
    """Store weights (except a frozen vision tower's), gradients and optimizer state in host memory and copy
    each layer to the GPU when it is needed: least GPU memory, slow."""
    tokens_per_microbatch: Annotated[
        Positive,
        Note.FREE_ON_RESUME,
        AlsoCalled(
            "per_device_train_batch_size",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "ppo_max_token_len_per_gpu",
            "ppo_micro_batch_size_per_gpu",
            "log_prob_micro_batch_size_per_gpu",
            "micro_batch_size_per_device_for_update",
            "micro_batch_size_per_device_for_experience",
            "use_dynamic_bsz",
        ),
    ] = 16384
    """Most tokens, padding included, in one forward and backward pass. It changes memory and speed, never the
    gradient."""
    layout: Annotated[Literal["shared", "plain"], Note.FREE_ON_RESUME] = "shared"
    """`shared` computes a prompt once for all its responses, `plain` once per response. The results are the
    same; every run checks that at its start."""


class TrainerConfig(OptimConfig):
    prompts_per_step: Annotated[
        Positive,
        Note.IN_REPORT,
        AlsoCalled(
            "batch_size",
            "train_batch_size",
            "prompts_per_batch",
            "generation_batch_size",
            "rollout_batch_size",
        ),
    ] = 32
    """Prompts (groups) per step."""
    minibatches: Annotated[
        Positive,
        Note.IN_REPORT,
        AlsoCalled(
            "num_mini_batches",
            "ppo_mini_batch_size",
            "mini_batch_size",
            "global_batch_size",
            "steps_per_generation",
        ),
    ] = 4
    """Optimizer updates per step, each on its own share of the prompts. With 1 all importance ratios are 1
    and all objectives are the same."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Source of the old log-probs (before the update): a forward pass of the policy (`recompute`), the
    rollout engine (`rollout`), or the engine if at the start of the run its log-probs agree with the policy's
    up to rounding (`auto`). The first update of a step needs neither where it is on policy."""

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
    rows_per_step: Annotated[Positive, AlsoCalled("batch_size", "train_batch_size")] = 32
    """Demonstrations per update (batch size)."""


class EvalConfig(Section):
    data: Annotated[
        list[RowsConfig],
        AlsoCalled("val_files", "val_file", "val_dataset", "eval_dataset", "eval_data", "test_files"),
    ] = []
    """Held-out sets: a list of sources, each evaluated under its `name`. One source may stand without a list;
    its name is `held-out`. `system`, `template` and `verifier` are those of `data` unless set here. The first
    evaluation decides which checkpoint is best: `data.holdout`, else the first set here, else the first
    benchmark."""
    benchmarks: Annotated[list[str], Note.DEFINITION] = []
    """Benchmarks to evaluate on as well: `NAME` (eval/README.md lists them), `NAME=FILE` with the benchmark's
    rows in a local file, or the path of a definition of your own. Responses may be as long as the definition
    says."""
    limit: Annotated[Positive | None, AlsoCalled("val_max_samples", "max_eval_samples")] = None
    """Evaluate only the first N problems of each benchmark."""
    every: Annotated[
        Count, AlsoCalled("eval_steps", "test_freq", "val_freq", "eval_interval", "eval_strategy")
    ] = 0
    """Evaluate every N steps, in addition to before and after training; 0 for only these two."""
    samples: Annotated[
        Positive, AlsoCalled("n", "num_generations", "num_generations_eval", "val_kwargs.n")
    ] = 1
    """Responses per problem; pass@1 is their mean score."""
    temperature: Annotated[NotNegative, AlsoCalled("val_kwargs.temperature")] = 1.0
    """Sampling temperature of the evaluation; 0 is greedy."""
    top_p: Annotated[TopP, AlsoCalled("val_kwargs.top_p")] = 1.0
    """Nucleus sampling: sample from the smallest set of most likely tokens whose probability sums to this."""
    top_k: Count = 0
    """Sample from the k most likely tokens; 0 for all."""
    min_p: Probability = 0.0
    """Sample from tokens whose probability is at least this fraction of the most likely token's."""
    part: str | None = None
    """Reward part to report; null for the first one that reads the gold answer."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return [value | {"name": HELD_OUT if value.get("name") is None else value["name"]}]
        return [] if value is None else value

    @field_validator("data")
    @classmethod
    def _names_differ(cls, value: list[RowsConfig]) -> list[RowsConfig]:
        names = [rows.task for rows in value]
        if len(set(names)) < len(names):
            raise ValueError(f"two sets of one name ({', '.join(names)}); give each its own `name`")
        return value


def check_updates_survive(model: ModelConfig, train: OptimConfig) -> None:
    """Raises ValueError where updates of half-precision weights would be rounded away, so that nothing is
    learnt."""
    if model.lora is not None or model.dtype == "float32":
        return
    other = (
        "float32 with train.precision=bf16, or train adapters with `model.lora={rank: 16}` and train.lr ten "
        "times as large"
    )
    if model.dtype == "float16":
        raise ValueError(
            "model.dtype (float16) must be bfloat16 or float32 without model.lora: small updates and small "
            f"gradients become 0 in it; use bfloat16, whose weights are rounded stochastically, {other}"
        )
    if train.optimizer != "adamw":
        raise ValueError(
            f"train.optimizer ({train.optimizer}) must be adamw with model.dtype=bfloat16 and without "
            "model.lora: it rounds updates of 1e-6 away, and adamw rounds such weights stochastically. Or "
            f"use model.dtype={other}"
        )


PROMPT = ("system", "template", "verifier")


def with_prompt_of(data: DataConfig, rows: RowsConfig) -> RowsConfig:
    """Held-out rows with the training rows' prompt and verifier unless they set their own."""
    if data.mixture:
        return rows
    own = rows.model_fields_set
    return rows.model_copy(update={name: value for name, value in data if name in PROMPT and name not in own})


def complete_evaluation(config: TrainConfig | SftConfig) -> None:
    """Gives held-out sets the prompt of the training rows. Raises ValueError where two evaluations would have
    one name, or no checkpoint would be evaluated."""
    data, section = config.data, config.eval
    section.data = [with_prompt_of(data, rows) for rows in section.data]
    for rows in section.data:
        if data.holdout and (rows.task == HELD_OUT or rows.task.startswith(f"{HELD_OUT}/")):
            raise ValueError(
                f"eval.data and data.holdout ({data.holdout}) would both be evaluated as {rows.task}; name "
                "the set of eval.data otherwise, as in eval.data.name=test"
            )
    config.checkpoint.check_best(section.every, section.data or section.benchmarks or data.holdout)


class TrainConfig(Section):
    """What `vlm-sapo train` runs."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    algo: AlgoConfig = AlgoConfig()
    train: TrainerConfig
    eval: Annotated[EvalConfig, Note.FREE_ON_RESUME] = EvalConfig()
    checkpoint: Annotated[CheckpointConfig, Note.FREE_ON_RESUME] = CheckpointConfig()
    alarms: Annotated[AlarmsConfig, Note.FREE_ON_RESUME] = AlarmsConfig()
    log: Annotated[LogConfig, Note.FREE_ON_RESUME] = LogConfig()
    hub: Annotated[HubConfig, Note.FREE_ON_RESUME] = HubConfig()

    @model_validator(mode="after")
    def _reward_and_evaluation(self):
        complete_evaluation(self)
        check_updates_survive(self.model, self.train)
        if not self.reward.parts:
            raise ValueError("reward.parts must name at least one verifier or function")
        if self.algo.correction and self.train.old_logprobs == "rollout":
            raise ValueError(
                "algo.correction compares the policy's old log-probs with the engine's, and "
                "train.old_logprobs (rollout) makes them the same; set train.old_logprobs=recompute"
            )
        if self.algo.replay == "r2" and self.train.old_logprobs == "rollout":
            raise ValueError(
                "algo.replay (r2) replays the experts of the pass that computes the old log-probs, and with "
                "train.old_logprobs (rollout) there is no such pass; set train.old_logprobs=recompute, or "
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
    eval: Annotated[EvalConfig, Note.FREE_ON_RESUME] = EvalConfig()
    checkpoint: Annotated[CheckpointConfig, Note.FREE_ON_RESUME] = CheckpointConfig()
    log: Annotated[LogConfig, Note.FREE_ON_RESUME] = LogConfig()
    hub: Annotated[HubConfig, Note.FREE_ON_RESUME] = HubConfig()

    @model_validator(mode="after")
    def _complete(self):
        complete_evaluation(self)
        check_updates_survive(self.model, self.train)
        if any("response" not in task.columns for task in self.data.tasks):
            raise ValueError("data.columns.response is missing; set it to the column with the demonstrations")
        for field, rows in (("eval.data", self.eval.data), ("data.holdout", self.data.holdout)):
            if rows and not self.reward.parts:
                raise ValueError(f"{field} needs a reward; set reward.parts, or remove {field}")
        return self


def report_fields() -> frozenset[str]:
    """Dotted names of the fields that a report's summary shows."""
    return noted(Note.IN_REPORT, TrainConfig, SftConfig)


def free_on_resume() -> frozenset[str]:
    """Dotted names of the fields and sections that a resumed run may change."""
    return noted(Note.FREE_ON_RESUME, TrainConfig, SftConfig)
