"""What a report contains of a run, and that its text can't become markup or script."""

import json
import math
import re
import shutil
import threading
import urllib.request
from urllib.error import HTTPError

import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import ROOT
from tests.tools.report.conftest import HOSTILE
from tests.training.conftest import short_run
from vlm_sapo import report
from vlm_sapo.cli import app
from vlm_sapo.rewards.verifiers.boxes import shown
from vlm_sapo.tools.report import command, page, samples
from vlm_sapo.tools.report.collect import collect, thin
from vlm_sapo.tools.report.page import render
from vlm_sapo.tools.report.samples import episode
from vlm_sapo.training.trainer import train
from vlm_sapo.types import Example, ResponseText


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_a_page_contains_the_runs(runs, tmp_path):
    out = tmp_path / "new/report.html"
    result = CliRunner().invoke(app, ["report", *map(str, runs), "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = data_of(out.read_text())
    [first, second] = data["runs"]
    [between] = data["between"]
    assert between["text"].startswith(
        "held-out: no measurable change from run (after 4 steps) to other (after 4 steps): pass@1 "
    )
    assert (first["name"], second["name"]) == ("run", "other")
    assert first["metrics"]["step"] == [1, 2, 3, 4]
    assert [row["step"] for row in first["evaluations"]] == [0, 2, 4]
    groups = [item for item in first["items"] if item["kind"] == "rollout"]
    assert len(groups) == 8 and all(len(group["responses"]) == 4 for group in groups)
    for response in groups[1]["responses"]:
        assert len(response["pieces"]) == response["tokens"]
        assert len(response["log_ratio"]) in (0, response["tokens"])
    totals = [sum(one["log_ratio"]) for row in first["histograms"] for one in row["minibatches"]]
    assert totals and all(total > 0 for total in totals)


def test_only_the_first_minibatch_is_on_policy(runs):
    [run] = collect(runs[:1], 100)["runs"]
    first, second = next(row["minibatches"] for row in run["histograms"] if len(row["minibatches"]) == 2)
    middle = len(first["log_ratio"]) // 2
    assert first["log_ratio"][middle] == sum(first["log_ratio"])
    assert second["log_ratio"][middle] < sum(second["log_ratio"])


def test_markup_in_a_response_stays_text(runs):
    page = render(collect(runs, 100))
    assert HOSTILE not in page and page.count("<script") == 3
    assert data_of(page)["runs"][0]["items"][0]["responses"][0]["text"] == HOSTILE


def test_a_new_run_and_missing_images(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    for name in ("evaluations.jsonl", "histograms.jsonl", "traces.jsonl", "summary.json"):
        (run / name).unlink()
    shutil.rmtree(run / "pictures")
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    older = [{name: row[name] for name in row if name not in ("place", "pictures")} for row in rows[4:]]
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4] + older))
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) | {"loss": math.nan}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    [data] = data_of(render(collect([run], 100)))["runs"]
    assert data["metrics"]["loss"] == [None] and data["items"][0]["images"] == [None]
    assert data["items"][1]["images"] == [] and len(data["items"][1]["responses"]) == 4


@pytest.mark.parametrize("content", [None, ""])
def test_the_error_names_a_folder_without_a_run(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(
        ValueError, match=f"{tmp_path} must be the folder of a run or of an ev.*neither a step"
    ):
        collect([tmp_path], 10)


def test_facts_name_the_run_and_differences(runs, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("timeout: 10.0", "timeout: 3.0"))
    one, two = (run["facts"] for run in collect([runs[0], other, runs[0]], 2)["runs"])
    assert (one["reward.timeout"], two["reward.timeout"]) == ("10.0", "3.0")
    assert "reward.parts" in one and "data.source" in one and "checkpoint.every" not in one
    with pytest.raises(ValueError, match="there is no such folder"):
        collect([tmp_path / "none"], 2)


def test_how_a_run_was_started_and_what_it_trained_on(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    (run / "environment.json").unlink()
    [bare] = collect([run])["runs"]
    assert "command" not in bare["about"] and bare["about"]["steps"] == "4 of 4, finished"
    assert bare["about"]["epochs"] == "0.8" and "GB of a process" in bare["about"]["peak memory"]
    started = {"command": "vlm-sapo train x", "commit": "abc", "uncommitted_changes": True, "started": "now"}
    started |= {"versions": {"torch": "2"}, "devices": ["H100", "H100"]}
    (run / "environment.json").write_text(json.dumps(started))
    config = (run / "config.yaml").read_text()
    mixture = "  mixture:\n  - {name: one, source: x.jsonl, share: 3}\n  - {name: two, source: y, share: 1}\n"
    (run / "config.yaml").write_text(re.sub(r"  mixture: \[\]\n", mixture, config))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    extra = {"task/one/reward": 0.5, "minibatch0/prompts/one": 2, "minibatch1/prompts/one": 1}
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | extra) + "\n" for row in rows))
    [told] = collect([run])["runs"]
    about = told["about"]
    assert (about["commit"], about["devices"]) == ("abc, with uncommitted changes", "2 x H100")
    assert (about["command"], about["versions"]) == ("vlm-sapo train x", "torch 2")
    [one, two] = told["data"]
    assert (one["name"], one["source"], one["share"], one["prompts"]) == ("one", "x.jsonl", 0.75, 12)
    assert (one["first"], two["share"], two["last"]) == (0.5, 0.25, None)


