"""The stability study: its plan is valid, its measures are those that docs/results.md defines, it resumes."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
import yaml

from eval.noisy import noisy
from eval.stability import HERE, RESULTS, Plan, Run, Store, exclusive_lock, main, read_plan
from eval.stability_results import (
    COLLAPSE,
    WINDOW,
    Result,
    assumptions,
    collapse,
    counterpart,
    interval,
    measure,
    table,
    tied,
)
from tests.conftest import example
from vlm_sapo import load_config
from vlm_sapo.types import ResponseText

PLAN = read_plan(HERE / "stability.yaml")


@pytest.mark.parametrize("name", PLAN.studies)
def test_every_arm_is_a_config_of_its_own(name):
    arms = PLAN.arms(name)
    assert len({arm.options for arm in arms}) == len(arms)
    keys = [arm.runs(PLAN.config)[0].key for arm in arms]
    assert len(set(keys)) == len(keys), "two arms of one study are the same run"
    others = [arm.runs(PLAN.config)[1].key for arm in arms]
    assert not set(keys) & set(others), "a seed changes the run"


@pytest.mark.parametrize("name", PLAN.studies)
def test_methods_differ_in_the_algorithm_only(name):
    """Arms that differ in their first option only differ in `algo`, or in `data` where data is the question."""
    allowed = {"data"} if name == "shares" else {"algo"}
    arms = PLAN.arms(name)
    configs = [load_config(PLAN.config, *arm.overrides) for arm in arms]
    pairs = 0
    for (one, first), (other, second) in combinations(zip(arms, configs, strict=True), 2):
        if one.options[1:] == other.options[1:]:
            assert {field for field, value in first if value != vars(second)[field]} <= allowed
            pairs += 1
    assert pairs


@pytest.mark.slow
def test_the_committed_results_cover_the_plan():
    """After a change of configs or models, `make study` trains what this lists."""
    rows = Store(RESULTS / "runs.json").rows
    runs = {run.key: run for name in PLAN.studies for arm in PLAN.arms(name) for run in arm.runs(PLAN.config)}
    assert runs.keys() <= rows.keys()
    assert all(rows[key]["overrides"][-1] == f"run.seed={run.seed}" for key, run in runs.items())


def test_a_runs_key_depends_on_its_config_and_not_on_how_it_is_written():
    short = ["model.path=data/shapes/hard_dense", "run.seed=1"]
    explicit = [*short, "algo.objective={type: sapo, tau_neg: 1.05}", "run.dir=elsewhere", "log.rollouts=3"]
    assert Run("shapes_hard", "dense", short, 1).key == Run("shapes_hard", "dense", explicit, 1).key
    assert (
        Run("shapes_hard", "dense", [*short, "train.lr=1e-6"], 1).key
        != Run("shapes_hard", "dense", explicit, 1).key
    )
    moe = ["model.path=data/shapes/hard_moe", "run.seed=1"]
    assert Run("shapes_hard", "moe", moe, 1).key != Run("shapes_hard", "dense", short, 1).key


def test_unknown_options_are_named():
    text = (HERE / "stability.yaml").read_text().replace("against: [free-mixing]", "against: [free_mixing]")
    with pytest.raises(ValueError, match="studies.shares names options that are none: free_mixing"):
        Plan(**yaml.safe_load(text))


def row(evaluations, accuracy, seed=1, **more):
    return {
        "key": f"{seed}{evaluations}",
        "seed": seed,
        "evaluations": evaluations,
        "series": {"accuracy": accuracy},
        "steps": len(accuracy),
        "updates": 4 * len(accuracy),
        "kinds": {},
        "minibatches": {"steps": []},
    } | more


def test_measures_of_a_curve():
    measures = measure(row([[0, 0.2], [10, 0.6], [20, 0.4]], [0.5] * 20))
    assert (measures.last, measures.best, measures.collapsed) == (0.4, 0.6, None)
    assert measures.area == pytest.approx((0.4 * 10 + 0.5 * 10) / 20)


def test_a_run_that_stopped_at_non_finite_numbers_scores_0_afterwards():
    measures = measure(row([[0, 0.5], [10, 0.5]], [0.5] * 14, steps=20, stopped="nan"))
    assert (measures.last, measures.best, measures.collapsed) == (0.0, 0.5, 15)
    assert measures.area == pytest.approx(0.5 * 14 / 20)
    immediately = measure(row([[0, 0.5]], [], steps=20, stopped="nan"))
    assert (immediately.last, immediately.area, immediately.collapsed) == (0.0, 0.0, 1)


def test_collapse_is_the_first_step_far_below_the_best():
    assert collapse([0.5] * 30) is None
    fall = [0.5] * 10 + [0.0] * 10
    under = next(n for n in range(1, WINDOW + 1) if 0.5 * (WINDOW - n) / WINDOW < COLLAPSE * 0.5)
    assert collapse(fall) == 10 + under
    assert collapse([0.5] * 10 + [0.36] * 30) is None, "a decline to .72 of the best is none"
    assert collapse([0.9, 0.1] * 20) is None, "nor is noise"
    assert collapse([0.3]) is None and collapse([]) is None


def test_intervals():
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    mean, low, high = interval([0.1, 0.2, 0.3, 0.4, 0.5])
    assert mean == pytest.approx(0.3) and 0.1 < low < 0.25 and 0.35 < high < 0.5


def test_differences_are_paired_by_seed_and_ties_are_not_bold():
    plan = PLAN.model_copy(update={"seeds": [1, 2, 3]})
    arms = {arm.options: arm for arm in plan.arms("methods")}
    sapo, grpo, gspo = (arms[name, "4-updates", "lr-3e-5"] for name in ("sapo", "grpo", "gspo"))
    levels = {1: 0.2, 2: 0.5, 3: 0.8}  # seeds differ far more than methods

    def rows(gains):
        return {
            seed: row([[0, 0.1], [9, levels[seed] + gain]], [0.5] * 9, seed) for seed, gain in gains.items()
        }

    results = [
        Result(sapo, rows({1: 0, 2: 0, 3: 0})),
        Result(grpo, rows({1: 0.012, 2: 0.014, 3: 0.013})),
        Result(gspo, rows({1: 0.05, 2: -0.05, 3: 0.01})),
    ]
    lines = table(plan, "methods", results).splitlines()[2:]
    assert lines[0].endswith("| 0 |  |  |")
    assert re.search(r"\| \*\*\+0\.013 \(\+0\.012 to \+0\.014\)\*\*, 3 of 3 \| \*\*\+0\.00[67] ", lines[1])
    assert "**" not in lines[2] and "2 of 3" in lines[2]


def test_ties_are_decided_by_the_t_interval():
    """Of five seeds; 2.776 is its quantile of .975."""
    gains = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    reach = 2.776 * gains.std(ddof=1) / 5**0.5
    assert tied(gains + 0.999 * reach) and not tied(gains + 1.001 * reach)
    assert tied([0.3]) and tied([0.0, 0.0, 0.0]) and not tied([0.1, 0.1, 0.1])


def test_an_arm_has_a_counterpart_for_every_question():
    arms = PLAN.arms("staleness")
    by_options = {
        arm.options: Result(arm, {1: row([[0, 0], [9, index]], [0.5] * 9)}) for index, arm in enumerate(arms)
    }
    old = ("grpo", "old-4", "4-updates", "lr-3e-5")

    def last(options, against):
        return {seed: item.last for seed, item in counterpart(options, against, by_options).items()}

    index = {arm.options: number for number, arm in enumerate(arms)}
    assert last(old, "sapo") == {1: index["sapo", *old[1:]]}
    assert last(old, "old-0") == {1: index["grpo", "old-0", *old[2:]]}
    assert last(("sapo", *old[1:]), "sapo") == {}


def test_update_indices_that_few_steps_have_are_left_out():
    """Seeds may differ in how many updates their steps had."""
    one = {"steps": [4, 4, 1], "effective_update": [1.0, 0.5, 0.1]}
    other = {"steps": [4, 2], "effective_update": [1.0, 0.2]}
    arm = PLAN.arms("methods")[0]
    rows = {
        seed: row([[0, 0.1]], [0.5] * 4, seed, minibatches=item) for seed, item in enumerate((one, other))
    }
    lines = assumptions([Result(arm, rows)]).splitlines()[2:]
    assert [line.split("|")[2:4] for line in lines] == [[" 1 ", " 1 "], [" 2 ", " 0.4 "]], "weighted by steps"


def test_the_noisy_reward_flips_a_fixed_share_of_verdicts():
    row = example()
    texts = [ResponseText(f"look {number} \\boxed{{2}}") for number in range(2000)]
    scores = [noisy(text, row, share=0.1) for text in texts]
    assert 0.88 < sum(scores) / len(scores) < 0.92 and scores == [
        noisy(text, row, share=0.1) for text in texts
    ]
    wrong = [noisy(ResponseText(f"look {number} \\boxed{{3}}"), row, share=0.1) for number in range(2000)]
    assert 0.08 < sum(wrong) / len(wrong) < 0.12
    assert noisy(ResponseText("no answer"), row, share=1.0) == 0.0
    assert noisy(texts[0], row, share=0.0) == 1.0


REWARD = """

