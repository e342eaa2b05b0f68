"""Turns rows with the benchmarks' own columns into problems with images: one row in, one row out."""

from __future__ import annotations

import ast
import re
import string

IMAGE_MARK = re.compile(r"<image ?(\d*)>")


def mathvision(row: dict) -> dict:
    """Options below the question; the one merged image at the first of the marks."""
    problem = _with_one_mark(row["question"])
    options = row.get("options") or []
    return row | {
        "problem": problem + _option_lines(options),
        "options": options,
        "question_type": _question_type(options),
    }


def mathvista(row: dict) -> dict:
    """`query` has the hint, the question, its unit and the choices; the order of a list counts."""
    kind = "multi_choice" if row.get("choices") else "free_form"
    return row | {"problem": row["query"], "question_type": kind, "ordered": True}


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
    instruction = {
        "multiple choice": "the corresponding choice option in the 'short answer' key, such as 'A' or 'B'",
        "float": "a three-digit floating-point number in the 'short answer' key",
    }.get(kind, "the answer in the 'short answer' key, in as few words or symbols as possible")
    return row | {
        "answer": row.get("ground_truth", row.get("answer")),
        "problem": f"{row['question']}\n## Answer Instruction\nPlease provide an answer to the question "
        "outlined above. Your response should adhere to the following JSON format, which includes two keys: "
        "'solution' and 'short answer'. The 'solution' key can contain detailed steps needed to solve the "
        f"question, and the 'short answer' key should provide a concise response, {instruction}.",
        "question_type": "multi_choice" if kind == "multiple choice" else "free_form",
        "precision": 3 if kind == "float" else None,
        "level": row.get("level", row.get("knowledge_level")),
    }


def mmmu(row: dict) -> dict:
    """Images at their marks, in the marks' order; options below; the instruction by type."""
    problem, images = _marks_and_images(str(row["question"]), row, _as_list(row["options"]))
    return row | {
        "problem": problem + _options_and_instruction(row),
        "images": images,
        "question_type": _question_type(_as_list(row["options"])),
        "answer_type": "short",
    }


def mmmu_pro(row: dict) -> dict:
    """As MMMU, with the instruction to reason; the `vision` subset has the question in its image."""
    options = _as_list(row["options"])
    if "image" in row and row["image"] is not None:
        problem, images = (
            "<image>Write out the multiple-choice question in the image and then solve it.",
            [row["image"]],
        )
        row = row | {"options_in_image": True}
    else:
        problem, images = _marks_and_images(str(row["question"]), row, options)
        problem += _option_lines(options)
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
    problem = IMAGE_MARK.sub("", f"{row.get('context') or ''}\n{row['question']}").strip()
    return row | {
        "problem": problem,
        "answer": ", ".join(answers) if isinstance(answers, list) else str(answers),
        "images": row.get("images") or images,
    }


def chartqa(row: dict) -> dict:
    """The label, which the hub has as a list of one, and which half it belongs to."""
    label = row.get("label", row.get("answer"))
    half = row.get("type", row.get("human_or_machine"))
    return row | {
        "answer": label[0] if isinstance(label, list) else str(label),
        "half": {"0": "human", "1": "augmented", "human_test": "human", "augmented_test": "augmented"}.get(
            str(half), str(half)
        ),
    }


def refcoco(row: dict) -> dict:
    """One expression a row: the first of the hub's list."""
    expressions = row["answer"]
    return row | {"expression": expressions[0] if isinstance(expressions, list) else expressions}


def letters(row: dict) -> dict:
    """Multiple choice with the options in the question or the image."""
    return row | {"question_type": "multi_choice"}


def _marks_and_images(problem: str, row: dict, options: list | None = None) -> tuple[str, list]:
    """The problem with `<image>` marks, and the images in the order of its marks. Images that only options
    name come after the question's, so that none is lost; an image that nothing names comes first."""
    in_question = [number or "1" for number in IMAGE_MARK.findall(problem)]
    in_options = [number for option in options or [] for number in IMAGE_MARK.findall(str(option)) if number]
    in_row = [name[6:] for name in sorted(row) if re.fullmatch(r"image_\d+", name) and row[name] is not None]
    after = [number for number in dict.fromkeys(in_options) if number not in in_question]
    before = [number for number in in_row if number not in in_question and number not in after]
    marked = "<image>" * len(before) + IMAGE_MARK.sub("<image>", problem) + "<image>" * len(after)
    return marked, [row.get(f"image_{number}") for number in [*before, *in_question, *after]]


def _options_and_instruction(row: dict) -> str:
    options = _as_list(row["options"])
    if not options:
        return "\nAnswer the question using a single word or phrase."
    return _option_lines(options) + "\nAnswer with the option's letter from the given choices directly."


def _as_list(options: object) -> list:
    return ast.literal_eval(options) if isinstance(options, str) else list(options or [])


def _option_lines(options: list) -> str:
    return "".join(
        f"\n({letter}) {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False)
    )


def _question_type(options: list) -> str:
    return "multi_choice" if options else "free_form"


def _with_one_mark(problem: str) -> str:
    first, *rest = IMAGE_MARK.split(problem)[::2]
    return first + "<image>" + "".join(rest) if rest else problem
