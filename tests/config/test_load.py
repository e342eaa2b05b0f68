"""Config files: every shipped one loads; errors name the field, the value and the remedy."""

import inspect
from functools import partial

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlm_sapo.algo.objectives import OBJECTIVES
from vlm_sapo.config import fields
from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.config.evaluation import EvalOptions, ScoreOptions
from vlm_sapo.plugins import shipped

SHIPPED = sorted(path.stem for path in shipped("configs").glob("*.yaml"))


def kind_of(name: str):
    return cfg.SftConfig if name.endswith("cold_start") else cfg.TrainConfig


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\ndata: {source: d}\nreward: {parts: [{name: math}]}\ntrain: {steps: 3}\n"
    )
    return partial(configfile.load, cfg.TrainConfig, str(path))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_dump_to_the_same_config(name, tmp_path):
    config = configfile.load(kind_of(name), name)
    (tmp_path / "again.yaml").write_text(configfile.dump(config))
    assert configfile.load(kind_of(name), str(tmp_path / "again.yaml")) == config


def test_exponents_are_numbers_and_no_is_text(load):
    config = load(
        ["train.lr=1e-6", "algo.objective.tau_neg=1.2", "data.args.rate=1e-3", "train.precision=no"]
    )
    assert config.train.lr == 1e-6
    assert config.algo.objective.tau_neg == 1.2
    assert config.data.args["rate"] == 1e-3
    assert config.train.precision == "no"


def test_overrides_set_list_entries_and_replace_lists(load):
    config = load(["reward.parts.0.weight=0.5", "model.freeze=[vision, merger]", "run.dir=/tmp/x"])
    assert config.reward.parts[0].weight == 0.5
    assert config.model.freeze == ["vision", "merger"]
    assert str(config.run.folder) == "/tmp/x"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=3", "unknown field `train.stepz`; did you mean `train.steps`?"),
        (
            "algo.objective={type: sapo, tau_plus: 1}",
            "unknown field `algo.objective.tau_plus`; did you mean `algo.objective.tau_pos`?",
        ),
        (
            "algo.objective={type: grpo, tau_pos: 1}",
            "unknown field `algo.objective.tau_pos`; only another `type` has it.",
        ),
        ("trian={}", "unknown field `trian`; did you mean `train`?"),
        (
            "reward.parts.0.wieght=2",
            "unknown field `reward.parts.0.wieght`; did you mean `reward.parts.0.weight`?",
        ),
        ("train.prompts_per_step=30", "(30) must be divisible by minibatches (4); use 28 or 32"),
        ("algo.objective={type: gspo}", "set algo.ratio=sequence"),
        (
            "algo.objective.tau_neg=0",
            "algo.objective.tau_neg (0) must be a number greater than 0",
        ),
        ("train.lr=fast", "train.lr ('fast') must be a number greater than 0"),
        ("train.lr=.inf", "train.lr (inf) must be finite"),
        ("train.shard=most", "train.shard ('most') must be a whole number of at least 1 or `all`"),
        ("train.betas=[1, 0]", "train.betas.0 (1) must be a number of at least 0 and less than 1"),
        ("algo.advantage=centered", "such as {type: own, function: my_file.py:name}; did you mean centred?"),
        ("algo.advantage={type: own}", "algo.advantage.function is missing"),
        ("model.lora=16", "model.lora (16) must be fields such as {rank: 16} or null"),
        ("eval.data=[{source: x}, {source: x}]", "eval.data: two sets of one name (x, x); give each its own"),
        ("data.holdout=1.0", "data.holdout (1.0) must be a whole number of at least 1"),
        ("data.columns={image: x}", "data.columns.image ('image') must be `problem`, `answer`, `images`"),
        ("log.to=wandb", "log.to ('wandb') must be a list such as [tensorboard]"),
        ("run.name=5", "run.name (5) must be text; put it in quotes"),
        ("data=5", "data (5) must be fields such as {source: rows.jsonl}"),
        ("data.template=hello", "template must contain {problem}"),
        (
            "rollout={prompts_per_batch: 4, sequences_per_batch: 64}",
            "rollout: prompts_per_batch (4) must not be set together with sequences_per_batch (64)",
        ),
        ("rollout.group=1", "rollout.group (1) must be a whole number of at least 2"),
        ("eval.part=style", "eval.part (style) must be one of the reward's parts: math"),
        ("reward.parts.3.weight=1", "must name an entry by its number from 0 to 0, not 3"),
        ("nonsense", "must look like section.field=value"),
    ],
)
def test_errors_name_field_value_and_remedy(load, override, sentence):
    with pytest.raises(ValueError) as error:
        load([override])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("train.learning_rate", "train.lr"),
        ("train.lora_r", "model.lora.rank"),
        ("train.num_generations", "rollout.group"),
        ("train.max_tokens", "rollout.max_tokens"),
        ("rollout.n", "rollout.group"),
        ("eval.n", "eval.samples"),
        ("algo.beta", "algo.kl"),
        ("model.name", "model.path"),
        ("resume_from_checkpoint", "run.dir"),
        ("algo.objective.epsilon", "algo.objective.low"),
    ],
)
def test_names_of_other_trainers_lead_to_ours(load, name, ours):
    with pytest.raises(ValueError, match=f"unknown field `{name}`; did you mean `{ours}`"):
        load(["algo.objective=grpo", f"{name}=1"])