def broken(log_ratio, advantage):
    return log_ratio * advantage * float("nan")
"""


@pytest.fixture
def small(model_folder, tmp_path):
    """A study of three arms on a model that learns nothing; one ends at its first update."""
    (tmp_path / "broken.py").write_text(REWARD)
    own = f"algo.objective={{type: own, function: '{tmp_path}/broken.py:broken'}}"
    base = [
        "train.steps=2",
        "train.prompts_per_step=4",
        "train.minibatches=2",
        "rollout.max_tokens=4",
        "rollout.group=2",
    ]
    base += [
        "eval.data.args.size=2",
        "eval.samples=2",
        f"reward.parts.0={{name: '{tmp_path}/reward.py:even'}}",
    ]
    (tmp_path / "reward.py").write_text("def even(response, example):\n    return float(len(response) % 2)\n")
    plan = {
        "config": "shapes_hard",
        "models": {"tiny": str(model_folder())},
        "seeds": [1],
        "options": {
            "sapo": [],
            "grpo": ["algo.objective.type=grpo"],
            "ends": [own, "train.bad_updates=0"],
            "base": base,
        },
        "studies": {
            "small": {
                "title": "t",
                "model": "tiny",
                "against": ["sapo"],
                "arms": [[["sapo", "grpo", "ends"], "base"]],
            }
        },
    }
    plan["options"]["grpo"] = ["algo.objective={type: grpo}"]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path


@pytest.mark.slow
def test_studies_resume(small, monkeypatch, capsys):
    """Each run is trained once; a result that is missing is trained again, to the same numbers."""
    paths = ["--plan", f"{small}/plan.yaml", "--results", f"{small}/out", "--folder", f"{small}/runs"]
    monkeypatch.setattr("sys.argv", ["stability.py", "run", *paths])
    main()
    assert "3 runs in small; 0 are there already" in capsys.readouterr().out
    first = Store(small / "out/runs.json").rows
    ended = [row for row in first.values() if "stopped" in row]
    [row] = ended
    assert "the loss is nan" in row["stopped"]
    assert (measure(row).last, measure(row).collapsed) == (0.0, 1)
    whole = {key: row for key, row in first.items() if "stopped" not in row}
    assert [(len(row["evaluations"]), row["kinds"].keys()) for row in whole.values()] == 2 * [
        (2, {"count_color", "count_shape"})
    ]
    assert (small / "out/small.png").is_file() and "| sapo base | 1 |" in (
        small / "out/tables.md"
    ).read_text()
    assert not [path for path in (small / "runs").iterdir() if path.is_dir()]
    stored = next(iter(whole))
    (small / "out/runs.json").write_text(json.dumps([first[stored]]))
    main()
    assert "3 runs in small; 1 are there already" in capsys.readouterr().out
    again = Store(small / "out/runs.json").rows
    assert again[stored] == first[stored] and again.keys() == first.keys()
    assert all(again[key] | {"seconds": 0} == row | {"seconds": 0} for key, row in first.items())


def test_one_study_at_a_time(small, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["stability.py", "run", "--plan", f"{small}/plan.yaml", "--results", f"{small}"]
    )
    with (
        (small / "runs.lock").open("w") as lock,
        exclusive_lock(lock),
        pytest.raises(SystemExit, match="another study has"),
    ):
        main()
