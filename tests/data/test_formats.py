"""Rows as other tools write them: each is read as its tool means it, or refused with a sentence."""

import base64
import gzip
import io
import json
from decimal import Decimal

import datasets
import pytest

from tests.conftest import numbered_image
from vlm_sapo.config.data import RowsConfig
from vlm_sapo.data.rows import ExampleSet, open_rows
from vlm_sapo.types import Example, RowError


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    numbered_image(number).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(number: int = 0) -> str:
    return base64.b64encode(png(number)).decode()


@pytest.fixture
def folder(tmp_path):
    """A folder with the images `a.png` and `b.png`."""
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.png").write_bytes(png(number))
    return tmp_path


def opened(path, **options) -> ExampleSet:
    section = RowsConfig(source=str(path), **options)
    return ExampleSet(open_rows(str(path), split=section.split), section)


def lines(folder, *rows, **options) -> ExampleSet:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return opened(path, **options)


def one(folder, row, **options) -> Example:
    return lines(folder, row, **options)[0]


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


QUESTION = "<image>How many dots has the upper die?"
PLAIN = "How many dots has the upper die?"
PARTS = [{"type": "image"}, {"type": "text", "text": PLAIN}]
REPLY = {"role": "assistant", "content": "five"}
LAYOUTS = {
    "TRL, a prompt of parts": (
        {"prompt": user(PARTS), "solution": "5", "images": ["a.png"]},
        "TRL rows: problem from prompt, answer from solution, images from images",
    ),
    "TRL, prompt and completion": (
        {"prompt": user(QUESTION), "completion": [REPLY | {"content": "5"}], "images": ["a.png"]},
        "answer from completion",
    ),
    "OpenAI, a data URL": (
        {
            "messages": user(
                [
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{base64_png()}", "detail": "low"},
                    },
                    {"type": "text", "text": PLAIN},
                ]
            ),
            "answer": 5,
        },
        "images from messages",
    ),
    "Qwen, images inside the parts": (
        {"messages": user([{"image": "a.png"}, {"text": PLAIN}]), "solution": "5"},
        "images from messages",
    ),
    "parts as a parquet file has them": (
        {
            "messages": user(
                [
                    {"type": "image", "image": "a.png", "text": None},
                    {"type": "text", "image": None, "text": PLAIN},
                ]
            ),
            "solution": "5",
        },
        "problem from messages",
    ),
    "ms-swift, messages": (
        {"messages": user(QUESTION), "solution": "5", "images": ["a.png"]},
        "ms-swift rows: problem from messages, answer from solution, images from images",
    ),
    "ms-swift, a reply that isn't the gold": (
        {"messages": [*user(QUESTION), REPLY], "solution": "5", "images": [{"bytes": None, "path": "a.png"}]},
        "answer from solution",
    ),
    "ms-swift, query and response": (
        {"query": QUESTION, "response": "5", "images": "a.png"},
        "ms-swift rows: problem from query, answer from response",
    ),
    "LLaVA": (
        {
            "id": "7",
            "image": "a.png",
            "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "5"}],
        },
        "ShareGPT rows: problem from conversations, answer from the assistant's turn of conversations "
        "(there is no column of answers)",
    ),
    "conversations with an answer": (
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "five"}],
            "answer": "5",
        },
        "answer from answer",
    ),
    "verl": (
        {
            "data_source": "dice",
            "prompt": user(QUESTION),
            "images": ["a.png"],
            "ability": "counting",
            "reward_model": {"style": "rule", "ground_truth": "5"},
            "extra_info": {"index": 3, "answer": "five", "question": PLAIN},
        },
        "verl rows: problem from prompt, answer from reward_model.ground_truth, images from images",
    ),
    "EasyR1": ({"problem": QUESTION, "answer": "5", "images": ["a.png"]}, "plain rows: problem from problem"),
    "R1-V": ({"problem": PLAIN, "solution": "5", "image": "a.png"}, "R1-V rows: problem from problem"),
    "question and label": ({"question": PLAIN, "label": 5, "image_path": "a.png"}, "images from image_path"),
    "text and label": ({"text": PLAIN, "label": 5, "image": "a.png"}, "problem from text"),
    "TRL, with the columns that the prompt was made of": (
        {
            "problem": "raw",
            "prompt": [{"role": "system", "content": "Think."}, *user(QUESTION)],
            "solution": "5",
            "image": "a.png",
        },
        "TRL rows: problem from prompt",
    ),
    "a question beside its conversation": (
        {"question": "raw", "messages": user(QUESTION), "answer": "5", "images": ["a.png"]},
        "problem from messages",
    ),
    "Qwen's own image token": (
        {"problem": f"<|vision_start|><|image_pad|><|vision_end|>{PLAIN}", "answer": "5", "image": "a.png"},
        "images from image",
    ),
    "one turn without a list": (
        {"messages": user(QUESTION)[0], "solution": "5", "images": ["a.png"]},
        "problem from messages",
    ),
    "a list per key": (
        {"conversations": {"from": ["human"], "value": [QUESTION]}, "answer": "5", "image": "a.png"},
        "ShareGPT rows",
    ),
    "parts written as text": (
        {"messages": user(json.dumps(PARTS)), "solution": "5", "image": "a.png"},
        "problem from messages",
    ),
    "a mapping written as text": (
        {"prompt": user(QUESTION), "reward_model": '{"ground_truth": "5"}', "image": "a.png"},
        "verl rows",
    ),
    "turns written as text": (
        {"messages": json.dumps(user(QUESTION)), "solution": "5", "images": '["a.png"]'},
        "ms-swift rows",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_recognised_by_its_columns(name, folder):
    row, sentence = LAYOUTS[name]
    examples = lines(folder, row)
    example = examples[0]
    assert example.problem.replace("<image>", "") == PLAIN
    assert example.answer == "5"
    assert [image.tobytes() for image in example.images] == [numbered_image().tobytes()]
    assert sentence in examples.format and "\n" not in examples.format


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_prompt_that_the_model_reads_has_no_reply(name, folder, encoder):
    row, _ = LAYOUTS[name]
    prompt = encoder(lines(folder, row)[0])
    assert prompt.text.count(PLAIN) == 1 and len(prompt.images) == 1
    assert not any(words in prompt.text for words in ("five", "role", "content", "ground_truth"))


def test_parquet_of_turns_keeps_its_answer(folder):
    rows = [LAYOUTS["verl"][0] | {"images": [{"bytes": png(n)}]} for n in range(3)]
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    examples = opened(folder / "train.parquet")
    assert [example.answer for example in examples] == ["5"] * 3
    assert examples[2].images[0].tobytes() == numbered_image(2).tobytes()
    assert examples[0].columns["extra_info"]["answer"] == "five"


def test_images_stand_where_their_parts_are(folder, encoder):
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": " above "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    example = one(folder, {"messages": user(parts), "solution": "no", "images": ["a.png"]})
    assert example.problem == "Is <image> above <image>?"
    sizes = [image.tobytes() for image in example.images]
    assert sizes == [numbered_image(1).tobytes(), numbered_image(0).tobytes()]
    token = encoder.vlm.processor.image_token
    before, middle, _ = encoder(example).text.split(token)
    assert "Is " in before and " above " in middle


def test_a_system_turn_is_the_system_prompt(folder, encoder):
    row = {"messages": [{"role": "system", "content": "Count twice."}, *user(PLAIN)], "solution": "5"}
    example = one(folder, row)
    assert example.system == "Count twice." and example.problem == PLAIN
    text = encoder(example).text
    assert text.index("Count twice.") < text.index(PLAIN)
    assert "system prompt from the conversation" in lines(folder, row).format
    assert one(folder, row, system="Be brief.").system == "Be brief.", "the config's own counts"
    columns = {"conversations": [{"from": "human", "value": PLAIN}], "answer": "5", "system": "Count twice."}
    assert one(folder, columns).system == "Count twice."
    assert one(folder, {"problem": PLAIN, "answer": "5", "system": "metric"}).system is None


def turns(*roles) -> dict:
    return {"messages": [{"role": role, "content": role} for role in roles], "solution": "5"}


REFUSED = {
    "two questions": (
        turns("user", "assistant", "user"),
        "the turns are user, assistant, user; one user's turn",
    ),
    "a greeting": (turns("assistant", "user"), "one user's turn is read"),
    "no question": (turns("system"), "one user's turn is read"),
    "two system turns": (turns("system", "system", "user"), "one user's turn is read"),
    "an unknown role": (turns("narrator"), "a turn has the role narrator; it must be system, user"),
    "a tool's turn": (turns("user", "assistant", "tool"), "a turn has the role tool"),
    "an odd from": (
        {"conversations": [{"from": "observation", "value": "p"}], "answer": "1"},
        "field conversations: a turn has the role observation",
    ),
    "pairs instead of turns": (
        {"messages": [["user", "p"]], "answer": "1"},
        "field messages holds a list of list .*; text is needed, or turns such as",
    ),
    "turns of other keys": (
        {"conversations": [{"speaker": "human", "text": "p"}], "answer": "1"},
        "field conversations holds a list of dict",
    ),
    "a mapping as problem": ({"problem": {"text": "p"}, "answer": "1"}, "field problem holds a mapping"),
    "a list as problem": ({"problem": ["p", "q"], "answer": "1"}, "field problem holds a list of str"),
    "a number as content": ({"messages": user(5), "answer": "1"}, "a turn holds a int"),
    "an unknown part": (
        {"messages": user([{"type": "file", "file": "x"}]), "answer": "1"},
        "a part .* must be",
    ),
    "no turn of the assistant": (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": ""}]},
        "no assistant's turn after the user's",
    ),
    "a special token in the system turn": (
        {"messages": [{"role": "system", "content": "<|im_end|>"}, *user("p")], "answer": "1"},
        "the system prompt has <|im_end|>",
    ),
    "an image in the system turn": (
        {"messages": [{"role": "system", "content": "see <image>"}, *user("p")], "answer": "1"},
        "the system prompt has an image",
    ),
    "history": (
        {"query": "p", "response": "1", "history": [["q", "a"]]},
        "field history isn't read, the prompt is one user's turn",
    ),
    "a rendered prompt": (
        {"prompt": "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n", "answer": "1"},
        "field prompt .* is the text of a chat template; give its turns",
    ),
    "boxes of ms-swift": (
        {
            "messages": user("Where is <ref-object>?"),
            "solution": "1",
            "objects": {"ref": ["die"], "bbox": [[1]]},
        },
        "a <ref-object> mark for the column objects",
    ),
    "a path inside the text": (
        {"problem": "<img>a.png</img>p", "answer": "1"},
        "has <img>a.png</img>; put the path",
    ),
    "more parts than images": (
        {"messages": user([{"type": "image"}, *PARTS]), "answer": "1", "images": ["a.png"]},
        "2 image parts, 2 of them without an image, and field images 1 images",
    ),
    "images in parts and in a column": (
        {"messages": user([{"type": "image", "image": "a.png"}]), "answer": "1", "images": ["a.png"]},
        "1 image parts, 0 of them without an image, and field images 1 images",
    ),
    "a mark and a part for one image": (
        {
            "messages": user([{"type": "image"}, {"type": "text", "text": QUESTION}]),
            "answer": "1",
            "image": "a.png",
        },
        "2 <image> marks and the row 1 images",
    ),
    "a video": (
        {"problem": "p", "answer": "1", "videos": ["a.mp4"]},
        "field videos holds video, which isn't",
    ),
    "a sound": ({"problem": "p", "answer": "1", "audio": {"path": "a.wav"}}, "field audio holds audio"),
    "a video's path": (
        {"problem": "p", "answer": "1", "video_path": "a.mp4"},
        "field video_path holds video",
    ),
    "a video among the images": (
        {"problem": "p", "answer": "1", "images": ["a.png", "b.MP4"]},
        "field images holds video .b.MP4., which isn't",
    ),
    "a video's part without a type": (
        {"messages": user([{"video": "a.mp4"}, {"text": "p"}]), "answer": "1"},
        "a part of type video isn't supported yet",
    ),
    "a video's mark": (
        {"problem": "<video>p", "answer": "1"},
        "has a <video> mark, which isn't supported yet",
    ),
    "a video's part": (
        {"messages": user([{"type": "video", "video": "a.mp4"}]), "answer": "1"},
        "a part of type video isn't supported yet.*data.on_error=skip",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name, folder):
    row, sentence = REFUSED[name]
    with pytest.raises(RowError, match=f"row 0 of .*{sentence.replace('|', '[|]')}") as error:
        one(folder, row)
    assert len(str(error.value)) < 600


def test_rows_without_their_video_are_fine(folder):
    rows = lines(folder, *({"problem": "p", "answer": "1", "videos": v} for v in (None, [], "", False)))
    assert [example.answer for example in rows] == ["1"] * 4


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "p", "query": "q", "answer": "1"}, "problem .* question, query; set it"),
        ({"question": "p", "solution": "1", "gold": "2"}, "answer .* solution, gold; set it"),
        (
            {"messages": user("p"), "conversations": user("q"), "answer": "1"},
            "problem .* messages, conversations",
        ),
        ({"messages": "plain text", "answer": "1"}, r"data.columns.problem \(problem\) must be a column"),
        ({"messages": user("p")}, r"data.columns.answer \(answer\) must be a column"),
        ({"problem": "p"}, r"data.columns.answer \(answer\) must be a column"),
    ],
)
def test_columns_that_are_ambiguous_or_missing_are_named(folder, row, names):
    with pytest.raises(ValueError, match=names):
        lines(folder, row)


