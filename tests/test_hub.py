"""Models, rows and pushes on a stand-in of the Hugging Face hub (tests/hub_server.py), by the real client."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub.constants as constants
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from tests.conftest import ROOT
from tests.hub_server import OWNER, TOKEN, Hub
from tests.training.conftest import short_run
from vlm_sapo import evaluate
from vlm_sapo import hub as access
from vlm_sapo.cli import app
from vlm_sapo.config import schema as cfg
from vlm_sapo.config.load import load
from vlm_sapo.data.rows import open_rows
from vlm_sapo.reporting.card import public_text
from vlm_sapo.tools.serve import build_command
from vlm_sapo.training.trainer import train

BASE, ROWS, TRAINED = f"{OWNER}/base", f"{OWNER}/rows", f"{OWNER}/trained"
LICENCE = (
    "---\nlicense: other\nlicense_name: qwen-research\nlicense_link: https://example.org/l\n---\n# Base\n"
)
ROW = '{"problem": "What is %d + 1?", "answer": "%d"}\n'


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The stand-in, which huggingface_hub and datasets use as the hub while the module's tests run."""
    server, cache = Hub(), tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no token"))
        patch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setenv("HF_TOKEN", TOKEN)
        yield server
    server.close()


@pytest.fixture(autouse=True)
def accepts_all(hub):
    yield
    hub.refusals.clear()


@pytest.fixture(scope="module")
def base(hub, model_folder):
    """The tiny model's repository, with a card that names a licence."""
    files = {path.name: path.read_bytes() for path in model_folder().iterdir() if path.is_file()}
    return hub.add(BASE, files | {"README.md": LICENCE.encode()})


@pytest.fixture(scope="module")
def rows(hub):
    return hub.add(f"datasets/{ROWS}", {"train.jsonl": "".join(ROW % (n, n + 1) for n in range(12)).encode()})


def run_config(folder: Path, *overrides: str) -> cfg.TrainConfig:
    """Two steps on the stand-in's model and rows."""
    common = (f"data={{source: {ROWS}}}", "train.steps=2", "checkpoint.every=1", "eval.samples=2")
    return short_run(folder, BASE, *common, *overrides)


@pytest.fixture(scope="module")
def pushed(hub, base, rows, tmp_path_factory):
    """A run that was pushed, and the commits of its model and rows."""
    folder = tmp_path_factory.mktemp("pushed")
    summary = train(run_config(folder, f"hub.push={TRAINED}", "hub.private=true"))
    commits = SimpleNamespace(model=base.refs["main"], rows=rows.refs["main"])
    return SimpleNamespace(folder=folder, run=folder / "run", summary=summary, commits=commits)


def test_a_finished_run_is_pushed_whole(hub, pushed, tmp_path):
    repository = hub.repositories[TRAINED]
    final = {
        str(path.relative_to(pushed.run / "final")): path.read_bytes()
        for path in (pushed.run / "final").rglob("*")
        if path.is_file()
    }
    assert repository.private is True
    assert {name: data for name, data in repository.files.items() if name != ".gitattributes"} == final
    assert {"README.md", "curves.png", "model.safetensors", "config.json"} <= final.keys()
    for name, data in repository.files.items():
        (tmp_path / name).write_bytes(data)
    AutoModelForImageTextToText.from_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tmp_path)


def test_the_card_says_what_the_run_did(pushed):
    card = ModelCard((pushed.run / "final/README.md").read_text())
    data = card.data
    assert (data.base_model, data.base_model_relation, data.datasets) == (BASE, "finetune", [ROWS])
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "qwen-research",
        "https://example.org/l",
    )
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert {"vlm-sapo", "reinforcement-learning", "sapo"} <= set(data.tags)
    after, before = pushed.summary["eval_after/held-out"], pushed.summary["eval_before/held-out"]
    [result] = data.eval_results
    assert result.metric_value == pytest.approx(after["pass@1"], abs=1e-4)
    assert result.metric_args["ci95"] == pytest.approx(after["ci95"], abs=1e-4)
    assert result.metric_args["before_training"] == pytest.approx(before["pass@1"], abs=1e-4)
    assert result.dataset_args == {"problems": 6}
    row = f"| held-out | 6 | {before['pass@1']:.3f} ({before['ci95'][0]:.3f} to {before['ci95'][1]:.3f}) | "
    assert row in card.text and "mean score of 2 sampled responses per problem" in card.text
    environment = json.loads((pushed.run / "environment.json").read_text())
    for text in (pushed.commits.model, pushed.commits.rows, environment["commit"], environment["devices"][0]):
        assert text in card.text
    assert "<details>" in card.text and "- steps: 2" in card.text and "qwen-research" in card.text
    [block] = re.findall(r"<summary>Config</summary>\n\n```yaml\n(.*?)```", card.text, re.DOTALL)
    assert yaml.safe_load(block)["train"]["steps"] == 2