def test_an_evaluation_alone_has_a_page(runs, tmp_path):
    folder = tmp_path / "after"
    shutil.copytree(runs[0] / "evaluations/step_000000", folder)
    path = folder / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["scores"], row["columns"]["kind"] = [float(row["row"] < 3)], "ab"[row["row"] // 3]
    many = [row | {"row": row["row"] + 6 * number} for number in (0, 1) for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in many))
    sentence = "of 2 values best a (1.000), worst b (0.000)"
    assert sentence in str(collect([folder])["evaluations"][0]["findings"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [data] = collect([folder])["evaluations"]
    assert "results.json doesn't have them" in data["findings"][1]["text"]
    assert sentence not in str(data["findings"])  # 3 against 3 may be chance
    assert [(row["value"], row["pass@1"], row["n"]) for row in data["subsets"]] == [
        ("a", 1.0, 3),
        ("b", 0.0, 3),
    ]
    result = {"pass@1": 0.5, "ci95": [0.1, 0.9], "n": 6, "samples": 1, "no_answer": 0.5, "limit": 6}
    official = {"pass@1": 0.4, "ci95": [0.0, 0.8], "differ": 1}
    stored = result | {"official": official, "max_tokens": 9, "by": {"kind": {}}, "seed": 7}
    (folder / "results.json").write_text(json.dumps({"held-out": stored}))
    (folder / "eval.yaml").write_text("held-out: {model: m, seed: 0, samples: 1, weights: [], limit: 6}")
    out = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(folder), "--out", str(out), "--groups", "4"])
    assert result.exit_code == 0, result.output
    [data] = data_of(out.read_text())["evaluations"]
    texts = " ".join(finding["text"] for finding in data["findings"])
    assert (
        "0.100 to 0.900" in texts and "official scorer gives 0.400" in texts and "first 6 problems" in texts
    )
    assert data["results"][0]["more"]["official scorer"] == "0.400 (0.000 to 0.800)"
    assert data["settings"]["held-out"] == {"model": "m", "seed": "7", "samples": "1", "limit": "6"}
    assert [len(data["items"]), data["problems"]] == [4, 6]
    assert data["items"][0]["subsets"] == {"kind": "a"} and "when" not in data["items"][0]["responses"][0]


def test_what_cannot_be_reported_is_said(runs, tmp_path):
    with pytest.raises(ValueError, match=r"report\(\) needs the folder of a run"):
        report()
    with pytest.raises(ValueError, match=r"--out \(.*\) must be a file, and it is a folder"):
        report(runs[0], out=tmp_path)
    page = report(runs[0], out=tmp_path / "page.html", groups=1)
    shown = data_of(page.read_text())["runs"][0]["items"]
    assert len([item for item in shown if item["kind"] != "evaluation"]) == 1
    shutil.copytree(runs[0], tmp_path / "copy")
    (tmp_path / "copy/config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config.yaml must be a YAML file; No such file"):
        collect([tmp_path / "copy"])


def test_runs_and_evaluations_are_on_pages_of_their_own(runs):
    with pytest.raises(ValueError, match="step_000000 is an evaluation and .*run is not; .*write two"):
        collect([runs[0], runs[0] / "evaluations/step_000000"])


def test_large_images_are_left_out(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 60)
    monkeypatch.setattr(page, "MAX_TOTAL_BYTES", 100)
    assert page.EmbeddedImages().add(tmp_path, ["a", "b", "a"]) == [0, None, 0]


def test_thinned_rows_include_both_ends():
    assert thin(list(range(10)), 4) == [0, 3, 6, 9]
    assert thin([1, 2], 4) == [1, 2]


def test_watch_serves_only_this_machine(runs, monkeypatch, capsys):
    started = threading.Event()
    servers = []

    class Server(command.ThreadingHTTPServer):
        def serve_forever(self):
            servers.append(self)
            started.set()
            super().serve_forever()

    monkeypatch.setattr(command, "ThreadingHTTPServer", Server)
    options = {"out": None, "groups": 10, "watch": True, "port": 0}
    thread = threading.Thread(target=command.report_command, args=(runs,), kwargs=options)
    thread.start()
    assert started.wait(20)
    address, port = servers[0].server_address
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as page:
            assert data_of(page.read().decode())["refresh"] == 10
        for path, host in (("/../config.yaml", f"127.0.0.1:{port}"), ("/", "example.org:80")):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
            with pytest.raises(HTTPError, match="404"):
                urllib.request.urlopen(request, timeout=20)
    finally:
        servers[0].shutdown()
        thread.join()
    assert address == "127.0.0.1"


