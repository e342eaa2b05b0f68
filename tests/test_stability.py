"""The stability study: its plan is sound, its measures are those that docs/results.md defines, its results go on."""

import json
import re
from itertools import combinations

import pytest
import yaml

from eval.noisy import noisy
from eval.stability import HERE, Plan, Run, Store, main, read_plan
from eval.stability_results import COLLAPSE, WINDOW, Result, collapse, interval, measure, results, table
from tests.conftest import example
from vlm_sapo import load_config
from vlm_sapo.types import Response

PLAN = read_plan(HERE / "stability.yaml")


@pytest.mark.parametrize("name", PLAN.studies)
def test_every_arm_is_a_config_of_its_own(name):
    arms = PLAN.arms(name)
    assert len({arm.options for arm in arms}) == len(arms)
    keys = [arm.runs(PLAN.config)[0].key for arm in arms]
    assert len(set(keys)) == len(keys), "two arms of one study are the same run"
    others = [arm.runs(PLAN.config)[1].key for arm in arms]
    assert not set(keys) & set(others), "a seed changes the run"


def test_what_differs_between_methods_is_the_algorithm_alone():
    configs = [load_config(PLAN.config, *arm.overrides) for arm in PLAN.arms("methods")]
    for one, other in combinations(configs, 2):
        assert {name for name, value in one if value != vars(other)[name]} <= {"algo", "train"}
    assert {config.train.lr for config in configs} == {1e-5, 3e-5, 1e-4}


def test_a_run_is_named_by_its_config_and_not_by_how_it_was_said():
    spelled = ["model.path=data/shapes/hard_dense", "run.seed=1"]
    said = [*spelled, "algo.objective={type: sapo, tau_neg: 1.05}", "run.dir=elsewhere", "log.rollouts=3"]
    assert Run("shapes_hard", "dense", spelled, 1).key == Run("shapes_hard", "dense", said, 1).key
    assert (
        Run("shapes_hard", "dense", [*spelled, "train.lr=1e-6"], 1).key
        != Run("shapes_hard", "dense", said, 1).key
    )
    moe = ["model.path=data/shapes/hard_moe", "run.seed=1"]
    assert Run("shapes_hard", "moe", moe, 1).key != Run("shapes_hard", "dense", spelled, 1).key


def test_unknown_options_are_named():
    text = (HERE / "stability.yaml").read_text().replace("against: free-mixing", "against: free_mixing")
    with pytest.raises(ValueError, match="studies.shares names options that are none: free_mixing"):
        Plan(**yaml.safe_load(text))


def row(evaluations, accuracy, seed=1, **more):
    return {
        "key": f"{seed}{evaluations}",
        "seed": seed,
        "evaluations": evaluations,
        "series": {"accuracy": accuracy},
        "steps": len(accuracy) if "steps" not in more else more["steps"],
        "minibatches": {},
    } | more


def test_measures_of_a_curve():
    found = measure(row([[0, 0.2], [10, 0.6], [20, 0.4]], [0.5] * 20))
    assert (found.last, found.best, found.collapsed) == (0.4, 0.6, None)
    assert found.area == pytest.approx((0.4 * 10 + 0.5 * 10) / 20)


def test_a_run_whose_numbers_ended_counts_as_nothing_from_there():
    found = measure(row([[0, 0.5], [10, 0.5]], [0.5] * 14, steps=19, stopped="nan"))
    assert (found.last, found.best, found.collapsed) == (0.0, 0.5, 15)
    assert found.area == pytest.approx((0.5 * 10 + 0.25 * 5) / 20)