def test_images_in_an_unknown_column_are_not_dropped(folder):
    row = {"problem": "p", "answer": "1", "scan": {"bytes": png()}}
    datasets.Dataset.from_list([row]).to_parquet(folder / "rows.parquet")
    with pytest.raises(ValueError, match="data.columns.images is not set, .* hold images in scan"):
        opened(folder / "rows.parquet")
    assert opened(folder / "rows.parquet", columns={"images": "scan"})[0].images
    numbered = {"problem": "p", "answer": "1", "image_1": "a.png", "image_2": "b.png"}
    with pytest.raises(ValueError, match="hold images in image_1, image_2; set it to that column, or list"):
        lines(folder, numbered)
    assert lines(folder, numbered | {"image_1": "yes", "image_2": "no"})[0].columns["image_1"] == "yes"
    hint = lines(folder, {"problem": "p", "answer": "1", "scan": "a.png"}).format
    assert "no image in the first row (scan looks like one; set data.columns.images=scan)" in hint


def test_the_users_columns_and_transform_count_before_the_usual_names(folder):
    row = {"messages": user("p"), "question": "q", "solution": "1", "gold": "2", "nested": {"truth": "3"}}
    example = one(folder, row, columns={"problem": "question", "answer": "gold"})
    assert (example.problem, example.answer) == ("q", "2")
    assert one(folder, row, columns={"answer": "nested.truth"}).answer == "3"
    with pytest.raises(ValueError, match=r"data.columns.answer \(nested.falsehood\) must be a column"):
        one(folder, row, columns={"answer": "nested.falsehood"})
    (folder / "change.py").write_text(
        "def change(row):\n    return {'problem': 'r', 'answer': row['gold']}\n"
    )
    example = one(folder, row, transform=f"{folder}/change.py:change")
    assert (example.problem, example.answer) == ("r", "2")


