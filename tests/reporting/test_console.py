"""Console output: text of a model or a data set can't control the terminal."""

from vlm_sapo.reporting import console
from vlm_sapo.reporting.console import Console

HOSTILE = "\x1b[2J\x1b]0;mine\x07 [red]r[/] \u202efdp.\u2066 \x9b1m größe 答案\n"


def test_control_characters_are_escaped(capsys):
    console = Console()
    console.say(HOSTILE)
    console.warn(HOSTILE)
    console.table(["a", "b"], [[HOSTILE, "1"]])
    console.samples([{"problem": HOSTILE, "responses": [HOSTILE], "answer": HOSTILE, "scores": [1.0]}])
    output = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in output)
    assert output.count(r"\x1b[2J") == 6 and "[red]r[/]" in output and "größe 答案" in output


def test_progress_lines_show_the_time_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with Console().progress("train", 1010, start=10) as show:
        now[0] = 100.0
        show(60, "reward 0.5")
        show(100, "reward 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train 100/1010  reward 0.5  17 min left"]
    assert [console.duration(s) for s in (200, 12_000, 190_000)] == ["3 min", "3 h 20 min", "2 d 4 h"]
