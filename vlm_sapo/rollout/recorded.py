"""An engine that repeats responses that were recorded elsewhere, to grade them by a benchmark's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vlm_sapo.types import Completion, Example, Prompt, RowError, Sampling

if TYPE_CHECKING:
    from vlm_sapo.models.vlm import VLM


class Recorded:
    """Reads JSON lines `id, response` (or `responses`, a list) and gives them back by row id.

    It stands in for the encoder too: a prompt is the example alone. Its completions have no tokens.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise ValueError(f"--responses ({path}) must be a file of JSON lines; there is none")
        self.responses: dict[str, list[str]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                name, texts = _read(path, number, line)
                self.responses.setdefault(name, []).extend(texts)
        counts = {name: len(texts) for name, texts in self.responses.items()}
        if len(set(counts.values())) != 1:
            few, many = min(counts, key=counts.get, default=""), max(counts, key=counts.get, default="")
            raise ValueError(
                f"--responses ({path}) must hold equally many responses for every id; it has "
                f"{counts.get(few, 0)} for {few!r} and {counts.get(many, 0)} for {many!r}"
            )
        [self.samples] = set(counts.values())

    def encode(self, example: Example) -> Prompt:
        """Raises RowError where nothing was recorded for the row."""
        if example.id not in self.responses:
            raise RowError(
                f"{example.label}: {self.path} has no response of this id; add it, or --on-error skip leaves "
                "such rows out"
            )
        nothing = torch.zeros(0, dtype=torch.int64)
        return Prompt(example, "", "", nothing, nothing.expand(3, 0), example.images, None, None)

    def sync(self, vlm: VLM) -> None:
        """Nothing to take over."""

    def close(self) -> None:
        """Nothing is held."""

    def generate(self, prompts: list[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """The first `sampling.group` responses that were recorded for each."""
        nothing = torch.zeros(0)
        return [
            [
                Completion(nothing.long(), nothing, text, "stop")
                for text in self.responses[prompt.example.id][: sampling.group]
            ]
            for prompt in prompts
        ]


def _read(path: Path, number: int, line: str) -> tuple[str, list[str]]:
    """Id and responses of a line."""
    try:
        row = json.loads(line)
        texts = row["responses"] if "responses" in row else [row["response"]]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError("a response must be a text, responses a list of texts")
        return str(row["id"]), texts
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number}: a JSON object with id and response is needed ({error!r})"
        ) from error