def test_gold_boxes_are_shown_on_their_image(model_folder, tmp_path):
    rows = "def rows(split, size):\n    from tests.conftest import numbered_image\n    return [{'problem': 'Where?', 'answer': '[12, 6, 36, 24]', 'images': [numbered_image(n)]} for n in range(size)]\n"
    (tmp_path / "boxes.py").write_text(rows)
    options = (f"data.source={tmp_path}/boxes.py:rows", "data.args={split: train, size: 8}", "eval.data=null")
    train(short_run(tmp_path, model_folder(), "reward.parts=[{name: box}]", *options))
    [run] = collect([tmp_path / "run"], 100)["runs"]
    assert run["items"][0]["boxes"] == [[0.25, 0.125, 0.75, 0.5]]


def test_boxes_of_a_response():
    example = Example("1", "p", "[10, 20, 30, 40]", images=(Image.new("RGB", (100, 200)),))
    response = ResponseText(r"\boxed{[200, 100, 600, 400]}", resized=((1000, 1000),))
    golds, predicted = shown(response, example, {"coordinates": "thousand"})
    assert golds == [(0.1, 0.1, 0.3, 0.2)] and predicted == [(0.2, 0.1, 0.6, 0.4)]
    assert shown(ResponseText("no"), example, {}) == ([(0.1, 0.1, 0.3, 0.2)], [])
    assert shown(response, Example("1", "p", "none"), {}) == ([], [])


def test_the_page_has_no_more_groups_than_requested(runs):
    few = collect(runs[:1], 2)
    groups = [item for item in few["runs"][0]["items"] if item["kind"] == "rollout"]
    used = {index for item in few["runs"][0]["items"] for index in item["images"]}
    assert len(groups) == 2 and len(used) == len(few["images"])


def test_template_marks_in_text_and_images_outside_the_folder(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"problem": "/*plotly*/ /*data*/ \ud83d", "reward": math.inf, "pictures": ["/etc/hostname"]}
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (run / "traces.jsonl").open("a") as file:
        file.write('{"step": 9, "place": 0, "pieces": [["cut')
    data = data_of(render(collect([run], 100)))
    items = [item for item in data["runs"][0]["items"] if item["kind"] == "rollout"]
    assert {tuple(item["images"]) for item in items} == {(None,)}
    assert items[0]["problem"] == "/*plotly*/ /*data*/ \\ud83d"


def test_the_gate_bound_holds_for_every_response(runs):
    [run] = collect(runs[:1], 100)["runs"]
    points = [point for row in run["histograms"] for one in row["minibatches"] for point in one["sequences"]]
    assert points and all(deviation <= factor * variance * 1.001 for variance, deviation, factor in points)


def test_turns_are_on_the_page_with_their_images(tmp_path):
    play = "rollout.environment={function: 'tests/environments/played.py:Painter'}"
    options = ("rollout.max_tokens=200", "train.steps=1", "checkpoint.every=0")
    held_out = "eval.data={source: 'data/shapes.py:rows', args: {split: test, size: 2}}"
    train(short_run(tmp_path, ROOT / "data/shapes/cold_start", play, held_out, *options))
    folder = tmp_path / "run"
    data = data_of(render(collect([folder])))
    groups = [item for item in data["runs"][0]["items"] if item["kind"] == "rollout"]
    responses = [each for item in groups for each in item["responses"]]
    talks = [each for each in responses if each.get("turns")]
    assert talks and all(each["counts"]["turns"] for each in responses)
    for each in talks:
        asked = [turn for turn in each["turns"] if turn["by"] == "environment"]
        assert asked and all(
            isinstance(data["images"][index], str) for turn in asked for index in turn["images"]
        )
        assert len(each["policy"]) == len(each["pieces"]) and sum(each["policy"]) == each["tokens"]
        assert all(len(each[name]) in (0, len(each["pieces"])) for name in ("log_ratio", "entropy"))
        shown = [text for text, own in zip(each["pieces"], each["policy"], strict=True) if not own]
        assert [text for text in shown if re.fullmatch(r"<\|image_pad\|> x\d+", text)]
    [evaluation] = collect([folder / "evaluations/step_000000"])["evaluations"]
    assert all(each["turns"] and each["counts"] for item in evaluation["items"] for each in item["responses"])


def test_images_of_turns_leave_room_for_those_of_problems(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 30)
    monkeypatch.setattr(samples, "MAX_TOTAL_BYTES", 100)
    images = page.EmbeddedImages()
    turns = [{"by": "environment", "text": "", "pictures": [name]} for name in "abc"]
    own = episode({"counts": {"turns": 2, "limit/turns": 1}, "turns": turns}, tmp_path, images)
    assert [turn["images"] for turn in own["turns"]] == [[0], [1], [None]] and own["finish"] == "turns"
    assert episode({}, tmp_path, images) == episode({"counts": {}}, tmp_path, images) == {}