def test_collapse_is_the_first_step_far_under_the_best():
    assert collapse([0.5] * 30) is None
    fall = [0.5] * 10 + [0.0] * 10
    under = next(n for n in range(1, WINDOW + 1) if 0.5 * (WINDOW - n) / WINDOW < COLLAPSE * 0.5)
    assert collapse(fall) == 10 + under
    assert collapse([0.5] * 10 + [0.36] * 30) is None, "a decline to .72 of the best is none"
    assert collapse([0.9, 0.1] * 20) is None, "nor is noise"
    assert collapse([0.3]) is None


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

    found = [
        Result(sapo, rows({1: 0, 2: 0, 3: 0})),
        Result(grpo, rows({1: 0.01, 2: 0.02, 3: 0.01})),
        Result(gspo, rows({1: 0.05, 2: -0.05, 3: 0.01})),
    ]
    lines = table(plan, "methods", found).splitlines()[2:]
    assert lines[0].endswith("| 0 |  |  |")
    assert re.search(r"\| \*\*\+0\.013 \(\+0\.010 to \+0\.020\)\*\*, 3 of 3 \| \*\*\+0\.007 ", lines[1])
    assert "**" not in lines[2] and "2 of 3" in lines[2]


def test_the_noisy_reward_errs_so_often_and_always_alike():
    row = example()
    texts = [Response(f"look {number} \\boxed{{2}}") for number in range(2000)]
    scores = [noisy(text, row, share=0.1) for text in texts]
    assert 0.88 < sum(scores) / len(scores) < 0.92 and scores == [
        noisy(text, row, share=0.1) for text in texts
    ]
    wrong = [noisy(Response(f"look {number} \\boxed{{3}}"), row, share=0.1) for number in range(2000)]
    assert 0.08 < sum(wrong) / len(wrong) < 0.12
    assert noisy(Response("no answer"), row, share=1.0) == 0.0
    assert noisy(texts[0], row, share=0.0) == 1.0


@pytest.fixture
def small(model_folder, tmp_path):
    """A study of two arms on a model that learns nothing."""
    plan = {
        "config": "shapes_hard",
        "models": {"tiny": str(model_folder())},
        "seeds": [1],
        "options": {
            "sapo": [
                "train.steps=2",
                "train.prompts_per_step=4",
                "train.minibatches=2",
                "rollout.max_tokens=4",
            ],
            "eval": ["eval.data.args.size=2", "eval.samples=2", "rollout.group=2"],
            "grpo": ["algo.objective.type=grpo"],
        },
        "studies": {
            "small": {
                "title": "t",
                "model": "tiny",
                "against": "sapo",
                "arms": [["sapo", "eval"], ["sapo", "eval", "grpo"]],
            }
        },
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    return tmp_path


@pytest.mark.slow
def test_studies_go_on_where_they_were(small, monkeypatch, capsys):
    """Trained once each; a result that is missing is trained again, and the others are not."""
    words = [
        "stability.py",
        "run",
        "--plan",
        f"{small}/plan.yaml",
        "--results",
        f"{small}/out",
        "--folder",
        f"{small}/runs",
    ]
    monkeypatch.setattr("sys.argv", [*words, "--workers", "2"])
    main()
    assert "2 runs in small; 0 are there already" in capsys.readouterr().out
    first = json.loads((small / "out/runs.json").read_text())
    assert [len(item["evaluations"]) for item in first] == [2, 2]
    assert all(item["series"]["accuracy"] and item["minibatches"]["abs_log_ratio_p99"] for item in first)
    assert (small / "out/small.png").is_file() and "| sapo eval | 1 |" in (
        small / "out/tables.md"
    ).read_text()
    kept = first[0]
    (small / "out/runs.json").write_text(json.dumps([kept]))
    main()
    assert "2 runs in small; 1 are there already" in capsys.readouterr().out
    again = {item["key"]: item for item in Store(small / "out/runs.json").rows.values()}
    assert again[kept["key"]] == kept
    for one, other in zip(
        sorted(first, key=lambda r: r["key"]), sorted(again.values(), key=lambda r: r["key"]), strict=True
    ):
        assert one["evaluations"] == other["evaluations"] and one["series"] == other["series"]
    found = results(read_plan(small / "plan.yaml"), "small", Store(small / "out/runs.json"))
    assert [len(result.rows) for result in found] == [1, 1]
