"""Options that stand in the question's text were invisible to the grader, which knew only those in columns.

Source: https://github.com/open-compass/VLMEvalKit/issues/228
"""

import pytest

from vlm_sapo.rewards.verifiers.answers import BadGold, NoAnswer
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import Example, ResponseText

LISTS = {
    "brackets": "(A) oak (B) pine (C) birch (D) elm",
    "one bracket": "Options:\nA) oak\nB) pine\nC) birch\nD) elm",
    "full stops": "A. oak\nB. pine\nC. birch\nD. elm",
    "colons": "Choices:\nA: oak\nB: pine\nC: birch\nD: elm",
    "one line": "A. oak B. pine C. birch D. elm",
    "two a line": "A. oak  B. pine\nC. birch  D. elm",
    "an instruction below": "A. oak\nB. pine\nC. birch\nD. elm\nAnswer with the letter.",
    "bullets": "- **A.** oak\n- **B.** pine\n- **C.** birch\n- **D.** elm",
    "words": "Option A: oak\nOption B: pine\nOption C: birch\nOption D: elm",
    "full width": "选项：Ａ．oak Ｂ．pine Ｃ．birch Ｄ．elm",
    "Chinese brackets": "（A）oak （B）pine （C）birch （D）elm",
    "Chinese commas": "A、oak\nB、pine\nC、birch\nD、elm",
    "no spaces": "A.oak.B.pine.C.birch.D.elm",
    "LaTeX": r"$\textbf{(A)}\ oak\qquad\textbf{(B)}\ pine\qquad\textbf{(C)}\ birch\qquad\textbf{(D)}\ elm$",
}
QUESTION = "Which tree stands on the left?\n"


def score(gold, answer, problem, **columns) -> float | str:
    row = Example(id="1", problem=problem, answer=gold, columns=columns)
    try:
        return VERIFIERS["auto"](ResponseText(rf"So \boxed{{{answer}}}"), row)
    except (NoAnswer, BadGold) as error:
        return error.outcome


@pytest.mark.parametrize("listed", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("gold", ["B", "(B)", "B.", "B. pine", "(B) pine", "pine"])
def test_a_gold_answer_and_a_response_may_name_an_option_in_their_own_ways(listed, gold):
    for answer in ("B", "(B)", "b", "B. pine", "B) pine", "(B) pine", "B: pine", "pine", "Option B", "Pine."):
        assert score(gold, answer, QUESTION + listed) == 1, answer
    for answer in ("A", "oak", "A. oak", "B. oak", "A. pine", "B, C", "BD", "B or C", "a pine or an oak"):
        assert score(gold, answer, QUESTION + listed) in (0, "no_answer"), answer


@pytest.mark.parametrize(
    ("problem", "gold", "right", "wrong"),
    [
        ("A(1, 2) and B(4, 6) are points. How far are they apart?", "5", ["5", "5.0"], ["A", "B"]),
        ("If A:B = 2:3 and B:C = 4:5, what is A:C?", "8:15", ["8:15"], ["A", "B"]),
        ("P(A) = 0.3 and P(B) = 0.4. What is P(A) P(B)?", "0.12", ["0.12"], ["A", "B"]),
        ("The figure shows (A) the liver (B) the heart (C) a lung. How many parts?", "3", ["3"], ["A", "C"]),
        ("Ann got an A. Bob got a B. Carl got a C. How many passed?", "3", ["3"], ["A", "C"]),
        ("Go from A. to B. and on to C. How many stops are there?", "3", ["3"], ["A", "C"]),
        ("(a) Find x. (b) Find y. (c) Find x + y.", "7", ["7"], ["a", "c"]),
        ("A. Smith and B. Jones sign. Who is first?", "Smith", ["Smith"], ["A", "B"]),
        ("In the U.S.A. B. Lee met C. Day. Who met C. Day?", "B. Lee", ["B. Lee"], ["A"]),
        ("Which line is longest? (A) and (B) are marked.", "B", ["B"], ["A"]),
    ],
)
def test_what_only_looks_like_a_list_is_none(problem, gold, right, wrong):
    assert [score(gold, answer, problem) for answer in right] == [1] * len(right)
    assert all(score(gold, answer, problem) in (0, "no_answer") for answer in wrong)


def test_a_number_is_read_by_what_the_gold_answer_is():
    problem = "How long is it? (A) 12 cm (B) 15 cm (C) 18 cm"
    assert score("15", "B", problem) == score("15", "15", problem) == score("15", "15 cm", problem) == 1
    assert score("15", "C", problem) == score("15", "18", problem) == 0
    free = "How long is it? Not (A) 12 cm (B) 15 cm (C) 18 cm"
    assert score("20", "20", free) == 1 and score("20", "B", free) == 0


@pytest.mark.parametrize("problem", [QUESTION + LISTS["full stops"], QUESTION])
def test_a_letter_beyond_the_options_is_a_bad_row(problem):
    columns = {} if "oak" in problem else {"choices": ["oak", "pine", "birch", "elm"]}
    row = Example(id="1", problem=problem, answer="E", columns=columns)
    with pytest.raises(BadGold, match="'E' is none of the options A to D: oak, pine, birch, elm"):
        VERIFIERS["auto"](ResponseText(r"\boxed{E}"), row)
