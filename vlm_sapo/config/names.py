"""Names of other trainers (TRL, verl, EasyR1, ms-swift) that no single field stands for, and what to do.

Names with a counterpart stand beside it, as AlsoCalled. A name counts at any depth of a config, and for all
that is below it. `docs/build.py` makes docs/coming-from.md of both.
"""

from __future__ import annotations

EPOCHS = "there are no epochs here; set train.steps to rows x epochs / train.prompts_per_step"
ONCE = "each response is trained on once; train.minibatches is the number of updates per step"
NO_CRITIC = "there is no value model; algo.advantage compares the responses of a group"
LAUNCHER = "the launcher says it, as in `torchrun --nproc-per-node 8 -m vlm_sapo train ...`"
NO_ENTROPY = (
    "there is no entropy term; raise rollout.temperature or algo.kl, or write an objective of your own"
)
PACKED = "responses are always packed without padding (train.layout)"
ATTENTION = "the package chooses the attention itself; leave it out"
KL = "the KL term is the k3 estimate in the loss; algo.kl is its weight"
DUAL_CLIP = "there is no dual clip; sapo and dppo bound tokens of negative advantage by themselves"
LENGTH = "add the verifier `length` to reward.parts"

WITHOUT_FIELD: dict[str, str] = {
    **dict.fromkeys(("num_train_epochs", "num_epochs", "total_epochs", "epochs", "total_episodes"), EPOCHS),
    **dict.fromkeys(("num_iterations", "ppo_epochs", "mu"), ONCE),
    **dict.fromkeys(("critic", "value_model", "gamma", "lam", "cliprange_value", "vf_coef"), NO_CRITIC),
    **dict.fromkeys(("n_gpus_per_node", "nnodes", "num_processes", "nproc_per_node", "num_gpus"), LAUNCHER),
    **dict.fromkeys(("entropy_coeff", "entropy_coef", "top_entropy_quantile"), NO_ENTROPY),
    **dict.fromkeys(("padding_free", "use_remove_padding", "packing", "padding_side"), PACKED),
    **dict.fromkeys(("attn_implementation", "attn_impl"), ATTENTION),
    **dict.fromkeys(("kl_loss_type", "kl_estimator", "kl_ctrl.type", "horizon", "target_kl"), KL),
    **dict.fromkeys(("overlong_buffer", "overlong_buffer_cfg", "soft_cache_length"), LENGTH),
    "loss_type": "set algo.objective (sapo, grpo, gspo, cispo, ...) and algo.reduction: TRL's grpo is "
    "sequence_mean, its dapo and bnpo token_mean, its dr_grpo constant",
    "delta": "there is no two-sided clip; algo.correction bounds ratios between engine and trainer",
    **dict.fromkeys(("clip_ratio_c", "clip_ratio_dual"), DUAL_CLIP),
    "sync_ref_model": "the reference stays the initial model; leave it out",
    "ref_model_sync_steps": "the reference stays the initial model; leave it out",
    "logging_steps": "every step is logged; leave it out",
    "logging_strategy": "every step is logged; leave it out",
    "val_before_train": "every run evaluates before its first step; eval.data=null turns it off",
    "do_train": "`vlm-sapo train` trains; leave it out",
    "do_eval": "eval.data and eval.benchmarks say what is evaluated",
    "remove_unused_columns": "every column reaches the reward, as example.columns; leave it out",
    "shuffle": "rows are always shuffled, by run.seed",
    "disable_dropout": "dropout is always off; leave it out",
    "fp16": "train.precision is bf16 or no",
    "hub_token": "the token is that of HF_TOKEN or `hf auth login`; a config is stored and has none",
    "hub_strategy": "hub.push uploads the result once, when the run is finished",
    "rlhf_type": "`vlm-sapo train` is group-relative reinforcement learning, `vlm-sapo sft` the cold start",
    "ulysses_sequence_parallel_size": "a response stays on one GPU; train.shard divides the weights",
    "sequence_parallel_size": "a response stays on one GPU; train.shard divides the weights",
    "min_lr_ratio": "train.schedule ends at 0 (linear, cosine) or stays (constant)",
    "reward_model": "there is no reward model; reward.parts names verifiers, a judge or a function of yours",
}


def without_field(name: str) -> str:
    """What to do instead of the field with this dotted name; empty if the table doesn't have it."""
    parts = name.split(".")
    dotted = [".".join(parts[start : start + 2]) for start in range(len(parts) - 1)]
    return next((WITHOUT_FIELD[part] for part in (*dotted, *parts) if part in WITHOUT_FIELD), "")
