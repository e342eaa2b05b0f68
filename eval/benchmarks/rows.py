"""Transforms from the benchmarks' own columns to a problem with images: one row in, one row out."""

from __future__ import annotations

import ast
import re
import string

MARK = re.compile(r"<image ?(\d*)>")


def mathvision(row: dict) -> dict:
    """Options below the question; the one merged image at the first mark."""
    problem = _one_image(row["question"])
    options = row.get("options") or []
    return row | {
        "problem": problem + _lettered(options),
        "options": options,
        "question_type": _kind(options),
    }


def mathvista(row: dict) -> dict:
    """`query` holds the hint, the question, its unit and the choices."""
    kind = "multi_choice" if row.get("choices") else "free_form"
    return row | {"problem": row["query"], "question_type": kind}


def mathverse(row: dict) -> dict:
    """The question with the instruction to reason first."""
    kind = "multi_choice" if str(row["question_type"]).startswith("multi") else "free_form"
    return row | {"problem": row["query_cot"], "question_type": kind}


def wemath(row: dict) -> dict:
    """Question and options, and which sub-problem of which group it is."""
    options = [part.strip() for part in re.split(r";\s*(?=[A-H]\.)", row["option"])]
    steps = "\n".join(options)
    return row | {
        "problem": f"{row['question']}\n{steps}",
        "options": options,
        "option": None,
        "question_type": "multi_choice",
        "id": f"{row['ID']}/{row['key']}",
    }


def logicvista(row: dict) -> dict:
    """Letters, and the first of the row's skills."""
    skill = row.get("skill") or [""]
    return row | {"question_type": "multi_choice", "skill": skill if isinstance(skill, str) else skill[0]}


def dynamath(row: dict) -> dict:
    """The answer instruction by type, and what our verifier reads: letters, or numbers to three digits."""
    kind = row["answer_type"]
    form = {
        "multiple choice": "the corresponding choice option in the 'short answer' key, such as 'A' or 'B'",
        "float": "a three-digit floating-point number in the 'short answer' key",
    }.get(kind, "the answer in the 'short answer' key, in as few words or symbols as possible")
    return row | {
        "answer": row.get("ground_truth", row.get("answer")),
        "problem": f"{row['question']}\n## Answer Instruction\nPlease provide an answer to the question "
        "outlined above. Your response should adhere to the following JSON format, which includes two keys: "
        "'solution' and 'short answer'. The 'solution' key can contain detailed steps needed to solve the "
        f"question, and the 'short answer' key should provide a concise response, {form}.",
        "question_type": "multi_choice" if kind == "multiple choice" else "free_form",
        "precision": 3 if kind == "float" else None,
        "level": row.get("level", row.get("knowledge_level")),
    }


def mmmu(row: dict) -> dict:
    """Images at their marks, in the marks' order; options below; the instruction by type."""
    problem, images = _with_images(str(row["question"]), row, _listed(row["options"]))
    return row | {
        "problem": problem + _options_and_instruction(row),
        "images": images,
        "question_type": _kind(_listed(row["options"])),
        "answer_type": "short",
    }


def mmmu_pro(row: dict) -> dict:
    """As MMMU, with the instruction to reason; the `vision` subset has the question in its image."""
    options = _listed(row["options"])
    if "image" in row and row["image"] is not None:
        problem, images = (
            "<image>Write out the multiple-choice question in the image and then solve it.",
            [row["image"]],
        )
    else:
        problem, images = _with_images(str(row["question"]), row, options)
        problem += _lettered(options)
    return row | {
        "problem": f"{problem}\nThe last line of your response should be of the following format: "
        "'Answer: $LETTER' (without quotes), where LETTER is one of the options. Think step by step before "
        "answering.",
        "images": images,
        "question_type": "multi_choice",
    }


def olympiadbench(row: dict) -> dict:
    """Context before the question; the accepted answers joined; images in their order."""
    answers = row["final_answer"]
    images = [row[name] for name in sorted(row) if re.fullmatch(r"image_\d+", name) and row[name] is not None]
    problem = MARK.sub("", f"{row.get('context') or ''}\n{row['question']}").strip()
    return row | {
        "problem": problem,
        "answer": ", ".join(answers) if isinstance(answers, list) else str(answers),
        "images": row.get("images") or images,
    }


def chartqa(row: dict) -> dict:
    """The label, which the hub holds as a list of one, and which half it belongs to."""
    label = row.get("label", row.get("answer"))
    half = row.get("type", row.get("human_or_machine"))
    return row | {
        "answer": label[0] if isinstance(label, list) else str(label),
        "half": {"0": "human", "1": "augmented", "human_test": "human", "augmented_test": "augmented"}.get(
            str(half), str(half)
        ),
    }


def refcoco(row: dict) -> dict:
    """One expression a row: the first of the list that the hub holds."""
    answer = row["answer"]
    return row | {"expression": answer[0] if isinstance(answer, list) else answer}


def letters(row: dict) -> dict:
    """Multiple choice whose options are in the question or the image."""
    return row | {"question_type": "multi_choice"}


def _with_images(problem: str, row: dict, options: list | None = None) -> tuple[str, list]:
    """The problem with `<image>` marks, and the images in the order of its marks. Images that only options
    name follow the question's, so that none is lost; those that nothing names come first."""
    numbers = [number or "1" for number in MARK.findall(problem)]
    named = filter(None, MARK.findall(" ".join(map(str, options or []))))
    present = [name[6:] for name in sorted(row) if re.fullmatch(r"image_\d+", name) and row[name] is not None]
    after = [number for number in dict.fromkeys(named) if number not in numbers]
    before = [number for number in present if number not in numbers and number not in after]
    marked = "<image>" * len(before) + MARK.sub("<image>", problem) + "<image>" * len(after)
    return marked, [row.get(f"image_{number}") for number in [*before, *numbers, *after]]


def _options_and_instruction(row: dict) -> str:
    options = _listed(row["options"])
    if not options:
        return "\nAnswer the question using a single word or phrase."
    return _lettered(options) + "\nAnswer with the option's letter from the given choices directly."


def _listed(options: object) -> list:
    return ast.literal_eval(options) if isinstance(options, str) else list(options or [])


def _lettered(options: list) -> str:
    return "".join(
        f"\n({letter}) {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)
    )


def _kind(options: list) -> str:
    return "multi_choice" if options else "free_form"


def _one_image(problem: str) -> str:
    first, *rest = MARK.split(problem)[::2]
    return first + "<image>" + "".join(rest) if rest else problem
