"""Every way a row can come, and every way it can be wrong."""

import base64
import io
import json
import struct
from contextlib import suppress

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.conftest import picture
from vlm_sapo.data.images import decode
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.types import RowError


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def examples(path, rows=None, **options) -> ExampleSet:
    return ExampleSet(rows if rows is not None else open_rows(str(path)), name=str(path), **options)


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
def test_pictures_embedded_in_parquet(tmp_path, layout):
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
    found = examples(path, columns=columns)
    assert len(found) == 3
    assert list(found[2].images[0].getdata()) == list(picture(2).getdata())


def test_data_urls_bytes_and_pil_pictures(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    rows = [{"problem": "p", "answer": "1", "images": [url, png(), picture()]}]
    assert len(examples(tmp_path, rows)[0].images) == 3


def test_filter_limit_and_transform(tmp_path):
    rows = [{"problem": "p", "answer": str(n), "kind": "ab"[n % 2]} for n in range(10)]
    kept = examples(tmp_path, rows, keep={"kind": "b"}, limit=2, transform=lambda row: row | {"problem": "q"})
    assert [example.answer for example in kept] == ["1", "3"]
    assert kept[0].problem == "q"
    assert len(examples(tmp_path, rows, keep={"kind": ["a", "b"]})) == 10


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"answer": ""}, ["row 7", "field answer is empty"]),
        ({"answer": None}, ["row 7", "field answer is empty"]),
        ({"problem": " "}, ["row 7", "field problem is empty"]),
        ({"image": "pictures/missing.png"}, ["row 7", "field image, picture 1", "does not exist"]),
        ({"image": "rows.jsonl"}, ["row 7", "field image, picture 1", "cannot be read as a picture"]),
        ({"image": "https://example.org/x.png"}, ["row 7", "is an address; download the picture"]),
        ({"image": "data:image/png;base64,!!"}, ["row 7", "not valid base64"]),
        ({"image": 4}, ["row 7", "a int is no picture"]),
        ({"problem": "<image> and <image>"}, ["row 7", "2 <image> marks", "1 pictures"]),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, words):
    good = {"id": 7, "problem": "p", "answer": "1", "image": "pictures/a.png"}
    path = write_jsonl(tmp_path, good | row)
    with pytest.raises(RowError) as error:
        examples(path)[0]
    assert all(word in str(error.value) for word in (*words, str(path)))


def test_a_truncated_picture_is_named(tmp_path):
    path = write_jsonl(tmp_path, {"id": 7, "problem": "p", "answer": "1", "image": "pictures/a.png"})
    (tmp_path / "pictures/a.png").write_bytes(png()[:-40])
    with pytest.raises(RowError, match="row 7 .* field image, picture 1: .*a.png cannot be read"):
        examples(path)[0]


def test_unknown_columns_name_the_nearest(tmp_path):
    path = write_jsonl(tmp_path, {"question": "p", "answer": "1"})
    with pytest.raises(ValueError, match=r"data.columns.problem \(qestion\) .* did you mean question\?"):
        examples(path, columns={"problem": "qestion"})
    with pytest.raises(ValueError, match=r"data.columns.problem \(problem\) must be a column"):
        examples(path)
    with pytest.raises(ValueError, match=r"data.filter.kind \(kind\) must be a column"):
        examples(path, columns={"problem": "question"}, keep={"kind": 1})


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
        examples(tmp_path, [{"problem": "p", "answer": "1"}], keep={"answer": "2"})


def test_the_first_picture_column_that_holds_one_counts_in_each_row(tmp_path):
    picture().save(tmp_path / "p.png")
    rows = [{"problem": "a", "answer": 1}, {"problem": "b", "answer": 2, "image": "p.png"}]
    rows.append({"problem": "c", "answer": 3, "images": ["p.png", "p.png"], "image": None, "mask": b"bytes"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "mask"}) + "\n" for row in rows))
    made = ExampleSet(open_rows(str(path)), name=str(path))
    assert [len(row.images) for row in made] == [0, 1, 2]
    assert "mask" not in ExampleSet(rows, name=str(path))[2].columns


def test_lines_are_ended_by_line_feeds_alone_and_hold_objects(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "a\u2028b", "answer": "\u0085"}, ensure_ascii=False) + "\n")
    assert open_rows(str(path))[0]["problem"] == "a\u2028b"
    path.write_text("{}\nnull\n")
    with pytest.raises(ValueError, match="line 2: a JSON object"):
        open_rows(str(path))


def test_a_transform_that_fails_names_row_and_columns(tmp_path):
    rows = [{"id": "a", "problem": "p", "answer": "1"}, {"id": "b", "problem": "p"}]
    made = ExampleSet(rows, name="r.jsonl", transform=lambda row: row | {"answer": row["answer"][0]})
    with pytest.raises(ValueError, match="row b of r.jsonl.*KeyError.*columns are id, problem"):
        made[1]


def test_odd_pictures(tmp_path):
    """16 bits are scaled, and an orientation that nobody can read is left alone."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    grey = np.asarray(decode("deep.png", tmp_path))
    assert abs(grey.mean() - 127.5) < 2 and grey.max() == 255
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    picture().save(tmp_path / "e.jpg", exif=exif)
    data = (tmp_path / "e.jpg").read_bytes()
    place = data.index(b"Exif")
    for offset, byte in ((17, 0), (17, 26), (17, 84), (41, 13), (43, 1)):
        torn = bytearray(data)
        torn[place + offset] = byte
        with suppress(struct.error, TypeError, AttributeError):  # up to Pillow 12.2
            ImageOps.exif_transpose(Image.open(io.BytesIO(torn)))
        assert decode(bytes(torn), tmp_path).size == (48, 48)