def test_the_stored_config_has_the_commits(pushed):
    stored = yaml.safe_load((pushed.run / "config.yaml").read_text())
    assert stored["model"]["revision"] == pushed.commits.model
    assert stored["data"]["revision"] == pushed.commits.rows
    asked = json.loads((pushed.run / "environment.json").read_text())["revisions"]
    assert asked == {f"{BASE}@main": pushed.commits.model, f"datasets/{ROWS}@main": pushed.commits.rows}


def test_a_run_goes_on_with_its_commits_and_a_failing_push_loses_nothing(hub, pushed, base, rows, capsys):
    """The main branches have moved, and the hub's quota is full when the run ends."""
    base.commit(dict.fromkeys(base.files, b"{}"))
    rows.commit({"train.jsonl": b'{"problem": "", "answer": ""}\n'})
    before = dict(hub.repositories[TRAINED].files)
    hub.refusals["/commit/"] = (403, "Private repository storage limit reached")
    longer = run_config(pushed.folder, f"hub.push={TRAINED}", "train.steps=3")
    summary = train(longer)
    output = " ".join(capsys.readouterr().out.split())
    assert summary["steps"] == 3 and json.loads((pushed.run / "summary.json").read_text()) == summary
    assert f"{TRAINED} exists and has" in output
    assert (
        "(Private repository storage limit reached); use a token that may write there, or make room" in output
    )
    assert f"push it again with: vlm-sapo push {pushed.run}" in output
    assert hub.repositories[TRAINED].files == before
    stored = yaml.safe_load((pushed.run / "config.yaml").read_text())
    assert stored["model"]["revision"] == pushed.commits.model
    [resumed] = json.loads((pushed.run / "environment.json").read_text())["resumed"]
    assert resumed["devices"] and "- resumed once" in (pushed.run / "final/README.md").read_text()
    with pytest.raises(ValueError, match=f"model.revision: {pushed.commits.model} -> {base.refs['main']}"):
        train(run_config(pushed.folder, f"model.revision={base.refs['main']}", "train.steps=3"))
    hub.refusals.clear()
    result = CliRunner().invoke(app, ["push", str(pushed.run)])
    assert result.exit_code == 0 and f"{hub.url}/{TRAINED}" in result.output
    assert "- steps: 3" in hub.repositories[TRAINED].files["README.md"].decode()


def test_a_push_replaces_another_model_and_keeps_a_card_that_was_edited(hub, pushed):
    files = {"model-00001-of-00002.safetensors": b"old", "config.json": b"old", "notes.txt": b"mine"}
    other = hub.add(f"{OWNER}/other", {**files, "README.md": b"old"})
    first = other.refs["main"]
    card = pushed.run / "final/README.md"
    written = card.read_text()
    push = ["push", str(pushed.run), "--repo", f"{OWNER}/other"]
    result = CliRunner().invoke(app, push)
    assert result.exit_code == 0 and "other exists and has 4 files" in result.output
    assert "model-00001-of-00002.safetensors" not in other.files and other.files["notes.txt"] == b"mine"
    assert f'from_pretrained("{OWNER}/other"' in other.files["README.md"].decode()
    card.write_text(written + "\nMine.\n")
    assert CliRunner().invoke(app, push).exit_code == 0
    assert other.files["README.md"].endswith(b"\nMine.\n")
    assert other.commits[first]["config.json"] == b"old"


