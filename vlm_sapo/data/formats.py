"""Recognises the usual layouts of rows by their columns, and reads conversations, answers and images of them.

Errors here are ValueErrors that name the field; data/rows.py adds the row.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
from PIL.Image import Image

from vlm_sapo.data.images import KEYS
from vlm_sapo.types import IMAGE_PLACEHOLDER, one_line

Row = Mapping[str, Any]

CONVERSATIONS = ("messages", "conversations", "conversation", "prompt")
"""Columns that hold a problem if their value is a list of turns."""
PROBLEMS = (("question", "query", "prompt", "instruction"), ("text",))
"""Columns that hold a problem as text, where there is no `problem` and no conversation; the first group that
the rows have counts."""
GROUND_TRUTH = "reward_model.ground_truth"
"""Where verl's rows have the answer."""
ANSWERS = (
    ("answer",),
    (GROUND_TRUTH,),
    ("solution", "ground_truth", "gold", "gold_answer", "gt", "gt_answer", "final_answer", "correct_answer"),
    ("answers", "label", "labels", "target"),
    ("response", "output", "completion"),
)
"""Columns that hold the answer; the first group that the rows have counts."""
CHAT_COLUMNS = (*CONVERSATIONS, "query", "instruction")
"""Columns next to which `system` is the system prompt."""
UNREAD = ("history", "tools")
"""Columns next to them that a model would have to read."""
OPTION_TABLE = {"index", "question", "A", "B"}
"""The columns of VLMEvalKit's tables."""
IMAGES = ("images", "image")
IMAGE_PATHS = ("image_path", "image_paths")
"""Columns for rows whose `image` is empty."""
OTHER_IMAGES = (
    *(*IMAGE_PATHS, "image_file", "image_url", "image_urls", "img", "img_path"),
    *("picture", "pictures", "photo", "photos", "file_name", "file_names"),
)
"""Columns that hold images where there is neither `images` nor `image`; the first counts."""
MEDIA = re.compile(r"(video|audio)s?(?:_(?:path|file|url)s?)?")
"""Columns, and keys of parts, with media that no model here is trained with."""
VIDEO_FILE = re.compile(r".*\.(?:mp4|avi|mov|mkv|webm|mpe?g)", re.IGNORECASE | re.DOTALL)
NUMBERED_IMAGE = re.compile(r"(?:images?|img|picture|photo)[ _]?\d+", re.IGNORECASE)
"""Columns that hold one image each of several."""
IMAGE_NAME = re.compile(r"im(?:a)?g|photo|pict|figure", re.IGNORECASE)
"""Part of a name of a column that holds images if its values are names of image files."""
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant"),
}
BESIDE_CONTENT = ("images", "image")
"""Keys of a turn with images that no part and no mark says the place of."""
TEXT_PARTS = ("text", "input_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
QWEN_IMAGE = re.compile(r"(?:<\|vision_start\|>)?<\|image_pad\|>(?:<\|vision_end\|>)?")
FOREIGN_IMAGE = re.compile(r"<img>.*?</img>", re.DOTALL)
OBJECT_MARK = re.compile(r"<(?:ref-object|bbox)>")
MEDIA_MARK = re.compile(r"<(?:video|audio)>|<\|(?:video|audio)_pad\|>")
RENDERED = re.compile(r"\s*<\|im_start\|>(?:system|user)\b")
SPECIAL_TOKEN = re.compile(r"<\|[^|<>]{1,40}\|>")
MISSING_TEXTS = {"", "nan", "<na>", "nat", "[]"}
"""Spellings of a missing value; `None` and `null` may be answers."""
LONGEST_MISSING = 9
IMAGE_FILE = re.compile(r".*\.(?:png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE)
NO_MEDIA = "isn't supported yet; filter these rows out, or set data.on_error=skip"
TURNS_EXAMPLE = '[{"role": "user", "content": "..."}]'


@dataclass(frozen=True)
class Content:
    """What a row asks, and with what."""

    problem: str
    """Text with `<image>` marks, or without any."""
    answer: Any
    """The gold answer as the row holds it; `read_answer` makes it text."""
    system: str | None
    """The system turn of a conversation."""
    images: tuple[Any, ...]
    """The values that hold the images, in order."""
    image_field: str
    """The column of the images, for messages."""
    reply: str | None
    """The assistant's turn of a conversation: a demonstration, never a part of the prompt."""


@dataclass(frozen=True)
class RowLayout:
    """Which columns hold what. A name with a dot leads into a mapping."""

    name: str
    """Whose rows look like this."""
    problem: str
    answer: str | None
    """None: the assistant's turn of the conversation in `problem`."""
    images: tuple[str, ...]
    """Of these columns the first counts that isn't empty in a row."""

    def read(self, row: Row) -> Content:
        """The content of a row. Raises ValueError naming the field."""
        chat = self._chat(row)
        problem = QWEN_IMAGE.sub(IMAGE_PLACEHOLDER, chat.problem)
        self._refuse(row, problem)
        answer = self._answer(row, chat)
        for field, value in ((self.problem, problem), (self.answer or self.problem, answer)):
            if is_missing(value):
                raise ValueError(f"field {field} is empty; give it a value or filter the row out")
        field, images = self._images(row, chat)
        return Content(problem, answer, chat.system, images, field, chat.reply)

    def describe(self, row: Row) -> str:
        """One sentence about the layout, with `row` as the example."""
        answer = self.answer or f"the assistant's turn of {self.problem} (there is no column of answers)"
        parts = [f"problem from {self.problem}", f"answer from {answer}"]
        try:
            content = self.read(row)
        except ValueError:
            return f"{self.name}: {', '.join(parts)}"
        if content.images:
            where = (
                f"where {IMAGE_PLACEHOLDER} marks or parts are"
                if IMAGE_PLACEHOLDER in content.problem
                else "put first"
            )
            parts.append(f"images from {content.image_field} ({where})")
        else:
            paths = [name for name, value in row.items() if _is_image_file(value)]
            hint = f" ({paths[0]} looks like one; set data.columns.images={paths[0]})" if paths else ""
            parts.append(f"no image in the first row{hint}")
        if content.system:
            parts.append("system prompt from the conversation")
        return f"{self.name}: {', '.join(parts)}"

    def _refuse(self, row: Row, problem: str) -> None:
        """Raises ValueError for what a row has beside text and images: no part of it is dropped silently."""
        for name, value in row.items():
            media = MEDIA.fullmatch(str(name))
            if media and value is not False and not is_missing(value):
                raise ValueError(f"field {name} holds {media[1]}, which {NO_MEDIA}")
        if mark := MEDIA_MARK.search(problem):
            raise ValueError(f"field {self.problem} has a {mark[0]} mark, which {NO_MEDIA}")
        if RENDERED.match(problem):
            raise ValueError(
                f"field {self.problem} ({one_line(problem)}) is the text of a chat template; give its turns, "
                f"{TURNS_EXAMPLE}, or the question alone"
            )
        if mark := FOREIGN_IMAGE.search(problem):
            raise ValueError(
                f"field {self.problem} has {one_line(mark[0])}; put the path into a column `images` and "
                f"{IMAGE_PLACEHOLDER} into the text"
            )
        if (mark := OBJECT_MARK.search(problem)) and not is_missing(row.get("objects")):
            raise ValueError(
                f"field {self.problem} has a {mark[0]} mark for the column objects, which isn't read; write "
                "the boxes and names into the text with data.transform"
            )
        for name in UNREAD:
            if self.problem in CHAT_COLUMNS and not is_missing(row.get(name)):
                raise ValueError(
                    f"field {name} isn't read, the prompt is one user's turn; write what the model shall "
                    f"read into {self.problem}, or remove {name}, with data.transform"
                )

    def _chat(self, row: Row) -> _Chat:
        value = lookup(row, self.problem)
        turns = as_turns(value)
        try:
            chat = _Chat(self._text(row, value), None, (), None) if turns is None else read_turns(turns)
            if chat.system is None and self.problem in CHAT_COLUMNS:
                chat = replace(chat, system=_checked_system(read_text(row.get("system"), "system"), ()))
        except ValueError as error:
            raise ValueError(f"field {self.problem}: {error}" if turns else str(error)) from error
        return chat

    def _text(self, row: Row, value: Any) -> str:
        """A problem that is text, with what belongs to it in another column."""
        text = read_text(value, self.problem)
        pieces = [text]
        if text and self.problem == "instruction":
            pieces = [text, read_text(row.get("input"), "input")]
        elif text and self.problem == "question" and row.keys() >= OPTION_TABLE:
            pieces = [read_text(row.get("hint"), "hint"), text]
        return "\n".join(piece for piece in pieces if piece)

    def _answer(self, row: Row, chat: _Chat) -> Any:
        if self.answer is None:
            if not chat.reply:
                raise ValueError(
                    f"field {self.problem} has no assistant's turn after the user's, and no column holds the "
                    "answer; add one such as `solution`, or filter the row out"
                )
            return chat.reply
        value = lookup(row, self.answer)
        if turns := as_turns(value):
            try:
                return "".join(_content(turn)[0] for turn in turns if _role(turn) == "assistant")
            except ValueError as error:
                raise ValueError(f"field {self.answer}: {error}") from error
        return value

    def _images(self, row: Row, chat: _Chat) -> tuple[str, tuple[Any, ...]]:
        """The field of the images and their values: from their column, or from the parts of the turns."""
        column = next((name for name in self.images if not is_missing(row.get(name))), None)
        values = [] if column is None else listed(row[column])
        for value in values:
            if isinstance(value, str) and VIDEO_FILE.fullmatch(value[-10:]):
                raise ValueError(f"field {column} holds video ({one_line(value)}), which {NO_MEDIA}")
        if not chat.images:
            return column or self.images[0], tuple(values)
        empty = sum(value is None for value in chat.images)
        if empty != len(values):
            raise ValueError(
                f"field {self.problem} has {len(chat.images)} image parts, {empty} of them without an image, "
                f"and field {column or self.images[0]} {len(values)} images; give each part its image, or "
                "the column one per part"
            )
        rest = iter(values)
        images = tuple(next(rest) if value is None else value for value in chat.images)
        return self.problem if empty == 0 else str(column), images


def recognize(names: Mapping[str, str | Sequence[str]], row: Row, source: str) -> RowLayout:
    """The layout of rows with the columns and values of `row`, some of its columns named by the user.

    Raises ValueError where a name isn't a column, or where several columns could be the problem or the
    answer.
    """
    problem, answer, _ = (_by_user(field, names, row, source) for field in ("problem", "answer", "images"))
    if problem is None:
        chats = [name for name in CONVERSATIONS if _is_list(row.get(name))]
        sent = ["prompt"] if "prompt" in chats else []  # by TRL and verl, whatever stands beside it
        problem = _usual("problem", (sent, ("problem",), chats, *PROBLEMS), row, source)
    chat = as_turns(lookup(row, problem))
    if answer is None:
        tiers = ((GROUND_TRUTH,), *ANSWERS) if problem == "prompt" and chat else ANSWERS
        supervised = chat and not any(has_column(row, name) for tier in tiers for name in tier)
        if not (supervised and any(_is_reply(turn) for turn in chat)):
            answer = _usual("answer", tiers, row, source)
    images = names["images"] if "images" in names else _image_columns(row, source, {problem, answer})
    images = (images,) if isinstance(images, str) else tuple(images)
    return RowLayout(_whose(row, problem, answer, chat), problem, answer, images)


def _image_columns(row: Row, source: str, texts: set[str | None]) -> tuple[str, ...]:
    if any(name in row for name in IMAGES):
        numbered = [
            str(name)
            for name, value in row.items()
            if NUMBERED_IMAGE.fullmatch(str(name)) and (holds_image(value) or _is_image_file(value))
        ]
        if numbered:
            raise ValueError(
                f"data.columns.images is not set, and rows of {source} hold more images in "
                f"{', '.join(numbered)}; set it to the column that counts, or list all with data.transform"
            )
        return (*IMAGES, *(name for name in IMAGE_PATHS if name in row))
    other = next((name for name in OTHER_IMAGES if name in row), None)
    unknown = [
        str(name)
        for name, value in row.items()
        if name not in texts
        and (holds_image(value) or (IMAGE_NAME.search(str(name)) and _is_image_file(value)))
    ]
    if other is None and unknown:
        raise ValueError(
            f"data.columns.images is not set, and rows of {source} hold images in {', '.join(unknown)}; "
            "set it to that column, or list or remove them with data.transform"
        )
    return IMAGES if other is None else (other,)


def _by_user(field: str, names: Mapping[str, str | Sequence[str]], row: Row, source: str) -> str | None:
    """The column that the user named for a field: of a list, the first that the rows have."""
    if field not in names:
        return None
    options = [names[field]] if isinstance(names[field], str) else list(names[field])
    column = next((name for name in options if has_column(row, name)), options[0])
    check_column(column, row, f"data.columns.{field}", source)
    return column


def _usual(field: str, tiers: Iterable[Sequence[str]], row: Row, source: str) -> str:
    """The column of a field by its usual names."""
    for tier in tiers:
        columns = [name for name in tier if has_column(row, name)]
        if len(columns) > 1:
            raise ValueError(
                f"data.columns.{field} is not set, and {source} has several columns that could be it: "
                f"{', '.join(columns)}; set it to one of them"
            )
        if columns:
            return columns[0]
    check_column(field, row, f"data.columns.{field}", source)
    return field


def _whose(row: Row, problem: str, answer: str | None, chat: Sequence[Row] | None) -> str:
    if chat:
        if "from" in chat[0]:
            return "ShareGPT rows"
        if problem == "prompt":
            return "verl rows" if answer == GROUND_TRUTH else "TRL rows"
        return "ms-swift rows" if answer == "solution" else "chat rows"
    if (problem, answer) == ("query", "response"):
        return "ms-swift rows"
    if row.keys() >= OPTION_TABLE:
        return "VLMEvalKit rows"
    return "R1-V rows" if answer == "solution" else "plain rows"


def has_column(row: Row, name: str) -> bool:
    """Whether a row has a column, or a mapping with this key: `reward_model.ground_truth`."""
    column, _, key = name.partition(".")
    return name in row or (bool(key) and key in _mapping(row.get(column)))


def lookup(row: Row, name: str) -> Any:
    """The value of a column, or of a key of the mapping in a column; None where there is none."""
    column, _, key = name.partition(".")
    return row.get(name) if name in row or not key else _mapping(row.get(column)).get(key)


def _mapping(value: Any) -> Mapping[str, Any]:
    """A mapping, which may be written as JSON; an empty one for any other value."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return value if isinstance(value, Mapping) else {}


def check_column(column: str, row: Row, field: str, source: str) -> None:
    """Raises ValueError where `column`, the value of `field`, isn't a column of the rows."""
    if not has_column(row, column):
        close = difflib.get_close_matches(column, [str(name) for name in row], n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        columns = one_line(", ".join(map(str, row)), 400)
        raise ValueError(f"{field} ({column}) must be a column of {source}; {hint}it has {columns}")


def is_missing(value: Any) -> bool:
    """Whether a value says that there is none: None, NaN, nothing, or a list of such."""
    if isinstance(value, str):
        text = value.strip()  # of an image in base64 maybe, which isn't worth lowering
        return len(text) < LONGEST_MISSING and text.casefold() in MISSING_TEXTS
    if isinstance(value, list | tuple | np.ndarray):
        return all(is_missing(item) for item in value)
    if isinstance(value, float | np.floating):
        return math.isnan(value)
    return value is None or value == {}


def read_text(value: Any, field: str) -> str:
    """A column's value as a person would write it: 1.0 is `1`, 12.5 is `12.5`; empty where it is missing.

    Raises ValueError for what isn't text, number or date.
    """
    if is_missing(value):
        return ""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    if isinstance(value, str | int | float | Decimal | date):
        return str(value)
    raise ValueError(
        f"field {field} holds {_type_name(value)} ({one_line(value)}); text is needed, or turns such as "
        f"{TURNS_EXAMPLE}; rewrite it with data.transform"
    )


def check_marks(problem: str, content: Content, field: str) -> None:
    """Raises ValueError unless a problem has a mark for each image, or none."""
    marks, count = problem.count(IMAGE_PLACEHOLDER), len(content.images)
    if marks not in (0, count):
        raise ValueError(
            f"field {field} has {marks} {IMAGE_PLACEHOLDER} marks and the row {count} images (field "
            f"{content.image_field}); give one mark per image, or none to put the images first"
        )


def read_answer(value: Any, field: str) -> str:
    """A gold answer as text; lists and mappings as JSON."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(value, list | tuple | dict):
        try:
            return json.dumps(value, ensure_ascii=False)
        except TypeError as error:
            raise ValueError(
                f"field {field} ({one_line(value)}) must hold text, numbers and lists of them ({error}); "
                "rewrite it with data.transform"
            ) from error
    return read_text(value, field)


def _type_name(value: Any) -> str:
    if isinstance(value, list | tuple | np.ndarray) and len(value):
        return f"a list of {type(value[0]).__name__}"
    return "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def holds_image(value: Any) -> bool:
    """Whether a column's value is an image or a list of them, as objects or as bytes, or turns with such."""
    if isinstance(value, list | tuple):
        return any(holds_image(item) for item in value)
    if isinstance(value, Mapping):
        inner = (value[key] for key in ("content", *KEYS) if key in value)
        return "bytes" in value or any(holds_image(item) for item in inner)
    return isinstance(value, Image | bytes)


def _is_image_file(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, str) and len(first) < 300 and IMAGE_FILE.fullmatch(first) is not None


def listed(value: Any) -> list[Any]:
    """The images of a column: a list, one image, or a list that is written as text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_list(value) or value
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def parse_list(text: str) -> list[Any] | None:
    """A list written as text, as JSON or in Python's notation; None where it is none."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, list):
            return value
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) or as_turns(value) is not None


def as_turns(value: Any) -> list[Row] | None:
    """The turns of a conversation, which may be written as text (in a CSV file); None for any other value."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parse_list(value)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        columns = list(value.values())  # `datasets` has a list per key for some
        lists = all(isinstance(column, list) for column in columns)
        value = (
            [dict(zip(value, turn, strict=False)) for turn in zip(*columns, strict=False)]
            if lists
            else [value]
        )
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        return None
    turns = list(value)
    is_turn = [isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns]
    return turns if all(is_turn) else None


@dataclass(frozen=True)
class _Chat:
    """A conversation as a prompt."""

    problem: str
    system: str | None
    images: tuple[Any, ...]
    """The values of the user's image parts; None for a part whose image stands in a column."""
    reply: str | None


def read_turns(turns: Sequence[Row]) -> _Chat:
    """A system turn, if there is one, a user's turn, and the last assistant's turn after it.

    Raises ValueError for other conversations: what an assistant said earlier isn't read as a prompt yet.
    """
    roles = [_role(turn) for turn in turns]
    system = roles[:1] == ["system"]
    rest = roles[1:] if system else roles
    if rest[:1] != ["user"] or any(role != "assistant" for role in rest[1:]):
        raise ValueError(
            f"the turns are {one_line(', '.join(roles))}; one user's turn is read, with a system turn before "
            "it and assistant's turns behind it; split the conversation into rows, or rewrite it with "
            "data.transform"
        )
    problem, images = _content(turns[1 if system else 0])
    reply = _content(turns[-1])[0] if rest[1:] else None
    return _Chat(problem, _system(turns[0]) if system else None, images, reply)


def _role(turn: Row) -> str:
    name = _first_value(turn, ("role", "from"))
    role = ROLES.get(str(name).casefold())
    if role is None:
        raise ValueError(
            f"a turn has the role {one_line(name)}; it must be system, user (human) or assistant (gpt); "
            "rename it or rewrite the row with data.transform"
        )
    return role


def _is_reply(turn: Row) -> bool:
    return ROLES.get(str(_first_value(turn, ("role", "from"))).casefold()) == "assistant"


def _system(turn: Row) -> str | None:
    return _checked_system(*_content(turn))


def _checked_system(text: str, images: Sequence[Any]) -> str | None:
    token = SPECIAL_TOKEN.search(text)
    if images or token or IMAGE_PLACEHOLDER in text:
        what = token[0] if token else "an image"
        raise ValueError(f"the system prompt has {what}; it must be text without special tokens")
    return text if text.strip() else None


def _content(turn: Row) -> tuple[str, tuple[Any, ...]]:
    """The text of a turn, with a mark for each image part, and the values of these parts."""
    for name in BESIDE_CONTENT:
        if not is_missing(turn.get(name)):
            raise ValueError(
                f"a turn has {name} beside its text, which isn't read; put them into a column `images`, or "
                "into parts {type: image, image: ...}, with data.transform"
            )
    content = _first_value(turn, ("content", "value"))
    if isinstance(content, str) and content.startswith('[{"type"'):
        content = parse_list(content) or content
    if content is None or isinstance(content, str):
        return content or "", ()
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list | tuple | np.ndarray):
        raise ValueError(f"a turn holds {_type_name(content)}; it must be text or a list of parts")
    texts: list[str] = []
    images: list[Any] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind, value = _part(part)
        texts.append(value if kind == "text" else IMAGE_PLACEHOLDER)
        images += [value] if kind == "image" else []
    return "".join(texts), tuple(images)


def _part(part: Any) -> tuple[str, Any]:
    """`text` or `image`, and the part's text or image."""
    if not isinstance(part, Mapping):
        raise ValueError(f"a part is {_type_name(part)}; it must be text or a mapping with a type")
    kind = str(part.get("type") or ("text" if part.get("text") is not None else "image"))
    text, image = _first_value(part, ("text", "content")), _first_value(part, KEYS)
    if kind in TEXT_PARTS and text and not is_missing(_first_value(part, IMAGES)):
        raise ValueError(
            f"a part ({one_line(part)}) has a text and an image; make two parts of it with data.transform"
        )
    if kind in TEXT_PARTS and isinstance(text, str):
        return "text", text
    if kind in IMAGE_PARTS and (image is not None or "type" in part):
        return "image", image
    media = [name for name in (kind, *part) if "video" in str(name) or "audio" in str(name)]
    if media:
        raise ValueError(f"a part of type {one_line(media[0])} {NO_MEDIA}")
    raise ValueError(
        f"a part ({one_line(part)}) must be {{type: text, text: ...}} or {{type: image, image: ...}}; "
        "rewrite it with data.transform"
    )


def with_images(turns: Sequence[Row], replace_image: Callable[[Any], Any]) -> list[Row]:
    """The turns with each image of their parts replaced; parts whose image stands in a column stay."""
    changed = []
    for turn in turns:
        key = "content" if turn.get("content") is not None else "value"
        parts = [turn[key]] if isinstance(turn[key], Mapping) else turn[key]
        if isinstance(parts, list | tuple | np.ndarray):
            parts = [_with_image(part, replace_image) for part in parts]
        changed.append({**turn, key: parts})
    return changed


def _with_image(part: Any, replace_image: Callable[[Any], Any]) -> Any:
    kind, value = ("text", part) if isinstance(part, str) else _part(part)
    return {"type": "image", "image": replace_image(value)} if kind == "image" and value is not None else part


def _first_value(mapping: Row, keys: Iterable[str]) -> Any:
    """The first value that isn't None."""
    return next((mapping[key] for key in keys if mapping.get(key) is not None), None)