def test_columns_that_a_transform_removed_are_none(folder):
    (folder / "change.py").write_text(
        "def change(row):\n"
        "    turns = [{'role': 'user', 'content': '<image>' + row['problem']}]\n"
        "    return {'prompt': turns, 'solution': row['solution'], 'images': [row['picture']]}\n"
    )
    rows = [{"problem": "How many?", "solution": "5", "picture": "a.png"}] * 2
    example = lines(folder, *rows, transform=f"{folder}/change.py:change")[1]
    assert example.problem == "<image>How many?" and len(example.images) == 1


def test_a_demonstration_may_be_an_assistants_turn(folder):
    row = {
        "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "so 5"}],
        "answer": "5",
    }
    example = one(folder, row, columns={"response": "conversations"})
    assert example.columns["conversations"] == "so 5" and example.answer == "5"
    assert isinstance(one(folder, row).columns["conversations"], list)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (-3.0, "-3"),
        (12.5, "12.5"),
        (1e300, "1e+300"),
        (7, "7"),
        (True, "True"),
        ("None", "None"),
        ("null", "null"),
        ("N/A", "N/A"),
        ("1.0", "1.0"),
        ("007", "007"),
        (Decimal("1.50"), "1.50"),
        (["red", "blue"], '["red", "blue"]'),
        ([1, 2.5], "[1, 2.5]"),
        (" 5 ", " 5 "),
    ],
)
def test_an_answer_is_text_as_a_person_writes_it(tmp_path, value, text):
    rows = [{"problem": "p", "answer": value}]
    example = ExampleSet(rows, RowsConfig(source=f"{tmp_path}/rows"))[0]
    assert example.answer == text and example.columns["answer"] == value


