"""What is printed: text of a model or a data set must not command the terminal."""

from vlm_sapo.reporting import console
from vlm_sapo.reporting.console import Console

HOSTILE = "\x1b[2J\x1b]0;mine\x07 [red]r[/] \u202efdp.\u2066 \x9b1m größe 答案\n"


def test_text_of_others_commands_no_terminal(capsys):
    console = Console()
    console.say(HOSTILE)
    console.warn(HOSTILE)
    console.table(["a", "b"], [[HOSTILE, "1"]])
    console.samples([{"problem": HOSTILE, "responses": [HOSTILE], "answer": HOSTILE, "scores": [1.0]}])
    said = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in said)
    assert said.count(r"\x1b[2J") == 6 and "[red]r[/]" in said and "größe 答案" in said


def test_a_log_says_how_much_time_is_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with Console().progress("train", 1010, start=10) as show:
        now[0] = 100.0
        show(60, "reward 0.5")
        show(100, "reward 0.5")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["train 100/1010  reward 0.5  17 min left"]
    assert [console.duration(s) for s in (200, 12_000, 190_000)] == ["3 min", "3 h 20 min", "2 d 4 h"]
