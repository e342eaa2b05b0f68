"""How tools are offered, called and answered, in the templates of real models where they are at hand."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tests.conftest import FAMILIES, SHARED, example
from vlm_sapo.environments.tools import BUILTIN, Tool
from vlm_sapo.models.encode import Encoder
from vlm_sapo.models.families import FAMILIES as TABLE
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.models.tool_chat import ToolChat, schema_of, tool_chat

OWN = "tests/environments/own_tools.py"
ALL = [Tool.of(name) for name in BUILTIN]
XML = """\
{%- if tools %}{{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{% else %}
{%- for part in message.content %}{{- part.text if part.type == 'text' else '<|image_pad|>' }}{% endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}<tool_call>
<function={{ call.function.name }}>
</function>
</tool_call>{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def test_the_schema_tells_kinds_defaults_and_coordinates():
    schema = schema_of(Tool.of("zoom"), "thousand")["function"]
    assert schema["name"] == "zoom" and "enlarged" in schema["description"]
    image, box = (schema["parameters"]["properties"][key] for key in ("image", "box"))
    assert image["type"] == "integer" and "1 is the first and the default" in image["description"]
    assert box["type"] == "array" and box["items"] == {"type": "number"}
    assert "[left, top, right, bottom], each from 0 to 1000" in box["description"]
    assert schema["parameters"]["required"] == ["box"]
    assert "[top, left, bottom, right]" in str(schema_of(Tool.of("zoom"), "thousand_yx"))
    assert "in pixels of the image as you see it" in str(schema_of(Tool.of("measure"), "resized"))
    own = schema_of(Tool.of(f"{OWN}:brightness"), "unit")["function"]["parameters"]
    assert own["properties"]["scale"]["default"] == 1.0
    assert own["properties"]["scale"]["type"] == "number" and not own.get("required")


@pytest.mark.parametrize("name", ["undescribed", "strange"])
def test_a_function_that_a_model_cannot_read_is_refused(name):
    with pytest.raises(ValueError, match=rf"tools \({name}\) needs a description of each parameter"):
        schema_of(Tool.of(f"{OWN}:{name}"), "thousand")


def real(name):
    folder = SHARED / "processors" / name
    if not folder.is_dir():
        pytest.skip("no real processors at ../shared/processors")
    return AutoProcessor.from_pretrained(folder)


def test_qwen3_vl_offers_tools_itself():
    processor = real("Qwen3-VL-2B-Instruct")
    chat = tool_chat(processor, ALL, "thousand", form="auto", hermes=False)
    assert chat.native and chat.syntax == "json"
    user = {"role": "user", "content": [{"type": "text", "text": "Look."}]}
    text = processor.apply_chat_template(chat.conversation([user]), tokenize=False, **chat.arguments)
    assert text.count("\n</tools>") == 1 and all(f'"{name}"' in text for name in BUILTIN)
    contents = [[{"type": "image"}, {"type": "text", "text": "a part"}], [{"type": "text", "text": "7"}]]
    answers = processor.apply_chat_template([user, *chat.results(contents)], tokenize=False)
    assert answers.endswith(
        "<|im_start|>user\n<tool_response>\n<|vision_start|><|image_pad|><|vision_end|>a part\n"
        "</tool_response>\n<tool_response>\n7\n</tool_response><|im_end|>\n"
    )


def test_qwen2_5_vl_gets_them_in_the_system_message():
    processor = real("Qwen2.5-VL-7B-Instruct")
    with pytest.raises(ValueError, match="rollout.environment.format must be hermes for this model"):
        tool_chat(processor, ALL, "resized", form="auto", hermes=False)
    assert TABLE["qwen2_5_vl"].hermes
    chat = tool_chat(processor, ALL, "resized", form="auto", hermes=True)
    assert not chat.native and chat.arguments == {}
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": [{"type": "text", "text": "Look."}]}
    text = processor.apply_chat_template(chat.conversation([system, user]), tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can use tools.")
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"]["name"] for line in lines] == list(BUILTIN)
    answers = processor.apply_chat_template([user, *chat.results([[{"type": "image"}], []])], tokenize=False)
    assert (
        "<tool_response>\n<|vision_start|><|image_pad|><|vision_end|>\n</tool_response>\n<tool_response>\n"
        in answers
    )


def test_the_form_of_calls_is_read_from_the_template(model_folder):
    processor = AutoProcessor.from_pretrained(model_folder())
    processor.chat_template = XML
    assert tool_chat(processor, ALL[:1], "thousand", form="auto", hermes=False).syntax == "xml"
    processor.chat_template = XML.replace("<function=", "<call ")
    with pytest.raises(ValueError, match="writes tool calls in a way that is not known here"):
        tool_chat(processor, ALL[:1], "thousand", form="template", hermes=True)
    chat = tool_chat(processor, ALL[:1], "thousand", form="hermes", hermes=False)
    assert not chat.native and chat.syntax == "json"


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_what_the_template_writes_between_two_turns(name, model_folder):
    """Ids of text, images and positions are those of the whole conversation, cut behind the turn's end."""
    vlm = load_vlm(str(model_folder(name)))
    chat = ToolChat((schema_of(Tool.of("zoom"), vlm.family.coordinates),), native=False)
    encode = Encoder(vlm, tools=chat)
    prompt = encode(example(1, images=1))
    assert '"name": "zoom"' in prompt.text
    images = [Image.new("RGB", (60, 90), (9, 9, 200)), Image.new("L", (200, 40))]
    answer = encode.answer([("one <|im_end|>", images[:1]), ("<image> two", images[1:])], to_calls=True)
    [inputs] = answer.images
    assert len(inputs.images) == 2 and all(image.mode == "RGB" for image in inputs.images)
    text = vlm.tokenizer.decode(answer.ids)
    assert text.index("one") < text.index("two") and text.count("<tool_response>") == 2
    end = vlm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    inside = answer.ids[: (answer.ids == vlm.model.config.image_token_id).nonzero()[-1, 0]]
    assert end == vlm.tokenizer.unk_token_id or end is None or not (inside == end).any()
    tokens = sum(vlm.family.image_tokens(vlm.model.config, inputs.grid))
    assert int((answer.ids == vlm.model.config.image_token_id).sum()) == tokens
    assert answer.positions.shape == (3, len(answer.ids)) and int(answer.positions.min()) == 0
    assert torch.equal(encode.answer([("more", ())]).ids, Encoder(vlm).answer([("more", ())]).ids)
