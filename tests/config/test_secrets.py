"""Secrets, unsafe addresses, pickled weights and remote code are rejected; verifiers have no network."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, numbered_image
from vlm_sapo.cli import main
from vlm_sapo.config.data import SourceConfig
from vlm_sapo.config.schema import RewardPartConfig
from vlm_sapo.config.secrets import check_address, check_secrets, mask_secrets, mask_values
from vlm_sapo.models.loading import load_vlm
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.types import Example, ResponseText

NETWORK = """
import socket
import subprocess
import sys

def connects(response, example, *, port):
    with socket.socket() as line:
        line.settimeout(2)
        return float(line.connect_ex(("127.0.0.1", port)) == 0)
"""


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("file:///etc/passwd", "must be an address such as"),
        ("ftp://example.org", "must be an address such as"),
        ("localhost:8000", "must be an address such as"),
        ("http://", "must be an address such as"),
        ("http://me:word@example.org/v1", "must not include a user name or password.*example.org"),
        ("http://169.254.169.254/v1", "is link-local"),
        ("http://[fe80::1]/v1", "is link-local"),
        ("http://2852039166/", "is link-local"),
        ("http://0xa9fea9fe/", "is link-local"),
        ("http://169.254.43518/", "is link-local"),
        ("http://[::ffff:169.254.169.254]/", "is link-local"),
        ("http://example.org/v1?api_key=word", "without . or #.*example.org"),
    ],
)
def test_unsafe_addresses_are_rejected(address, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        check_address(address, "args.url")
    assert "word" not in str(raised.value).replace("password", "")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000/v1", "https://example.org", "http://[::1]:8000"])
def test_server_addresses_are_accepted(address):
    check_address(address, "args.url")


@pytest.mark.parametrize(
    "name",
    [
        *("api_key", "API_KEY", "apikey", "openai_api_key", "password", "client_secret", "x-api-key", "pwd"),
        *("hf_token", "accessToken", "Authorization", "bearer", "private_key", "auth"),
    ],
)
def test_arguments_named_like_secrets_are_rejected(name):
    with pytest.raises(ValueError, match=f"args.{name} looks like a secret.*environment variable") as raised:
        RewardPartConfig(name="math", args={name: "sk-123"})
    assert "sk-123" not in str(raised.value).partition("[type=")[0]
    with pytest.raises(ValueError, match=f"args.headers.0.{name}"):
        check_secrets({"headers": [{name: "sk-123"}]}, "args")


def test_values_that_look_like_secrets_are_rejected():
    for args in (
        {"token": "abcdefghijklmnop1"},
        {"anything": "sk-abcdefgh12"},
        {"x": {"y": "hf_abcdefghijk"}},
        {"header": "Bearer hf_" + "a1" * 12},
        {"more": ["hf_" + "a1" * 12]},
        {"url": "https://example.org/rows?t=hf_" + "a1" * 12},
    ):
        with pytest.raises(ValueError, match="looks like a secret"):
            SourceConfig(source="mine.py:rows", args=args)
    assert SourceConfig(source="mine.py:rows", args={"token": "<answer>", "sort_key": "area", "keys": "a"})


def test_secrets_within_a_command_or_a_config_are_masked():
    token = "hf_" + "a1" * 12
    assert token not in " ".join(mask_secrets(["train", f"data.args={{header: 'Bearer {token}'}}"]))
    assert token not in str(mask_values({"args": {"header": f"Bearer {token}", "more": [f"x={token}"]}}))


def test_the_name_of_an_environment_variable_is_accepted():
    part = RewardPartConfig(
        name="judge", args={"key_variable": "MY_KEY", "url": "http://127.0.0.1:1/v1", "key": 3}
    )
    assert part.args["key_variable"] == "MY_KEY"


def network_of(pid: int | str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def children(pid: int) -> list[int]:
    """All processes below one."""
    own = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [child for number in map(int, own) for child in (number, *children(number))]


def can_leave() -> bool:
    code = "from vlm_sapo.rewards.pool import leave_network; print(leave_network())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stdout.strip() == "True"


def test_builtin_verifiers_run_without_network_and_own_functions_with_it(tmp_path):
    if not can_leave():
        pytest.skip("this system lets no process leave the network")
    (tmp_path / "reward.py").write_text(NETWORK)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(5)
        part = {"name": f"{tmp_path}/reward.py:connects", "args": {"port": server.getsockname()[1]}}
        item = (ResponseText("\\boxed{1}"), Example("e", "p", "1"))
        for specs, isolated in (([part], False), ([{"name": "math"}], True)):
            reward = RewardPool(specs, workers=1)
            assert reward.isolated == isolated
            assert reward([item])[0].total == 1.0
            assert any(network_of(pid) != network_of("self") for pid in children(os.getpid())) == isolated
            reward.close()


def test_pickled_weights_are_rejected(model_folder, tmp_path):
    source = model_folder()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(source / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="model.path"):
        load_vlm(str(tmp_path))


def test_code_in_a_model_folder_is_not_executed(model_folder, tmp_path):
    for file in model_folder().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    touched = tmp_path / "touched"
    code = f"from pathlib import Path\nPath({str(touched)!r}).touch()\n"
    (tmp_path / "evil.py").write_text(code)
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        path = tmp_path / name
        if path.is_file():
            kinds = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
            values = json.loads(path.read_text()) | {"auto_map": dict.fromkeys(kinds, "evil.Evil")}
            path.write_text(json.dumps(values))
    try:
        load_vlm(str(tmp_path))
    except ValueError as error:
        assert "evil" in str(error) or "trust" in str(error)
    assert not touched.exists()


def test_output_files_are_not_writable_by_other_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    numbered_image().save(tmp_path / "p.png")
    row = {"problem": "p", "answer": "1", "response": "\\boxed{1}", "image": "p.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("sys.argv", ["vlm-sapo", "score", "rows.jsonl", "--out", "out/scored.jsonl"])
    before = os.umask(0)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        os.umask(before)
    assert not ended.value.code
    made = [tmp_path / "out", tmp_path / "out/scored.jsonl"]
    assert all(path.stat().st_mode & 0o002 == 0 for path in made if path.exists()) and made[1].exists()
