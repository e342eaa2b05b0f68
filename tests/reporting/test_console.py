"""What is printed: text of a model or a data set must not command the terminal."""

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
