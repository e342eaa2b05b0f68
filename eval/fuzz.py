"""Fuzzes everything that reads responses, gold answers, configs, rows and images.

python eval/fuzz.py box -max_total_time=60

A parser must answer within TIME_LIMIT seconds, or raise what it declares. The first argument is one of
TARGETS; the others are libFuzzer's. Needs the `fuzz` extra.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import atheris

TIME_LIMIT = 5.0
"""Seconds, with the fuzzer's instruments; in training a verifier has `reward.timeout`, 10."""

with atheris.instrument_imports(include=["vlm_sapo"]):
    from vlm_sapo.config.data import RowsConfig
    from vlm_sapo.config.load import load
    from vlm_sapo.config.schema import TrainConfig
    from vlm_sapo.data.images import decode
    from vlm_sapo.data.rows import ExampleSet, open_rows
    from vlm_sapo.rewards.verifiers.answers import BadGold, NoAnswer
    from vlm_sapo.rewards.verifiers.table import VERIFIERS
    from vlm_sapo.types import Example, ResponseText

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz_"))
GOLDS = ["12", "B", r"\frac{1}{2}", "[1, 2, 3, 4]", '{"total": 9.5}', "Paris", "[[1, 2, 3, 4], [5, 6, 7, 8]]"]
COLUMNS = {"options": ["one", "two", "three"], "answer_type": "float"}


def verifier(name: str, **args: object) -> Callable[[str], None]:
    """Grades a fuzzed response against several gold answers, and against itself."""

    def run(text: str) -> None:
        for gold in (*GOLDS, text):
            for written in (text, rf"\boxed{{{text}}}"):
                example = Example("1", "p", gold or " ", columns=COLUMNS)
                response = ResponseText(written, tokens=9, resized=((100, 50),))
                try:
                    score = VERIFIERS[name](response, example, **args)
                except (NoAnswer, BadGold):
                    continue
                assert 0.0 <= score <= 1.0, score

    return run


def config(text: str) -> None:
    """A config file and an override."""
    path = FOLDER / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    for name, overrides in ((str(path), []), ("quickstart", [text.replace("\0", "")])):
        try:
            load(TrainConfig, name, overrides)
        except ValueError:
            continue


def rows(text: str) -> None:
    """A file of JSON lines."""
    path = FOLDER / "rows.jsonl"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        examples = ExampleSet(open_rows(str(path)), RowsConfig(source=str(path)))
        for index in range(len(examples)):
            json.dumps(examples[index].problem)
    except ValueError:
        return


def images(text: str) -> None:
    """An image's bytes."""
    try:
        decode(text.encode("latin-1", errors="replace"), FOLDER)
    except ValueError:
        return


ARGS = {name: {"gold_coordinates": "thousand", "coordinates": "resized"} for name in ("box", "point_in_box")}
TARGETS: dict[str, Callable[[str], None]] = {
    **{name: verifier(name, **ARGS.get(name, {})) for name in VERIFIERS if name not in ("judge", "length")},
    "config": config,
    "rows": rows,
    "pictures": images,
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        raise SystemExit(f"the target must be one of {', '.join(TARGETS)}")
    name = sys.argv.pop(1)
    target = TARGETS[name]

    def test(data: bytes) -> None:
        text = data.decode("latin-1") if name == "pictures" else data.decode("utf-8", errors="replace")
        start = time.perf_counter()
        target(text)
        seconds = time.perf_counter() - start
        assert seconds < TIME_LIMIT, f"{seconds:.1f} s"

    atheris.Setup(sys.argv, test)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
