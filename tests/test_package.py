"""What a user installs: extras, versions, the Dockerfile and the installing commands of the Makefile."""

import json
import re
import subprocess
import tomllib
from importlib.metadata import version

import pytest
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from docs.build import PURPOSES, install_page
from tests.conftest import ROOT
from vlm_sapo.cli import app

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def test_the_versions_are_those_of_the_installed_packages():
    lines = CliRunner().invoke(app, ["--version"]).output.splitlines()
    assert [line.split()[0] for line in lines] == ["vlm-sapo", "python", "torch", "transformers", "vllm"]
    assert lines[2] == f"torch {version('torch')}" and lines[3] == f"transformers {version('transformers')}"


def test_the_page_of_installing_is_that_of_pyproject_and_the_recorded_versions():
    """`python docs/build.py` writes its tables anew."""
    text = (ROOT / "docs/install.md").read_text()
    assert text == install_page(text) and PURPOSES.keys() == EXTRAS.keys()
    assert all(f"| `{name}` |" in text for name in EXTRAS)


def test_recorded_versions_are_allowed():
    bounds = {"python": PYPROJECT["project"]["requires-python"]}
    for text in [*PYPROJECT["project"]["dependencies"], *EXTRAS["vllm"]]:
        name, bound = re.match(r"([\w-]+)(?:\[.*\])?(.*)", text).groups()
        bounds[name] = bound
    rows = json.loads((ROOT / "docs/versions.json").read_text())
    assert rows
    for row in rows:
        for name in ("python", "torch", "transformers", "vllm"):
            assert row[name] == "not installed" or SpecifierSet(bounds[name]).contains(row[name]), row


@pytest.mark.parametrize("path", ["README.md", "Makefile", "Dockerfile", "docs", "vlm_sapo", "configs"])
def test_extras_that_are_named_exist(path):
    files = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / path).rglob("*"))
    for file in files:
        if file.suffix not in (".md", ".py", ".yaml", "") or not file.is_file():
            continue
        text = file.read_text()
        found = re.findall(r"(?:vlm-sapo|-e '?\.|--editable '?\.)\[([a-z0-9_,]+)\]", text)
        names = {name for group in found for name in group.split(",")}
        names |= set(re.findall(r"--extra (\w+)", text))
        assert names <= EXTRAS.keys(), f"{file}: {names - EXTRAS.keys()}"


def test_the_dockerfile_copies_what_the_package_is_built_from():
    copied = [
        name for line in re.findall(r"^COPY (.*)", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]
    ]
    assert all((ROOT / name).exists() for name in copied)
    build = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]}
    assert needed | {*build["packages"], *build["force-include"]} == {*copied}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == {*copied} and "*" in ignored


def test_the_image_has_vllm_and_a_user_without_rights():
    assert "--extra vllm" in DOCKERFILE
    assert re.findall(r"^USER (.*)", DOCKERFILE, re.MULTILINE)[-1] not in ("root", "0")
    assert re.search(r'^ENTRYPOINT \["vlm-sapo"\]$', DOCKERFILE, re.MULTILINE)
    home = re.search(r"HF_HOME=(\S+)", DOCKERFILE)[1]
    assert home.startswith(re.search(r"^VOLUME (\S+)", DOCKERFILE, re.MULTILINE)[1])


def test_make_passes_the_build_of_torch_on_and_says_what_it_does():
    def commands(**variables):
        words = ["make", "-n", "-B", "setup", *(f"{name}={value}" for name, value in variables.items())]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    plain = commands(CI="")
    assert "--torch-backend" not in plain and "3.2 GB" in plain
    assert not re.search(r"uv pip install.*--quiet", plain)
    assert re.search(r"uv pip install.*--torch-backend cpu .*--editable", commands(TORCH="cpu", CI=""))
    assert re.search(r"uv pip install --quiet", commands(CI="true"))