@pytest.mark.parametrize(
    "value", [None, float("nan"), "", " ", [], {}, [None], ["", float("nan")], "NaN", "nan", "[]"]
)
def test_a_missing_answer_is_empty(tmp_path, value):
    rows = [{"problem": "p", "answer": value}]
    with pytest.raises(RowError, match="row 0 of .*: field answer is empty; give it a value"):
        ExampleSet(rows, RowsConfig(source=f"{tmp_path}/rows"))[0]


@pytest.mark.parametrize("value", [b"5", [b"5"], object()])
def test_answers_of_other_types_are_refused(tmp_path, value):
    rows = [{"problem": "p", "answer": value}]
    examples = ExampleSet(rows, RowsConfig(source=f"{tmp_path}/rows"))
    with pytest.raises(RowError, match="field answer"):
        examples[0]


ROW = {"problem": QUESTION, "answer": "5", "images": ["a.png"]}
FILES = {
    "rows.json": json.dumps([ROW, ROW | {"answer": "6"}], indent=2).encode(),
    "line.json": json.dumps([ROW, ROW | {"answer": "6"}]).encode(),
    "data.json": json.dumps({"version": 1, "data": [ROW, ROW | {"answer": "6"}]}).encode(),
    "byid.json": json.dumps({"x": ROW, "y": ROW | {"answer": "6"}}).encode(),
    "lines.json": f"{json.dumps(ROW)}\n{json.dumps(ROW | {'answer': '6'})}\n".encode(),
    "array.jsonl": json.dumps([ROW, ROW | {"answer": "6"}]).encode(),
    "windows.jsonl": f"\ufeff{json.dumps(ROW)}\r\n{json.dumps(ROW | {'answer': '6'})}\r\n".encode(),
    "wide.json": json.dumps([ROW, ROW | {"answer": "6"}]).encode("utf-16"),
    "rows.jsonl.gz": gzip.compress(f"{json.dumps(ROW)}\n{json.dumps(ROW | {'answer': '6'})}\n".encode()),
    "rows.csv": f'problem,answer,image\r\n"{QUESTION}",5,a.png\r\n"{QUESTION}",6,b.png\r\n'.encode(),
    "semicolons.csv": f"problem;answer;image\n{QUESTION};5;a.png\n{QUESTION};6;b.png\n".encode("utf-8-sig"),
    "rows.tsv": f"problem\tanswer\timage\n{QUESTION}\t5\ta.png\n{QUESTION}\t6\tb.png\n".encode("utf-16"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind(name, folder):
    (folder / name).write_bytes(FILES[name])
    examples = opened(folder / name)
    assert [example.answer for example in examples] == ["5", "6"]
    assert all(example.problem == QUESTION and len(example.images) == 1 for example in examples)


def test_one_object_is_one_row(folder):
    (folder / "one.json").write_text(json.dumps(ROW | {"choices": [{"label": "A", "text": "5"}]}, indent=1))
    assert [example.answer for example in opened(folder / "one.json")] == ["5"]


def test_splits_of_a_json_file(folder):
    (folder / "rows.json").write_text(json.dumps({"train": [ROW], "test": [ROW | {"answer": "6"}]}))
    assert opened(folder / "rows.json", split="test")[0].answer == "6"
    with pytest.raises(ValueError, match=r"data.split \(None\) must be one of train, test"):
        opened(folder / "rows.json")


BROKEN = {
    "cut.json": (b'[{"problem": "p",\n "answer": "1"},\n {"problem": ]', "line 3: not valid JSON"),
    "cut.jsonl": (b'{"problem": "p", "answer": "1"}\n{"problem": \n', "line 2: not valid JSON"),
    "texts.json": (b'["p", "q"]', "item 1: a JSON object is needed; this is str"),
    "columns.json": (b'{"problem": ["p"], "answer": ["1"]}', "it is an object of columns"),
    "pandas.json": (b'{"problem": {"0": "p"}, "answer": {"0": "1"}}', "it is an object of columns"),
    "latin.csv": ("problem,answer\nq,1\np\xe9,1\n".encode("latin-1"), "UTF-8 text; line 3"),
    "short.csv": (b"problem,answer\np,1\nq\n", "line 3: 1 cells for 2 columns"),
    "long.csv": (b"problem,answer\np, q,1\n", "line 2: 3 cells for 2 columns"),
    "quotes.csv": (b'problem,answer\n"p,1\n', "line 2: unexpected end of data"),
    "twice.csv": (b"problem,answer,answer\np,1,2\n", "two columns have one name"),
    "rows.xlsx": (b"PK", "must be a JSON, JSON lines, CSV, TSV, parquet or Arrow file; .xlsx files"),
    "empty.json": (b"[]", "has no rows left"),
    "rows.jsonl.gz": (b"no gzip", "must be a gzip file"),
    "rows.parquet": (b"no parquet", r"data.source \(.*rows.parquet\)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_names_the_line(name, tmp_path):
    data, sentence = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=sentence):
        opened(tmp_path / name)


def test_cells_of_a_table_are_as_they_were_written(tmp_path):
    (tmp_path / "t.csv").write_text(
        "problem,answer,level,code\np,None,1,007\nq,1.50,2,8\nr,,3,9\ns,null,,10\n"
    )
    examples = opened(tmp_path / "t.csv")
    assert [examples[index].answer for index in (0, 1)] == ["None", "1.50"]
    assert examples[0].columns == {"problem": "p", "answer": "None", "level": 1, "code": "007"}
    for index in (2, 3):
        with pytest.raises(RowError, match="field answer is empty"):
            examples[index]


def test_a_table_of_vlmevalkit(tmp_path):
    first, second = base64_png(0), base64_png(1)
    (tmp_path / "dice.tsv").write_text(
        "index\timage\tquestion\thint\tA\tB\tanswer\tcategory\n"
        f"10\t{first}\tWhich die?\tOne is red.\tred\tblue\tA\tcolour\n"
        f"11\t{second}\tWhich one?\t\tred\tblue\tB\tcolour\n"
        "12\t10\tWhich side?\tnan\tleft\tright\tB\tside\n"
    )
    examples = opened(tmp_path / "dice.tsv")
    assert examples.format.startswith("VLMEvalKit rows: problem from question, answer from answer")
    problems = ["One is red.\nWhich die?", "Which one?", "Which side?"]  # the options may follow
    assert [example.problem.partition("\nA. ")[0] for example in examples] == problems
    assert examples[2].images[0].tobytes() == numbered_image(0).tobytes()
    assert examples[1].images[0].tobytes() == numbered_image(1).tobytes()
    assert (examples[0].columns["A"], examples[0].columns["B"]) == ("red", "blue")


def test_whole_numbers_of_a_table_differ_from_text(tmp_path):
    (tmp_path / "t.tsv").write_text("question\tchoices\tanswer\np\t['a', 'b']\t0\nq\t['c', 'd']\t1\n")
    assert [example.columns["answer"] for example in opened(tmp_path / "t.tsv")] == [0, 1]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_an_image_folder_with_metadata(folder, kind):
    rows = {
        "jsonl": '{"file_name": "a.png", "problem": "p", "answer": "5"}\n{"file_name": "b.png", "problem": "q", "answer": "6"}\n',
        "csv": "file_name,problem,answer\na.png,p,5\nb.png,q,6\n",
    }
    (folder / f"metadata.{kind}").write_text(rows[kind])
    for source in (folder, folder / f"metadata.{kind}"):
        examples = opened(source)
        assert [example.answer for example in examples] == ["5", "6"]
        assert examples[1].images[0].tobytes() == numbered_image(1).tobytes()


def with_image(value) -> dict:
    return {"problem": "p", "answer": "1", "image": value}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_base64_without_a_header(folder, kind):
    buffer = io.BytesIO()
    numbered_image(size=(64, 48)).save(buffer, kind)
    text = base64.b64encode(buffer.getvalue()).decode()
    wrapped = base64.encodebytes(buffer.getvalue()).decode()
    web = base64.urlsafe_b64encode(buffer.getvalue()).decode().rstrip("=")
    for value in (text, wrapped, web, f"image/png;base64,{text}", {"bytes": text}, {"base64": text}, [text]):
        assert one(folder, with_image(value)).images[0].size == (64, 48)


@pytest.mark.parametrize(
    "value",
    [
        "a.png",
        "file://a.png",
        "sub\\c.png",
        ["a.png"],
        '["a.png"]',
        "['a.png']",
        {"path": "a.png"},
        {"bytes": None, "path": "a.png"},
        {"url": "a.png"},
        {"image_url": {"url": "a.png"}},
        {"type": "image", "image": "a.png"},
    ],
)
def test_a_path_in_every_wrapping(folder, value):
    (folder / "sub").mkdir()
    (folder / "sub/c.png").write_bytes(png())
    assert one(folder, with_image(value)).images[0].tobytes() == numbered_image().tobytes()


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("iVBORw0KGgo" + "A" * 300_000, "the base64 text cannot be read as an image"),
        (base64_png() + "A", "not valid base64|cannot be read"),
        ("Zm9vYmFy" * 40_000, "image 1: .*is no path of a file|does not exist"),
        ("http://host/" + "x" * 300_000, "is an address; download the image"),
        ("../" * 90_000 + "x.png", "leads out of|is no path"),
        ('["a.png", ', "does not exist"),
        ({"url": "https://host/a.png"}, "is an address; download the image"),
        ({"bytes": None, "path": None}, "is no image"),
    ],
)
def test_images_that_are_none_are_cut_to_a_line(folder, value, sentence):
    with pytest.raises(RowError, match=sentence) as error:
        one(folder, with_image(value))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_path_that_looks_like_base64_is_a_path(folder):
    name = "/".join(["iVBORw0KGgoAAAANSUhEUgAAAUAAAADw"] * 3)
    (folder / name).parent.mkdir(parents=True)
    (folder / f"{name}.png").write_bytes(png())
    assert one(folder, with_image(f"{name}.png")).images


def test_long_values_are_cut_in_every_message(folder):
    long = "x" * 1_000_000
    rows = [
        {"problem": "<image>", "answer": long, "id": long},
        {"problem": {"a": long}, "answer": "1"},
        {"problem": f"<img>{long}</img>", "answer": "1"},
        {"messages": [{"role": long, "content": "p"}], "answer": "1"},
        {"messages": user([{"type": long}]), "answer": "1"},
    ]
    for row in rows:
        with pytest.raises(RowError) as error:
            one(folder, row)
        assert len(str(error.value)) < 700


def test_recognition_looks_past_empty_values(folder):
    rows = lines(folder, {"messages": None, "solution": None}, LAYOUTS["ms-swift, messages"][0])
    assert rows.layout.problem == "messages" and rows[1].answer == "5"
    with pytest.raises(RowError, match="row 0 of .*field messages is empty"):
        rows[0]


def test_class_labels_are_read_by_name(folder):
    features = datasets.Features(
        question=datasets.Value("string"),
        label=datasets.ClassLabel(names=["cat", "dog"]),
        kind=datasets.ClassLabel(names=["x", "y"]),
    )
    rows = [{"question": "p", "label": 1, "kind": 1}, {"question": "q", "label": None, "kind": 0}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder / "set"))
    examples = opened(folder / "set", filter={"kind": 1})
    assert [example.answer for example in examples] == ["dog"]
    with pytest.raises(RowError, match="field answer is empty|field label is empty"):
        opened(folder / "set")[1]


