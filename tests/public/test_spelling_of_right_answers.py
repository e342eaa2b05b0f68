"""Right answers scored 0 for their spelling: spaces and commas between thousands, powers of ten, decimal
commas, number words, a full stop, bold type, units in another language.

Source: https://github.com/open-compass/opencompass/issues/2647
"""

import pytest

from tests.public.near_misses import verdicts
from tests.rewards.test_hard_cases import score
from tests.rewards.test_verifiers import example

RIGHT_AND_NEAR_MISS = [
    ("math", "18750", [r"18,\!750", r"18{,}750", r"18\,750", "18\u2009750", r"18\thinspace 750"], [r"18,\!570"]),
    ("math", "52000", ["5.2e4", r"5.2 \times 10^4", r"5.2\cdot10^{4}", "5.2 x 10^4"], ["5.2e5", r"5.2 \times 10^{-4}"]),
    ("math", "2e3", ["2000", "2,000"], ["200", "2"]),
    ("math", "0.0042", ["4.2e-3", r"4.2 \times 10^{-3}"], ["4.2e3", "4.3e-3"]),
    ("math", "4,5", ["4.5", "4,5", "5, 4"], ["45", "4.6", "4,6"]),
    ("math", "4,25 cm", ["4.25 cm", "4,25"], ["425", "4.25 m"]),
    ("math", "0,125", ["0.125"], ["125"]),
    ("math", "2,150", ["2150"], ["2.15"]),
    ("math", "2.5", [], ["2,5"]),
    ("math", "9", ["nine", "Nine.", r"\text{nine}", "**9**"], ["eight", "nineteen", "nine or ten", "eight, nine", "**6**"]),
    ("math", "3000000", ["3 million", "three million"], ["3 thousand", "3"]),
    ("math", "3", [], ["3 million"]),
    ("math", "24㎠", ["24 cm^2", "24平方厘米"], ["24㎡", "24㎝"]),
    ("math", r"\overline{PQ}", ["PQ"], ["PR"]),
    ("math", "34", ["thirty-four", "thirty four"], ["thirty", "forty-three"]),
    ("math", r"\emptyset", [r"\varnothing", "{}", r"\{\}", "∅"], ["0", r"\{0\}", r"\{\varnothing\}"]),
    ("math", r"\varnothing", [r"\emptyset"], ["0"]),
    ("math", "Green", ["green.", r"\text{Green}", "**Green**", "Green!"], ["Green or red", "not green", "greener"]),
    ("exact", "Green", ["Green.", r"\text{green}", "**Green**", '"Green"'], ["Green or red", "Green, red", "Greens"]),
    ("number", "18750", [r"18,\!750", "18 750", "1.875e4", r"1.875 \times 10^4"], [r"18,\!570", "1.875e5"]),
    ("number", "4,5", ["4.5", "4,5"], ["45", "4,6"]),
    ("math", "24平方厘米", ["24", r"24\text{ cm}^2", "24 square centimeters"], ["24平方米", "24厘米", "24 cm^3"]),
    ("math", r"6\pi平方厘米", [r"6\pi", r"6\pi \text{ cm}^2"], [r"6\pi平方米", r"5\pi平方厘米"]),
    ("math", "8米", ["8 m", "8", "8 meters"], ["8厘米", "8 km", "8 m^2"]),
    ("math", "90千米/时", ["90 km/h", "90"], ["90 m/s", "90米/秒"]),
    ("math", r"60^\circ", ["60度", "60 degrees"], ["60 rad", "60弧度"]),
    ("count", "6", ["There are 6 objects.", "It is six.", "There are six cubes"],
     ["There are 7 objects.", "There are 6 or 7", "5 6 7", "not 6", "Figure 6", "6 red, 2 blue"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "gold", "answer", "expected"),
    verdicts(RIGHT_AND_NEAR_MISS),
)
def test_the_value_counts_not_its_spelling(name, gold, answer, expected):
    assert score(name, answer, example(gold)) == expected
