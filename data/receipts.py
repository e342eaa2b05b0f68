"""Questions about scanned receipts (ICDAR 2019 SROIE), from a file with one receipt a line: `image, company,
date, address, total`."""

from __future__ import annotations

import json
from pathlib import Path

QUESTIONS = {
    "company": "Which company is the receipt from?",
    "date": "What is the date on the receipt?",
    "address": "What is the company's address?",
    "total": "What is the total?",
}


def rows(path: str) -> list[dict]:
    """A row for every field that a receipt has: the total is compared as a number, the others by ANLS."""
    questions = []
    for line in filter(str.strip, Path(path).read_text(encoding="utf-8").split("\n")):
        receipt = json.loads(line)
        if not QUESTIONS.keys() & receipt.keys():
            raise ValueError(
                f"{path}: a receipt has some of {', '.join(QUESTIONS)}; this row has {', '.join(receipt)}"
            )
        for field in filter(receipt.get, QUESTIONS):
            grading = {"answer_type": "float"} if field == "total" else {"metric": "anls"}
            questions.append(
                {
                    "id": f"{receipt['id']}-{field}",
                    "problem": QUESTIONS[field],
                    "answer": receipt[field],
                    "image": str((Path(path).parent / receipt["image"]).resolve()),
                    "field": field,
                    **grading,
                }
            )
    return questions
