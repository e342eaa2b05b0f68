"""A config with another trainer's names was refused without saying what the field is called here.

Source: https://github.com/unslothai/unsloth/pull/8330
"""

import pytest
import yaml

from vlm_sapo import load_config
from vlm_sapo.config.fields import other_names, walk
from vlm_sapo.config.names import WITHOUT_FIELD
from vlm_sapo.config.schema import SftConfig, TrainConfig

OURS = {"model": {"path": "m"}, "data": {"source": "d"}, "reward": "math", "train": {"steps": 3}}


def message(tmp_path, values: dict, *overrides: str) -> str:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(OURS | values))
    with pytest.raises(ValueError) as error:
        load_config(tmp_path / "run.yaml", *overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("num_generations", "rollout.group"),
        ("rollout.n", "rollout.group"),
        ("max_completion_length", "rollout.max_tokens"),
        ("max_prompt_length", "data.max_prompt_tokens"),
        ("per_device_train_batch_size", "train.tokens_per_microbatch"),
        ("learning_rate", "train.lr"),
        ("algo.beta", "algo.kl"),
        ("scale_rewards", "algo.advantage"),
        ("epsilon_high", "algo.objective.high"),
        ("mask_truncated_completions", "algo.mask_truncated"),
        ("resume_from_checkpoint", "run.dir"),
        ("use_vllm", "rollout.engine"),
        ("data.train_files", "data.source"),
        ("data.rollout_batch_size", "train.prompts_per_step"),
        ("actor_rollout_ref.rollout.n", "rollout.group"),
        ("actor_rollout_ref.rollout.name", "rollout.engine"),
        ("actor_rollout_ref.rollout.val_kwargs.n", "eval.samples"),
        ("actor_rollout_ref.model.path", "model.path"),
        ("actor_rollout_ref.actor.optim.lr", "train.lr"),
        ("actor_rollout_ref.actor.ppo_mini_batch_size", "train.minibatches"),
        ("algorithm.kl_ctrl.kl_coef", "algo.kl"),
        ("algorithm.norm_adv_by_std_in_grpo", "algo.advantage"),
        ("custom_reward_function.path", "reward.parts"),
        ("trainer.save_freq", "checkpoint.every"),
        ("worker.actor.global_batch_size", "train.minibatches"),
        ("worker.actor.model.freeze_vision_tower", "model.freeze"),
        ("freeze_vit", "model.freeze"),
        ("dynamic_sample", "rollout.resample"),
    ],
)
def test_the_error_names_our_field(tmp_path, theirs, ours):
    assert f"unknown field `{theirs}`; did you mean `{ours}`?" in message(tmp_path, {}, f"{theirs}=1")


@pytest.mark.parametrize(
    ("theirs", "instead"),
    [
        ("train.num_train_epochs", "set train.steps to"),
        ("trainer.total_epochs", "set train.steps to"),
        ("loss_type", "algo.reduction"),
        ("num_iterations", "train.minibatches"),
        ("critic.optim.lr", "there is no value model"),
        ("actor_rollout_ref.actor.entropy_coeff", "there is no entropy term"),
        ("trainer.n_gpus_per_node", "torchrun"),
    ],
)
def test_what_has_no_field_says_what_to_do(tmp_path, theirs, instead):
    assert instead in message(tmp_path, {}, f"{theirs}=1").splitlines()[0]


def test_another_trainers_section_gets_a_line_for_each_field(tmp_path):
    actor = {"optim": {"lr": 1e-6}, "kl_loss_coef": 0.01, "entropy_coeff": 0}
    lines = message(tmp_path, {"actor_rollout_ref": {"actor": actor, "rollout": {"n": 5}}}).splitlines()
    assert len(lines) == 4 and all(line.startswith("unknown field `actor_rollout_ref.") for line in lines)
    many = {f"field_{number}": number for number in range(30)}
    assert "... and 10 more below `worker`" in message(tmp_path, {"worker": many})


@pytest.mark.parametrize("typo", ["trian", "rolout", "checkpiont"])
def test_a_misspelt_section_is_not_taken_for_another_trainers(tmp_path, typo):
    ours = {"trian": "train", "rolout": "rollout", "checkpiont": "checkpoint"}[typo]
    field = {"trian": "lr", "rolout": "group", "checkpiont": "every"}[typo]
    assert f"`{typo}`; did you mean `{ours}`?" in message(tmp_path, {typo: {field: 4}})


def test_no_name_is_both_a_field_elsewhere_and_without_one():
    for kind in (TrainConfig, SftConfig):
        names = {name for _, field in walk(kind) for name in other_names(field)}
        assert not names & WITHOUT_FIELD.keys()
        assert not {path.rpartition(".")[2] for path, _ in walk(kind)} & WITHOUT_FIELD.keys()
