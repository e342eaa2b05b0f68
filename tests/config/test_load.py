"""Config files: every shipped one loads, mistakes are sentences that name the field and the remedy."""

import inspect
from functools import partial

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vlm_sapo.algo.objectives import OBJECTIVES
from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.plugins import shipped

SHIPPED = sorted(path.stem for path in shipped("configs").glob("*.yaml"))


def kind_of(name: str):
    return cfg.SftConfig if name == "cold_start" else cfg.TrainConfig


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {path: m}\ndata: {source: d}\nreward: {parts: [{name: math}]}\ntrain: {steps: 3}\n"
    )
    return partial(configfile.load, cfg.TrainConfig, str(path))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load_and_survive_a_round_trip(name, tmp_path):
    config = configfile.load(kind_of(name), name)
    (tmp_path / "again.yaml").write_text(configfile.dump(config))
    assert configfile.load(kind_of(name), str(tmp_path / "again.yaml")) == config


def test_numbers_are_numbers_and_no_is_a_word(load):
    config = load(
        ["train.lr=1e-6", "algo.objective.tau_neg=1.2", "data.args.rate=1e-3", "train.precision=no"]
    )
    assert config.train.lr == 1e-6
    assert config.algo.objective.tau_neg == 1.2
    assert config.data.args["rate"] == 1e-3
    assert config.train.precision == "no"


def test_overrides_reach_lists_and_replace_values(load):
    config = load(["reward.parts.0.weight=0.5", "model.freeze=[vision, merger]", "run.dir=/tmp/x"])
    assert config.reward.parts[0].weight == 0.5
    assert config.model.freeze == ["vision", "merger"]
    assert str(config.run.folder) == "/tmp/x"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stepz=3", "train.stepz is not a field; did you mean train.steps?"),
        ("algo.objective={type: sapo, tau_plus: 1}", "algo.objective.tau_plus is not a field; did you mean"),
        ("algo.objective={type: grpo, tau_pos: 1}", "algo.objective.tau_pos is not a field"),
        ("trian={}", "trian is not a field; did you mean train?"),
        (
            "reward.parts.0.wieght=2",
            "reward.parts.0.wieght is not a field; did you mean reward.parts.0.weight?",
        ),
        ("train.prompts_per_step=30", "(30) must be divisible by minibatches (4); use 28 or 32"),
        ("algo.objective={type: gspo}", "set algo.ratio=sequence"),
        (
            "algo.objective.tau_neg=0",
            "algo.objective.tau_neg (0) is not valid: input should be greater than 0",
        ),
        ("train.lr=fast", "train.lr ('fast') is not valid"),
        ("data.template=hello", "template must contain {problem}"),
        ("rollout.group=1", "rollout.group (1) is not valid"),
        ("eval.part=style", "eval.part (style) must be one of the reward's parts: math"),
        ("reward.parts.3.weight=1", "must name an entry from 0 to 0"),
        ("nonsense", "must look like section.field=value"),
    ],
)
def test_mistakes_are_sentences(load, override, sentence):
    with pytest.raises(ValueError) as error:
        load([override])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "algo.advantage=zscor",
            "algo.advantage ('zscor') is not valid: input should be 'zscore', 'centred' or 'leave_one_out'",
        ),
        ("algo.advantage={type: own}", "algo.advantage.function is missing; add it to the config file"),
        ("algo.advantage={function: f.py:f}", "algo.advantage.type is missing"),
        (
            "algo.reduction={type: own, function: f.py:f, agrs: 1}",
            "algo.reduction.agrs is not a field; did you mean algo.reduction.args? Fields there: type, function",
        ),
        ("algo.objective={type: dppo, low: -1}", "algo.objective.low (-1) is not valid"),
        ("algo.objective={type: vespo, k_pso: 1}", "did you mean algo.objective.k_pos?"),
    ],
)
def test_mistakes_about_functions_are_one_sentence(load, override, sentence):
    with pytest.raises(ValueError) as error:
        load([override])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.top_p=0.9"], "top_p (0.9) cuts the distribution off"),
        (["rollout.top_k=20"], "set eval.top_k for evaluations"),
        (["rollout.min_p=0.1"], "remove it"),
        (["rollout.ahead=-1"], "rollout.ahead (-1) is not valid"),
        (["rollout.engine=vlm"], "must be one of hf, vllm, vllm_server, own; did you mean vllm?"),
        (
            ["rollout.engine={type: vllm_server, servers: [localhost:8000]}"],
            "must be an address such as http",
        ),
        (["algo.correction={type: masked, low: 3}"], "low (3.0) must be under high (2.0)"),
        (["algo.correction={type: truncated, low: 0.5}"], "low (0.5) has no part in type truncated"),
        (["rollout.engine.servers=[a]"], "rollout.engine.servers is not a field"),
        (["rollout.engine={type: vllm, server: 1}"], "rollout.engine.server is not a field"),
        (["algo.correction={type: truncated}", "train.old_logprobs=rollout"], "train.old_logprobs=recompute"),
        (["algo.correction={type: clipped}"], "'truncated' or 'masked'"),
        (["algo.replay=r2", "train.old_logprobs=rollout"], "algo.replay (r2) replays the experts"),
        (["algo.replay=r4"], "'none', 'r2' or 'r3'"),
    ],
)
def test_mistakes_about_engines_are_sentences(load, overrides, sentence):
    with pytest.raises(ValueError) as error:
        load(overrides)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hf", "vllm", "vllm_server"])
