"""Images and rows that are malicious or broken: each is refused with a sentence, or read."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import numbered_image
from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.images import FORMATS, MAX_PIXELS, decode
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.types import RowError


def read_rows(path: Path) -> ExampleSet:
    return ExampleSet(open_rows(str(path)), RowsConfig(source=str(path)))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it has so many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG whose comment unpacks to 200 MB."""
    data = b"Comment\0\0" + zlib.compress(bytes(200_000_000))
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = saved(numbered_image())
    return whole[:33] + chunk + whole[33:]


FRAMES = [numbered_image(0), numbered_image(1)]
REFUSED = {
    "a bomb of 900 million pixels": (png_header(30_000, 30_000), "30000x30000 pixels|cannot be read"),
    "20,000 x 20,000": (png_header(20_000, 20_000), "20000x20000 pixels|cannot be read"),
    "a compressed comment": (text_bomb(), "cannot be read as an image"),
    "cut short": (saved(numbered_image())[:100], "cannot be read as an image"),
    "cut short, JPEG": (saved(numbered_image(size=(200, 200)), "JPEG")[:700], "cannot be read as an image"),
    "empty": (b"", "cannot be read|is no image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "none of PNG, JPEG"),
    "HTML": (b"<!doctype html><html>", "cannot be read"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "cannot be read"),
    "animated GIF": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "several frames"),
    "animated PNG": (saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "several frames"),
    "animated WEBP": (saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "several frames"),
    "TIFF of two pages": (saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "or pages"),
    "32 bits": (saved(Image.fromarray(np.full((9, 9), 1e6, np.float32)), "TIFF"), "32 bits per pixel"),
}
READ = {
    "1x1": saved(Image.new("RGB", (1, 1))),
    "20,000 wide": saved(Image.new("L", (20_000, 30))),
    "CMYK": saved(Image.new("CMYK", (40, 40)), "JPEG"),
    "grey with alpha": saved(Image.new("LA", (40, 40))),
    "palette": saved(numbered_image().convert("P")),
    "black and white": saved(numbered_image().convert("1")),
    "16 bits": saved(Image.fromarray(np.full((9, 9), 65535, np.uint16))),
    "GIF of one frame": saved(numbered_image(), "GIF"),
    "phone's JPEG with a preview": saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_image_is_refused_with_a_sentence(name, tmp_path):
    data, sentence = REFUSED[name]
    (tmp_path / "x.png").write_bytes(data)
    for value in (data, "x.png", "data:image/png;base64," + base64.b64encode(data).decode()):
        with pytest.raises(ValueError, match=sentence):
            decode(value, tmp_path)


@pytest.mark.parametrize("name", READ)
def test_unusual_images_are_read(name, tmp_path):
    image = decode(READ[name], tmp_path).convert("RGB")
    assert image.size[0] * image.size[1] <= MAX_PIXELS


def test_the_exif_orientation_is_applied(tmp_path):
    wide, exif = Image.new("RGB", (40, 20)), Image.Exif()
    exif[0x0112] = 6
    assert decode(saved(wide, "JPEG", exif=exif), tmp_path).size == (20, 40)


@pytest.mark.parametrize(
    "value",
    [
        *("../secret.png", "a/../../secret.png", "/etc/passwd", "./../secret.png", {"path": "../secret.png"}),
        *(
            "file://../secret.png",
            "file:///etc/passwd",
            "..\\secret.png",
            {"image_url": {"url": "../secret.png"}},
        ),
    ],
)
def test_a_row_of_a_file_stays_in_its_folder(value, tmp_path):
    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    numbered_image().save(tmp_path / "secret.png")
    (folder / "rows.jsonl").write_text(json.dumps({"problem": "p", "answer": "1", "image": value}) + "\n")
    rows = open_rows(str(folder / "rows.jsonl"))
    with pytest.raises(RowError, match="image 1: .* leads out of .*pictures_anywhere=true"):
        ExampleSet(rows, RowsConfig(source=str(folder / "rows.jsonl")))[0]
    if "secret" in str(value):
        assert ExampleSet(rows, RowsConfig(source=str(folder / "rows.jsonl"), pictures_anywhere=True))[
            0
        ].images


def test_a_link_does_not_lead_out(tmp_path):
    (tmp_path / "set").mkdir()
    numbered_image().save(tmp_path / "secret.png")
    (tmp_path / "set/x.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="leads out of .*pictures_anywhere=true"):
        decode("x.png", tmp_path / "set", anywhere=False)
    assert decode("x.png", tmp_path / "set").size


@pytest.mark.parametrize("field", ["problem", "answer", "id"])
def test_half_a_character_is_an_error_of_its_row(tmp_path, field):
    row = {"problem": "p", "answer": "1", "id": "1"} | {field: "\ud83d"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RowError, match=f"field {field} holds half a character"):
        read_rows(tmp_path / "rows.jsonl")[0]


def test_an_image_inside_another_column_is_not_opened(tmp_path):
    """`datasets` would open its path, or its address, as the row is read."""
    features = datasets.Features(
        {
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "meta": {"a": datasets.Image(), "b": datasets.List({"c": datasets.Image()})},
            "more": datasets.Json(),
        }
    )
    address = {"path": "http://127.0.0.1:1/x.png", "bytes": None}
    meta = {"a": address, "b": [{"c": address}]}
    row = {"problem": "p", "answer": "1", "meta": meta, "more": '{"x": [1]}'}
    plain = datasets.Dataset.from_list([row]).data.table
    table = plain.cast(features.arrow_schema).replace_schema_metadata(features.arrow_schema.metadata)
    pq.write_table(table, tmp_path / "rows.parquet")
    [example] = read_rows(tmp_path / "rows.parquet")
    assert example.columns["meta"]["a"] == address and example.columns["meta"]["b"][0]["c"] == address
    assert example.columns["more"] == {"x": [1]}, "columns that hold no file are read as before"


@pytest.mark.parametrize(
    "value",
    [
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "http://127.0.0.1:1/x.png",
        "ftp://example.org/x.png",
        "x\0.png",
        "x" * 5000,
        "data:text/html,<script>",
        "data:image/png;base64,????",
        {"path": None},
        7,
    ],
)
def test_addresses_are_not_opened_and_odd_names_are_refused(value, tmp_path):
    with pytest.raises(ValueError):
        decode(value, tmp_path)


WHOLE = [saved(numbered_image(), kind) for kind in FORMATS]


@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    st.integers(0, 3000),
)
def test_damaged_images_are_read_or_refused_with_a_sentence(tmp_path, data, changes, length):
    torn = bytearray(data[: length or None])
    for position, byte in changes:
        if torn:
            torn[position % len(torn)] = byte
    try:
        image = decode(bytes(torn), tmp_path)
    except ValueError:
        return
    assert image.size[0] * image.size[1] <= MAX_PIXELS


ROW = st.dictionaries(
    st.sampled_from(["problem", "answer", "image", "images", "id", "split"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)


@given(st.lists(ROW, min_size=1, max_size=3))
def test_any_json_is_a_row_or_refused_with_a_sentence(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        examples = read_rows(path)
    except ValueError:
        return
    for index in range(len(examples)):
        try:
            assert isinstance(examples[index].problem, str)
        except ValueError as error:
            assert "row" in str(error)