@pytest.fixture
def fresh(hub, model_folder):
    """`fresh(name, rows)` adds a model and a data set of this name, and returns them."""

    def add(name: str, rows: int = 12) -> SimpleNamespace:
        files = {path.name: path.read_bytes() for path in model_folder().iterdir() if path.is_file()}
        lines = "".join(ROW % (n, n + 1) for n in range(rows))
        return SimpleNamespace(
            model=hub.add(f"{OWNER}/{name}", files | {"README.md": b"---\nlicense_link: LICENSE\n---\n"}),
            rows=hub.add(f"datasets/{OWNER}/{name}-rows", {"train.jsonl": lines.encode()}),
        )

    return add


def fresh_run(folder: Path, name: str, *overrides: str, model: str | None = None) -> dict:
    """Trains a step or more on what `fresh` added."""
    common = (f"data={{source: {OWNER}/{name}-rows}}", "train.steps=1", "checkpoint.every=1")
    return train(short_run(folder, model or f"{OWNER}/{name}", *common, "eval.data=null", *overrides))


@pytest.mark.slow
def test_a_card_is_for_the_repository_that_it_is_pushed_to(hub, fresh, tmp_path, capsys):
    fresh("two")
    fresh_run(tmp_path, "two")
    renamed = (tmp_path / "run").rename(tmp_path / "renamed")
    for repo in (f"{OWNER}/first", f"{OWNER}/second"):
        assert CliRunner().invoke(app, ["push", str(renamed), "--repo", repo]).exit_code == 0
        assert f'from_pretrained("{repo}"' in hub.repositories[repo].files["README.md"].decode()
    renamed.rename(tmp_path / "run")
    card = tmp_path / "run/final/README.md"
    card.write_text(f"{card.read_text()}Mine.\n")
    capsys.readouterr()
    fresh_run(tmp_path, "two", "train.steps=2")
    edited = tmp_path / "run/final/README.edited-1.md"
    assert edited.read_text().endswith("Mine.\n") and "Mine." not in card.read_text()
    assert "- steps: 2" in card.read_text() and f"it is kept as {edited}" in capsys.readouterr().out
    fresh_run(tmp_path, "two", "train.steps=2", f"hub.push={OWNER}/late")
    assert f"to push its model: vlm-sapo push {tmp_path}/run" in capsys.readouterr().out


def test_a_result_names_the_rows_that_it_is_of(hub, fresh, tmp_path):
    fresh("named")
    hub.add(
        f"datasets/{OWNER}/exam", {"train.jsonl": "".join(ROW % (n, n + 1) for n in range(50, 55)).encode()}
    )
    sets = (
        f"[{{name: 'my|exam', source: {OWNER}/exam}}, {{name: easy, source: {OWNER}/named-rows, limit: 2}}, "
        f"{{name: more, source: {OWNER}/named-rows, limit: 3}}]"
    )
    snapshot = access.local_model(f"{OWNER}/named")
    fresh_run(tmp_path, "named", "data.holdout=3", f"eval.data={sets}", model=snapshot)
    card = ModelCard((tmp_path / "run/final/README.md").read_text())
    results = {
        entry.dataset_name: (entry.dataset_type, entry.dataset_args) for entry in card.data.eval_results
    }
    assert results == {
        "held-out": ("held-out", {"problems": 3}),  # as others have its data set too
        "my|exam": (f"{OWNER}/exam", {"problems": 5}),
        "easy": ("easy", {"problems": 2}),
        "more": ("more", {"problems": 3}),
    }
    assert card.data.base_model == f"{OWNER}/named" and "| my\\|exam | 5 |" in card.text
    assert card.data.license_link == f"https://huggingface.co/{OWNER}/named/blob/main/LICENSE"


@pytest.mark.slow
def test_a_resumed_run_keeps_its_commits(hub, fresh, tmp_path, monkeypatch, capsys):
    added = fresh("kept")
    with monkeypatch.context() as patch:  # as if data sets were read from the cache, offline
        patch.setattr(
            "vlm_sapo.training.hub_use.commit_of",
            lambda name, revision, kind, field: None if kind == "dataset" else added.model.refs["main"],
        )
        fresh_run(tmp_path, "kept")
    stored = load(cfg.TrainConfig, str(tmp_path / "run/config.yaml"), ["train.steps=2"])
    train(stored)
    added.model.commit({**added.model.files, "notes.md": b"x"})
    fresh_run(tmp_path, "kept", "train.steps=3")
    hub.refusals["/api/repos/create"] = (503, "maintenance")
    capsys.readouterr()
    summary = fresh_run(tmp_path, "kept", "train.steps=4", f"hub.push={OWNER}/down")
    assert summary["steps"] == 4
    assert re.search(
        r"hub.push \(team/down\) can't be written to .*maintenance.* The run goes on", capsys.readouterr().out
    )


