"""An image in base64 without `data:` was taken for a path, and the message had all of it.

Source: https://github.com/OFA-Sys/OFA/issues/53
"""

import base64
import io
import json

import pytest
from PIL import Image, ImageDraw

from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.types import RowError


def encoded(kind: str) -> bytes:
    image = Image.new("RGB", (52, 36), "wheat")
    ImageDraw.Draw(image).ellipse((8, 6, 30, 28), fill="purple")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue())


def read(folder, value, column="image") -> ExampleSet:
    path = folder / "discs.jsonl"
    path.write_text(json.dumps({"question": "How many discs?", "answer": "1", column: value}) + "\n")
    return ExampleSet(open_rows(str(path)), RowsConfig(source=str(path)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("column", ["image", "images"])
def test_it_is_decoded(kind, column, tmp_path):
    text = encoded(kind).decode()
    lined = "\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    by_str = str(encoded(kind))
    for value in (
        text,
        text.rstrip("="),
        lined,
        by_str,
        [text],
        {"bytes": text},
        f"data:image/x;base64,{text}",
    ):
        assert read(tmp_path, value, column)[0].images[0].size == (52, 36)


def test_a_table_holds_it_too(tmp_path):
    path = tmp_path / "discs.tsv"
    path.write_text(f"index\tquestion\tanswer\timage\n0\tHow many discs?\t1\t{encoded('JPEG').decode()}\n")
    [example] = ExampleSet(open_rows(str(path)), RowsConfig(source=str(path)))
    assert example.images[0].size == (52, 36)


def test_a_file_may_have_such_a_name(tmp_path):
    name = encoded("PNG").decode()[:80].replace("/", "_")
    Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    assert read(tmp_path, f"{name}.png")[0].images[0].size == (9, 9)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (base64.b64encode(b"no image at all " * 60_000).decode(), "image 1: "),
        (encoded("PNG").decode()[:90] + "A" * 1_000_000, "the base64 text cannot be read as an image"),
        ("data:image/png;base64," + "A" * 1_000_000, "the data URL cannot be read as an image"),
        ("https://host/" + "x" * 1_000_000, "is an address; download the image"),
        ("discs.png", "does not exist; paths are relative"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(value, sentence, tmp_path):
    with pytest.raises(RowError, match=sentence) as error:
        read(tmp_path, value)[0]
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)