def test_other_names_are_no_fields_of_the_same_section():
    for section in {section for kind in (cfg.TrainConfig, cfg.SftConfig) for section in sections(kind)}:
        names = [name for field in section.model_fields.values() for name in fields.other_names(field)]
        assert len(set(names)) == len(names) and not set(names) & set(section.model_fields), section


def sections(kind):
    yield kind
    for field in kind.model_fields.values():
        for inner in fields.sections_in(field.annotation):
            yield from sections(inner)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.top_p=0.9"], "top_p (0.9) truncates the sampling distribution"),
        (["rollout.top_k=20"], "eval.top_k sets it for evaluations"),
        (["rollout.min_p=0.1"], "remove it"),
        (["rollout.ahead=-1"], "rollout.ahead (-1) must be a whole number of at least 0"),
        (["rollout.engine=vlm"], "must be one of hf, vllm, vllm_server, own; did you mean vllm?"),
        (
            ["rollout.engine={type: vllm_server, servers: [localhost:8000]}"],
            "must be an address such as http",
        ),
        (["algo.correction={type: masked, low: 3}"], "low (3.0) must be less than high (2.0)"),
        (["algo.correction={type: truncated, low: 0.5}"], "low (0.5) has no effect with type truncated"),
        (["rollout.engine.servers=[a]"], "`rollout.engine.servers`; only another `type` has it"),
        (["rollout.engine={type: vllm, server: 1}"], "unknown field `rollout.engine.server`"),
        (["algo.correction={type: truncated}", "train.old_logprobs=rollout"], "train.old_logprobs=recompute"),
        (["algo.correction={type: clipped}"], "must be `truncated` or `masked`"),
        (["algo.replay=r2", "train.old_logprobs=rollout"], "algo.replay (r2) replays the experts"),
        (["algo.replay=r4"], "must be `none`, `r2` or `r3`"),
    ],
)
def test_errors_of_rollout_and_correction_are_one_line(load, overrides, sentence):
    with pytest.raises(ValueError) as error:
        load(overrides)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hf", "vllm", "vllm_server"])
def test_an_engine_may_be_written_as_its_name(load, name):
    assert load([f"rollout.engine={name}"]) == load([f"rollout.engine.type={name}"])
    assert (
        load(["rollout.engine.type=vllm", "rollout.engine.gpu_memory=0.3"]).rollout.engine.gpu_memory == 0.3
    )


@pytest.mark.parametrize("short", ["math", "[{name: math}]", "{parts: math}"])
def test_short_forms_of_a_reward(load, short):
    assert [part.name for part in load([f"reward={short}"]).reward.parts] == ["math"]


def test_a_list_of_tasks_takes_overrides_with_and_without_mixture(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\ndata: [{source: a, share: 1}, {source: b, share: 1}]\nreward: [{name: math}]\n"
        "train: {steps: 3}\n"
    )
    for override in ("data.0.share=0.5", "data.mixture.0.share=0.5"):
        config = configfile.load(cfg.TrainConfig, str(path), [override, "reward.parts.0.weight=2"])
        assert config.data.tasks[0].share == 0.5 and config.reward.parts[0].weight == 2


def test_two_evaluations_of_one_name_are_refused(load):
    options = ["data.holdout=3", "eval.data.source=x"]
    with pytest.raises(
        ValueError, match=r"eval.data and data.holdout \(3\) would both be evaluated as held-out"
    ):
        load(options)
    assert [rows.task for rows in load([*options, "eval.data.name=test"]).eval.data] == ["test"]
    with pytest.raises(
        ValueError, match=r"keep_best \(1\) selects checkpoints by evaluation; set data.holdout or"
    ):
        load(["checkpoint.keep_best=1", "checkpoint.every=5", "eval.every=5"])
    load(["checkpoint.keep_best=1", "checkpoint.every=5", "eval.every=5", "data.holdout=3"])


def test_fields_beside_a_list_that_stands_for_a_section(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "model: {path: m}\ndata: [{source: d, share: 1}]\nreward: [{name: math}]\ntrain: {steps: 3}\n"
    )
    config = configfile.load(
        cfg.TrainConfig, str(path), ["data.holdout=0.1", "reward.timeout=3", "data.0.share=2"]
    )
    assert (config.data.holdout, config.data.tasks[0].share, config.reward.timeout) == (0.1, 2, 3)