@pytest.mark.slow
def test_the_command_reads_the_variables_that_users_set(hub, pushed):
    """In a process of its own, without what the fixture sets."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "vlm_sapo", "push", str(pushed.run), "--repo", f"{OWNER}/commanded"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{OWNER}/commanded" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert "model.safetensors" in hub.repositories[f"{OWNER}/commanded"].files
    refused = subprocess.run(
        command,
        env=environment | {"HF_TOKEN": "hf_wrongwrong"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1 and refused.stderr.startswith(
        "error: --repo (team/commanded) needs a valid token"
    )
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("repo", "token", "refusal", "sentence"),
    [
        (
            f"{OWNER}/new",
            "hf_wrongwrong",
            None,
            "needs a valid token, and the hub refuses this one; set HF_TOKEN",
        ),
        (f"{OWNER}/new", None, None, "needs a token, and there is none; set HF_TOKEN"),
        ("others/new", TOKEN, None, r"can't be written to \(You don't have the rights to create a model"),
        (
            "others/theirs",
            TOKEN,
            None,
            r"can't be written to \(no right to write\); use a token that may write",
        ),
        (
            f"{OWNER}/new",
            TOKEN,
            (500, "down"),
            r"can't be written to \(down\); try again; a finished run can be pushed",
        ),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_the_first_step(
    hub, base, rows, repo, token, refusal, sentence, tmp_path, monkeypatch
):
    hub.add("others/theirs", {"config.json": b"{}"})
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    if refusal:
        hub.refusals["/api/repos/create"] = refusal
    revisions = (f"model.revision={'a' * 40}", f"data.revision={'b' * 40}")  # not there: nothing is loaded
    with pytest.raises(ValueError, match=rf"^hub.push \({repo}\) {sentence}") as error:
        train(run_config(tmp_path, f"hub.push={repo}", *revisions))
    assert "\n" not in str(error.value) and "hf_wrong" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_offline_nothing_can_be_pushed(hub, base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="needs the hub, and HF_HUB_OFFLINE is set"):
        access.prepare_push(TRAINED, private=None, field="hub.push")


def test_a_private_push_to_a_public_repository_is_refused(hub, base, rows, tmp_path):
    hub.add("team/open", {".gitattributes": b""})
    with pytest.raises(
        ValueError, match=r"hub.push \(team/open\) exists and is public, and a private one is"
    ):
        train(run_config(tmp_path, "hub.push=team/open", "hub.private=true"))
    assert not (tmp_path / "run").exists()


def test_a_push_replaces_another_model_whole(hub, pushed):
    old = dict.fromkeys(("adapter_config.json", "special_tokens_map.json", "chat_template.json"), b"{}")
    hub.add("team/older", old | {"notes.md": b"mine", ".gitattributes": b""})
    access.push(pushed.run / "final", "team/older", field="--to")
    files = hub.repositories["team/older"].files
    assert (
        not old.keys() & files.keys() and {"notes.md", "model.safetensors", "tokenizer.json"} <= files.keys()
    )


@pytest.mark.parametrize("home", ["/", "/nobody"])
def test_a_card_hides_the_home_and_nothing_else(monkeypatch, home):
    monkeypatch.setenv("HOME", home)
    assert public_text("/data/rows.jsonl, /nobody/rows.jsonl") == (
        "/data/rows.jsonl, ~/rows.jsonl" if home != "/" else "/data/rows.jsonl, /nobody/rows.jsonl"
    )


@pytest.mark.parametrize("name", ["qwen-geometry", "a/b/c", "team/with space"])
def test_a_repository_has_an_owner_and_a_name(name, tmp_path):
    with pytest.raises(ValueError, match=rf"hub.push: this \({name}\) must be owner/name"):
        run_config(tmp_path, f"hub.push={name}")


def test_only_finished_runs_are_pushed(tmp_path):
    def refusal(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["push", str(tmp_path), *arguments])
        assert isinstance(result.exception, ValueError)
        return str(result.exception)

    assert "must be the folder of a run" in refusal()
    (tmp_path / "config.yaml").write_text("model: {path: m}\n")
    assert "must be finished" in refusal()
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "final").mkdir()
    assert "add --repo owner/name" in refusal()
    assert "--repo (mine) must be owner/name" in refusal("--repo", "mine")


@pytest.mark.parametrize(
    ("name", "revision", "token", "offline", "sentence"),
    [
        ("team/none", None, TOKEN, False, r"there is no such repository, or the token may not read it"),
        ("team/none", None, None, False, r"there is no such repository, if it is private, set HF_TOKEN"),
        ("team/hidden", None, None, False, r"there is no such repository, if it is private, set HF_TOKEN"),
        ("team/new", None, "hf_wrongwrong", False, r"can't be read: the hub refuses the token; set HF_TOKEN"),
        (BASE, "v9", TOKEN, False, r"model.revision \(v9\) must be a branch, tag or commit of team/base"),
        ("team/gated", None, TOKEN, False, r"is gated; accept its terms on its page on the hub"),
        (
            "team/none",
            None,
            TOKEN,
            True,
            r"is no folder here, and as a hub id it is not in the cache while HF_HUB_OFF",
        ),
    ],
)
def test_a_model_that_cannot_be_read_is_one_sentence(
    hub, base, name, revision, token, offline, sentence, monkeypatch
):
    hub.add("team/gated", {"config.json": b"{}"}, gated=True)
    hub.add("team/hidden", {"config.json": b"{}"}, private=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match=sentence) as error:
        access.local_model(name, revision)
    assert "\n" not in str(error.value) and (token or TOKEN) not in str(error.value)


def test_only_what_is_on_the_hub_has_revisions(model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"model.revision \(main\) is for a hub id"):
        access.local_model(str(model_folder()), "main")
    (tmp_path / "rows.jsonl").write_text(ROW % (1, 2))
    with pytest.raises(ValueError, match=r"data.revision \(main\) is for a hub id"):
        open_rows(str(tmp_path / "rows.jsonl"), revision="main")


def test_rows_of_a_revision(hub, monkeypatch):
    repository = hub.add("datasets/team/moving", {"train.jsonl": (ROW % (1, 2)).encode()})
    first = repository.refs["old"] = repository.refs["main"]
    second = repository.commit({"train.jsonl": (ROW % (5, 6)).encode()})
    answers = [
        open_rows("team/moving", revision=revision)[0]["answer"] for revision in ("old", first, second)
    ]
    assert answers == ["2", "2", "6"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert open_rows("team/moving", revision=second)[0]["answer"] == "6"
    with pytest.raises(ValueError, match=rf"data.revision \({'c' * 40}\) of team/moving is not in the cache"):
        open_rows("team/moving", revision="c" * 40)


def test_a_server_is_started_with_the_revision(hub, base, tmp_path):
    engine = "rollout.engine={type: vllm_server, servers: ['http://127.0.0.1:8000']}"
    config = run_config(tmp_path, f"model.revision={next(iter(base.commits))}", engine, "eval.data=null")
    command = build_command(config, host="127.0.0.1", port=8000, extra="", cpu=True)
    assert command[:3] == ["vllm", "serve", BASE]
    assert command[command.index("--revision") + 1] == config.model.revision


def test_an_evaluation_names_the_commit(hub, base, rows, model_folder, tmp_path, monkeypatch):
    whole = next(files for files in base.commits.values() if files["config.json"] != b"{}")
    repository = hub.add("team/evaluated", whole)
    (tmp_path / "own.yaml").write_text(f"about: x\nsource: {tmp_path}/rows.jsonl\nverifier: {{name: math}}\n")
    (tmp_path / "rows.jsonl").write_text(ROW % (1, 2))
    own = {"out": tmp_path / "out", "max_tokens": 4}
    [result] = evaluate(str(tmp_path / "own.yaml"), model="team/evaluated", **own).values()
    assert result["revision"] == repository.refs["main"]
    with pytest.raises(ValueError, match=r"--revision \(main\) is for a hub id"):
        evaluate(str(tmp_path / "own.yaml"), model=str(model_folder()), revision="main", **own)
