"""The check before a run passed a reward that then ended the run, or that no obedient response could earn.

Source: https://github.com/huggingface/trl/issues/5298, where the accuracy reward and the prompt's layout disagreed
"""

import json

import pytest
import yaml
from typer.testing import CliRunner

from tests.conftest import numbered_image
from vlm_sapo.cli import app

REWARDS = """
def raises(response, example):
    return 1 / 0

def nothing(response, example):
    return None

def imports(response, example):
    import a_module_that_is_not_installed

def thoughts(response, example):
    return float("<think>" in response)

def fine(response, example):
    return 0.5

def knows_two(response, example):
    return {"1": 1.0, "2": 1.0}[example.answer]
"""


@pytest.fixture
def doctor(tmp_path, model_folder):
    def run(*parts, template="{problem}", alone=False):
        numbered_image(0).save(tmp_path / "0.png")
        (tmp_path / "mine.py").write_text(REWARDS)
        rows = [{"problem": f"What is {n} + 1?", "answer": str(n + 1), "image": "0.png"} for n in range(9)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "model": {"path": str(model_folder())},
            "data": {"source": str(tmp_path / "rows.jsonl"), "template": template},
            "rollout": {"max_tokens": 8},
            "reward": {"parts": [*([] if alone else [{"name": "math"}]), *parts], "workers": 1},
            "train": {"steps": 1},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        return CliRunner().invoke(
            app, ["doctor", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "f.json")]
        )

    return run


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raises", "raises ends with error: ZeroDivisionError"),
        ("nothing", "nothing ends with error: TypeError"),
        ("imports", "imports ends with error: ModuleNotFoundError"),
    ],
)
def test_a_part_that_fails_breaks_the_run(doctor, tmp_path, name, words):
    result = doctor({"name": f"{tmp_path}/mine.py:{name}"})
    assert result.exit_code == 1 and words in " ".join(result.output.split())
    assert doctor({"name": f"{tmp_path}/mine.py:fine"}).exit_code == 0


def test_a_part_that_the_prompts_own_layout_never_earns_is_named(doctor, tmp_path):
    part = {"name": f"{tmp_path}/mine.py:thoughts"}
    asked_for_tags = doctor(part, template="{problem} In <answer> </answer> tags.")
    assert "reward never earned" in asked_for_tags.output
    assert "<answer>1</answer>" in asked_for_tags.output
    obedient = doctor(part, template="{problem} In <think> </think>, then <answer> </answer> tags.")
    assert "reward never earned" not in obedient.output


def test_format_asks_for_what_the_prompt_asks_for(doctor):
    for template in ("{problem} In <answer> </answer> tags.", "{problem} In \\boxed{}."):
        assert "nothing would break the run; 0 findings" in " ".join(
            doctor({"name": "format"}, template=template).output.split()
        )
    unasked = doctor({"name": "format"})
    assert unasked.exit_code == 1 and "ask for a layout in data.template" in " ".join(unasked.output.split())


def test_a_row_is_printed_as_the_model_reads_it(doctor):
    output = doctor().output
    assert "plain rows: problem from problem, answer from answer, images from image" in output
    assert "as the model reads it" in output and "tokens>What is 0 + 1?" in output
    assert "gold answer '1', graded by math" in output
    assert "the prompt asks for no \\boxed{} and no <answer> tags" in output
    assert "asks for no" not in doctor(template="{problem} Put it in \\boxed{}.").output


def test_a_function_that_fails_on_some_rows_breaks_the_run(doctor, tmp_path):
    """Each error once, with the number of rows, and not as a gold answer that is wrong."""
    result = doctor({"name": f"{tmp_path}/mine.py:knows_two"}, alone=True)
    said = " ".join(result.output.split())
    assert result.exit_code == 1 and "rejected" not in said
    assert "reward fails: 7 (2, 3, 4, 5, 6, ...)" in said and "ends with error: KeyError: '3'; mend" in said
    assert "1 finding would break the run; 2 findings in all" in said