def test_a_special_token_within_a_problem_stays_text(folder):
    problem = "What does <|im_start|>user begin?"
    assert one(folder, {"problem": problem, "answer": "a turn"}).problem == problem


def test_a_row_without_its_id_has_its_number(folder):
    rows = lines(folder, *({"id": n, "problem": "p", "answer": "1"} for n in ("x", None, "", 0)))
    assert [example.id for example in rows] == ["x", "1", "2", "0"]


@pytest.mark.parametrize(
    "turn",
    [
        {"content": PLAIN, "images": ["a.png"]},
        {"content": PLAIN, "image": "a.png"},
        {"content": [{"type": "text", "text": PLAIN, "image": "a.png"}]},
        {"content": [{"text": PLAIN, "image": "a.png"}]},
    ],
)
def test_images_of_a_turn_without_a_place_are_refused(folder, turn):
    with pytest.raises(RowError, match="image.*data.transform"):
        one(folder, {"messages": [{"role": "user"} | turn, REPLY]})


def test_numbered_images_beside_an_image_are_refused(folder):
    row = {"question": PLAIN, "answer": "5", "image": "a.png", "image_2": "b.png"}
    with pytest.raises(ValueError, match="data.columns.images.*image_2"):
        one(folder, row)
    assert len(one(folder, row, columns={"images": "image"}).images) == 1
    assert len(one(folder, row | {"image_2": None}).images) == 1


@pytest.mark.parametrize(("answer", "gold"), [(1, "B"), ("1", "B"), ("B", "B"), ("blue", "blue")])
def test_columns_that_are_named_options_are_options_whatever_the_answer(folder, answer, gold):
    row = {"question": "Which?", "option_a": "red", "option_b": "blue", "answer": answer}
    example = one(folder, row)
    assert (example.problem, example.answer) == ("Which?\nA. red\nB. blue", gold)
    bare = one(folder, {"question": "Which?", "A": "red", "B": "blue", "answer": 1})
    assert (bare.problem, bare.answer) == ("Which?", "1")
