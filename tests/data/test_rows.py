"""Rows of every source, and each way in which a row can be wrong."""

import base64
import io
import json
import struct
from contextlib import suppress

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.conftest import numbered_image
from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.images import decode
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.types import RowError


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    numbered_image(number).save(buffer, "PNG")
    return buffer.getvalue()


def examples(path, rows=None, **options) -> ExampleSet:
    section = RowsConfig(source=str(path), **options)
    return ExampleSet(rows if rows is not None else open_rows(str(path)), section)


def write_jsonl(folder, *rows):
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures/a.png").write_bytes(png())
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_with_paths_relative_to_the_file(tmp_path):
    path = write_jsonl(
        tmp_path, {"id": "x", "problem": "p", "answer": 3, "image": "pictures/a.png", "level": 2}
    )
    example = examples(path)[0]
    assert (example.id, example.problem, example.answer, example.columns["level"]) == ("x", "p", "3", 2)
    assert example.images[0].size == (48, 48)


@pytest.mark.parametrize("layout", ["hub", "saved", "parquet"])
def test_images_embedded_in_parquet(tmp_path, layout):
    rows = [
        {"question": f"<image>{n}", "label": "a", "pics": [{"bytes": png(n), "path": None}]} for n in range(3)
    ]
    features = datasets.Features(
        question=datasets.Value("string"),
        label=datasets.Value("string"),
        pics=datasets.List(datasets.Image()),
    )
    table = datasets.Dataset.from_list(rows, features=features)
    path = tmp_path / "set"
    if layout == "saved":
        table.save_to_disk(str(path))
    else:
        (path / "data").mkdir(parents=True)
        table.to_parquet(path / "data/train-00000-of-00001.parquet")
        path = path / "data/train-00000-of-00001.parquet" if layout == "parquet" else path
    columns = {"problem": "question", "answer": "label", "images": "pics"}
    rows = examples(path, columns=columns)
    assert len(rows) == 3
    assert list(rows[2].images[0].getdata()) == list(numbered_image(2).getdata())


def test_data_urls_bytes_and_pil_images(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    rows = [{"problem": "p", "answer": "1", "images": [url, png(), numbered_image()]}]
    assert len(examples(tmp_path, rows)[0].images) == 3


def test_filter_limit_and_transform(tmp_path):
    rows = [{"problem": "p", "answer": str(n), "kind": "ab"[n % 2]} for n in range(10)]
    (tmp_path / "rewrite.py").write_text("def rename(row):\n    return row | {'problem': 'q'}\n")
    rename = f"{tmp_path}/rewrite.py:rename"
    selected = examples(tmp_path, rows, filter={"kind": "b"}, limit=2, transform=rename)
    assert [example.answer for example in selected] == ["1", "3"]
    assert selected[0].problem == "q"
    assert len(examples(tmp_path, rows, filter={"kind": ["a", "b"]})) == 10


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answer": ""}, ["row 7", "field answer is empty"]),
        ({"answer": None}, ["row 7", "field answer is empty"]),
        ({"problem": " "}, ["row 7", "field problem is empty"]),
        ({"image": "pictures/missing.png"}, ["row 7", "field image, image 1", "does not exist"]),
        ({"image": "rows.jsonl"}, ["row 7", "field image, image 1", "cannot be read as an image"]),
        ({"image": "https://example.org/x.png"}, ["row 7", "is an address; download the image"]),
        ({"image": "data:image/png;base64,!!"}, ["row 7", "not valid base64"]),
        ({"image": 4}, ["row 7", "a int is no image"]),
        ({"problem": "<image> and <image>"}, ["row 7", "2 <image> marks", "1 images"]),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, words):
    good = {"id": 7, "problem": "p", "answer": "1", "image": "pictures/a.png"}
    path = write_jsonl(tmp_path, good | row)
    with pytest.raises(RowError) as error:
        examples(path)[0]
    assert all(word in str(error.value) for word in (*words, str(path)))