def test_notes_beside_the_fields():
    free, shown = cfg.free_on_resume(), cfg.report_fields()
    for name in (
        "run.dir",
        "checkpoint.every",
        "log.to",
        "rollout.engine.servers",
        "train.shard",
        "eval.every",
        "eval.data",
    ):
        assert fields.belongs(name, free), name
    for name in (
        "train.lr",
        "rollout.engine.type",
        "data.holdout",
        "run.seed",
        "train.steps",
        "reward.parts",
    ):
        assert not fields.belongs(name, free), name
    for name in ("algo.objective.tau_pos", "data.args.size", "train.lr", "reward.parts", "run.seed"):
        assert fields.belongs(name, shown), name
    assert not fields.belongs("train.lr_schedule", shown) and not fields.belongs("train", shown)


def test_what_may_change_on_resume():
    config = configfile.load(cfg.TrainConfig, "quickstart")
    before = configfile.dump(config)
    for override, harmless in (
        ("run.dir=/tmp/x", True),
        ("checkpoint.keep_last=9", True),
        ("eval.samples=2", True),
        ("eval.data.args.size=9", True),
        ("train.steps=50", True),
        ("train.lr=1", False),
        ("rollout.engine=vllm", False),
    ):
        after = configfile.dump(configfile.load(cfg.TrainConfig, "quickstart", [override]))
        changes = configfile.differences(before, after)
        assert changes and all(change.harmless for change in changes) == harmless, override
    linear = [
        configfile.dump(configfile.load(cfg.TrainConfig, "quickstart", ["train.schedule=linear", steps]))
        for steps in ("train.steps=40", "train.steps=50")
    ]
    assert [change.harmless for change in configfile.differences(*linear)] == [False]


def test_a_missing_field_says_how_to_set_it(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {source: d}\nreward: [{name: math}]\ntrain: {steps: 3}\n")
    with pytest.raises(ValueError, match="model is missing; add it .* as model="):
        configfile.load(cfg.TrainConfig, str(tmp_path / "x.yaml"))


def test_an_unknown_config_lists_the_shipped_ones():
    with pytest.raises(
        ValueError, match="no config `quickstrat`; did you mean quickstart. Shipped configs: "
    ):
        configfile.load(cfg.TrainConfig, "quickstrat")
    with pytest.raises(
        ValueError, match="no config `nosuch`; check the name, or give the path of a YAML file"
    ):
        configfile.load(cfg.TrainConfig, "nosuch")


@pytest.mark.parametrize("section", [cfg.SapoConfig, cfg.GrpoConfig, cfg.GspoConfig, cfg.CispoConfig])
def test_an_objective_has_exactly_the_parameters_of_its_section(section):
    name = section.model_fields["type"].annotation.__args__[0]
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords == set(section.model_fields) - {"type"}


def test_every_field_has_a_text():
    for kind in (cfg.TrainConfig, cfg.SftConfig, EvalOptions, ScoreOptions):
        for name, field in fields.walk(kind):
            inner = fields.sections_in(field.annotation)
            assert inner or name.endswith(".type") or field.description, name


FIELDS = (
    "model",
    "path",
    "data",
    "source",
    "train",
    "steps",
    "rollout",
    "engine",
    "type",
    "run",
    "reward",
    "parts",
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(FIELDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4), st.text(max_size=30))
def test_any_file_and_override_loads_or_raises_value_error(tmp_path, content, override):
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    for name, overrides in ((str(path), []), ("quickstart", [override])):
        try:
            assert isinstance(configfile.load(cfg.TrainConfig, name, overrides), cfg.TrainConfig)
        except ValueError:
            continue


@given(st.binary(max_size=60) | st.text(alphabet="{}[]:-&*!|>#'\"\n\tab01 ", max_size=60).map(str.encode))
def test_any_bytes_load_or_raise_value_error(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        configfile.load(cfg.TrainConfig, str(path), [])
    except ValueError:
        return


@pytest.mark.parametrize("value", ["[1", "\x02", "{a: b: c}", "[" * 3000, "&a [*b]"])
def test_an_override_with_invalid_yaml_is_named(value):
    with pytest.raises(ValueError, match=r"override \(train.lr=.*must be valid YAML"):
        configfile.load(cfg.TrainConfig, "quickstart", [f"train.lr={value}"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.dtype=float16"], "model.dtype (float16) must be bfloat16 or float32 without model.lora"),
        (
            ["model.dtype=bfloat16", "train.optimizer=adamw_8bit"],
            "train.optimizer (adamw_8bit) must be adamw with model.dtype=bfloat16",
        ),
    ],
)
def test_weights_that_would_not_learn_are_refused(load, overrides, sentence):
    for kind in (cfg.TrainConfig, cfg.SftConfig):
        with pytest.raises(ValueError) as error:
            values = load(["data.columns.response=text"]).model_dump(exclude={"algo", "alarms"})
            values["train"] = {"steps": 1}
            for name, _, value in (item.partition("=") for item in overrides):
                section, field = name.split(".")
                values[section] = values[section] | {field: value}
            configfile.check(kind, values)
        assert sentence in str(error.value) and "train.precision=bf16" in str(error.value)
    load([*overrides, "model.lora={rank: 16}"])
    load(["model.dtype=bfloat16"])