def test_an_engine_by_its_name_alone(load, name):
    assert load([f"rollout.engine={name}"]) == load([f"rollout.engine.type={name}"])
    assert (
        load(["rollout.engine.type=vllm", "rollout.engine.gpu_memory=0.3"]).rollout.engine.gpu_memory == 0.3
    )


@pytest.mark.parametrize("short", ["math", "[{name: math}]", "{parts: math}"])
def test_short_forms_of_a_reward(load, short):
    assert [part.name for part in load([f"reward={short}"]).reward.parts] == ["math"]


def test_a_missing_field_says_how_to_give_it(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {source: d}\nreward: [{name: math}]\ntrain: {steps: 3}\n")
    with pytest.raises(ValueError, match="model is missing; add it .* as model="):
        configfile.load(cfg.TrainConfig, str(tmp_path / "x.yaml"))


def test_an_unknown_config_lists_the_shipped_ones():
    with pytest.raises(ValueError, match="quickstart"):
        configfile.load(cfg.TrainConfig, "quickstrat")


@pytest.mark.parametrize("section", [cfg.SapoConfig, cfg.GrpoConfig, cfg.GspoConfig, cfg.CispoConfig])
def test_an_objective_has_exactly_the_parameters_of_its_section(section):
    name = section.model_fields["type"].annotation.__args__[0]
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords == set(section.model_fields) - {"type"}


def test_every_field_has_a_text():
    def walk(section):
        for name, field in section.model_fields.items():
            inner = configfile._sections(field.annotation)
            for other in inner:
                yield from walk(other)
            if not inner and name != "type" and not field.description:
                yield f"{section.__name__}.{name}"

    assert list(walk(cfg.TrainConfig)) + list(walk(cfg.SftConfig)) == []


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
def test_any_file_and_override_is_a_config_or_a_sentence(tmp_path, content, override):
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    for name, overrides in ((str(path), []), ("quickstart", [override])):
        try:
            assert isinstance(configfile.load(cfg.TrainConfig, name, overrides), cfg.TrainConfig)
        except ValueError:
            continue


@given(st.binary(max_size=60) | st.text(alphabet="{}[]:-&*!|>#'\"\n\tab01 ", max_size=60).map(str.encode))
def test_any_bytes_are_a_config_or_a_sentence(tmp_path, content):
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        configfile.load(cfg.TrainConfig, str(path), [])
    except ValueError:
        return


@pytest.mark.parametrize("value", ["[1", "\x02", "{a: b: c}", "[" * 3000, "&a [*b]"])
def test_an_override_that_is_no_yaml_is_named(value):
    with pytest.raises(ValueError, match=r"override \(train.lr=.*must be valid YAML"):
        configfile.load(cfg.TrainConfig, "quickstart", [f"train.lr={value}"])