def test_a_truncated_image_is_named(tmp_path):
    path = write_jsonl(tmp_path, {"id": 7, "problem": "p", "answer": "1", "image": "pictures/a.png"})
    (tmp_path / "pictures/a.png").write_bytes(png()[:-40])
    with pytest.raises(RowError, match="row 7 .* field image, image 1: .*a.png cannot be read"):
        examples(path)[0]


def test_unknown_columns_name_the_nearest(tmp_path):
    path = write_jsonl(tmp_path, {"riddle": "p", "answer": "1"})
    with pytest.raises(ValueError, match=r"data.columns.problem \(ridle\) .* did you mean riddle\?"):
        examples(path, columns={"problem": "ridle"})
    with pytest.raises(ValueError, match=r"data.columns.problem \(problem\) must be a column"):
        examples(path)
    with pytest.raises(ValueError, match=r"data.filter.kind \(kind\) must be a column"):
        examples(path, columns={"problem": "riddle"}, filter={"kind": 1})


def test_malformed_json_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n{"problem": \n')
    with pytest.raises(RowError, match="line 2: not valid JSON"):
        open_rows(str(path))


def test_missing_sources_and_splits(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        open_rows(str(tmp_path / "none.jsonl"))
    table = datasets.DatasetDict(
        a=datasets.Dataset.from_list([{"x": 1}]), b=datasets.Dataset.from_list([{"x": 1}])
    )
    table.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"data.split \(None\) must be one of a, b"):
        open_rows(str(tmp_path / "two"))
    assert len(open_rows(str(tmp_path / "two"), split="b")) == 1


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no rows left; check data.split, data.filter"):
        examples(tmp_path, [{"problem": "p", "answer": "1"}], filter={"answer": "2"})


def test_each_row_uses_its_first_column_that_holds_images(tmp_path):
    numbered_image().save(tmp_path / "p.png")
    rows = [{"problem": "a", "answer": 1}, {"problem": "b", "answer": 2, "image": "p.png"}]
    rows.append({"problem": "c", "answer": 3, "images": ["p.png", "p.png"], "image": None, "mask": b"bytes"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "mask"}) + "\n" for row in rows))
    assert [len(row.images) for row in examples(path)] == [0, 1, 2]
    assert "mask" not in examples(path, rows)[2].columns


def test_only_line_feeds_end_lines_and_each_line_is_an_object(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "a\u2028b", "answer": "\u0085"}, ensure_ascii=False) + "\n")
    assert open_rows(str(path))[0]["problem"] == "a\u2028b"
    path.write_text("{}\nnull\n")
    with pytest.raises(ValueError, match="line 2: a JSON object"):
        open_rows(str(path))


def test_a_transform_that_fails_names_row_and_columns(tmp_path):
    rows = [{"id": "a", "problem": "p", "answer": "1"}, {"id": "b", "problem": "p"}]
    (tmp_path / "rewrite.py").write_text("def first(row):\n    return row | {'answer': row['answer'][0]}\n")
    first_letters = examples("r.jsonl", rows, transform=f"{tmp_path}/rewrite.py:first")
    with pytest.raises(ValueError, match="row b of r.jsonl.*KeyError.*columns are id, problem"):
        first_letters[1]


def test_unusual_images(tmp_path):
    """16 bits are scaled, and an unreadable orientation is ignored."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    grey = np.asarray(decode("deep.png", tmp_path))
    assert abs(grey.mean() - 127.5) < 2 and grey.max() == 255
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    numbered_image().save(tmp_path / "e.jpg", exif=exif)
    data = (tmp_path / "e.jpg").read_bytes()
    start = data.index(b"Exif")
    for offset, byte in ((17, 0), (17, 26), (17, 84), (41, 13), (43, 1)):
        torn = bytearray(data)
        torn[start + offset] = byte
        with suppress(struct.error, TypeError, AttributeError):  # up to Pillow 12.2
            ImageOps.exif_transpose(Image.open(io.BytesIO(torn)))
        assert decode(bytes(torn), tmp_path).size == (48, 48)
