"""The commands, configs and code of the documents work as they stand."""

import ast
import re
import shlex
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import dropwhile
from math import prod

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from docs.build import config_page, names_page
from tests.conftest import ROOT, example
from vlm_sapo.cli import app
from vlm_sapo.config import load as configfile
from vlm_sapo.config import schema as cfg
from vlm_sapo.evaluation.benchmarks import read_definition
from vlm_sapo.plugins import resolve
from vlm_sapo.rewards import verifiers
from vlm_sapo.rewards.pool import RewardPool
from vlm_sapo.rewards.trl import TrlReward, has_trl_signature
from vlm_sapo.rewards.verifiers.answers import Ungraded
from vlm_sapo.rewards.verifiers.table import VERIFIERS
from vlm_sapo.types import ResponseText

DOCUMENTS = [
    ROOT / "README.md",
    *(
        path
        for name in ("configs", "data", "eval", "docs", "docs/examples")
        for path in (ROOT / name).glob("*.md")
    ),
]


def blocks(language: str) -> list[str]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [block for path in DOCUMENTS for block in pattern.findall(path.read_text())]


SECTIONS = "run|model|data|rollout|reward|algo|train|eval|checkpoint|alarms|log|hub"
FIELD = re.compile(rf"`((?:{SECTIONS})(?:\.[a-z_]+)+)[`=]")
OTHERS = {"rollout.name", "data.columns.response", "model.language_model", "model.visual"}
"""Names in the documents that are no fields: another trainer's, a column, and parts of a model."""
LINES = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
LAUNCHERS = {"torchrun": get_args_parser, "accelerate": launch_command_parser}
COMMANDS = [line for line in LINES if line and not line.startswith("#")]
LOOP = re.compile(r"for GPU in [\d ]+; do (.*) & done")
COUNTS = ("--nnodes", "--nproc-per-node", "--num_processes")
"""Options of launchers whose product is the number of processes."""


@cache
def help_of(verb: str) -> str:
    return CliRunner().invoke(app, [verb, "--help"]).output


def words_of(command: str) -> list[str]:
    """A line's words without a loop over GPUs and without variables before the program."""
    loop = LOOP.fullmatch(command)
    words = shlex.split(loop.group(1) if loop else command)
    return list(dropwhile(re.compile(r"[A-Z_]+=").match, words))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_valid(command, monkeypatch):
    """make targets and scripts' options exist; configs load with the documented overrides, and fit the number
    of processes."""
    program, verb, *rest = words = words_of(command)
    processes = None
    if program in LAUNCHERS:
        monkeypatch.setattr(sys, "argv", words[:1])  # accelerate's help depends on it
        start = words.index("vlm_sapo")
        help_text = LAUNCHERS[program]().format_help()
        options = [word for word in words[:start] if word.startswith("--")]
        assert all(option in help_text for option in options)
        processes = prod(int(words[words.index(option) + 1]) for option in COUNTS if option in options)
        program, verb, *rest = "vlm-sapo", *words[start + 1 :]
    if program == "make":
        result = subprocess.run(["make", "-n", verb], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return
    if program == "python":
        help_text = subprocess.run(
            [sys.executable, verb, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert all(option in help_text for option in rest if option.startswith("--"))
        return
    assert program == "vlm-sapo"
    options = {word for word in rest if word.startswith("--") and " " not in word}
    assert all(option in help_of(verb) for option in options)
    if verb in ("train", "sft", "doctor", "filter", "check", "serve", "plan"):
        kind = cfg.SftConfig if verb == "sft" else cfg.TrainConfig
        positional = rest[: next((i for i, word in enumerate(rest) if word in options), len(rest))]
        config = configfile.load(kind, positional[0], positional[1:])
        if processes:
            configfile.check_processes(config, processes)
    for option in {"--benchmark", "--against"} & options:
        for name in rest[rest.index(option) + 1].split(","):
            read_definition(name.partition("=")[0])  # a file of the reader's own


def test_fragments_of_configs_are_valid(tmp_path):
    base = {"model": {"path": "m"}, "data": {"source": "d"}}
    base |= {"reward": {"parts": [{"name": "math"}]}, "train": {"steps": 1}}
    for number, fragment in enumerate(blocks("yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(base | yaml.safe_load(fragment)))  # a fragment's sections replace ours
        configfile.load(cfg.TrainConfig, str(path))


def test_the_readmes_reward_works(tmp_path, monkeypatch):
    [code] = [block for block in blocks("python") if "my_reward.py" in block]
    assert len(code.split("def area")[1].splitlines()) < 10
    (tmp_path / "my_reward.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    texts = [r"\boxed{2304}", r"\boxed{2400}", "no idea", r"\boxed{many}"]
    with closing(RewardPool([{"name": "my_reward.py:area", "args": {"tolerance": 0.1}}])) as reward:
        right, near, *wrong = (
            score.total for score in reward([(ResponseText(text), example()) for text in texts])
        )
    assert right == 1.0 and 0 < near < 1 and wrong == [0.0, 0.0]


def test_the_carried_over_reward_works(tmp_path, monkeypatch):
    [code] = [block for block in blocks("python") if "# my_rewards.py" in block]
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    function = resolve("my_rewards.py:my_reward", field="reward")
    assert has_trl_signature(function)
    row = replace(example(), answer="7", columns={"answer": "7"})
    responses = [ResponseText(text) for text in ("it is 7", "it is 8")]
    assert TrlReward(function)(responses, [row, row]) == [1.0, 0.0]


def test_a_verifier_in_a_reward_of_ones_own(tmp_path, monkeypatch):
    """Every built-in one is importable by its name."""
    assert {name: vars(verifiers)[name] for name in VERIFIERS} == VERIFIERS
    [code] = [block for block in blocks("python") if "concise.py" in block]
    (tmp_path / "concise.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    texts = [(r"\boxed{2}", 9), (r"\boxed{2}", 999), (r"\boxed{3}", 9), ("none", 9)]
    with closing(RewardPool([{"name": "concise.py:concise"}], workers=1)) as reward:
        scores = reward([(ResponseText(text, tokens=tokens), example()) for text, tokens in texts])
    assert [score.total for score in scores] == pytest.approx([1.0, 0.9, 0.0, 0.0])
    assert [score.outcomes["concise"] for score in scores] == ["graded"] * 3 + ["no_answer"]


def test_the_cases_of_the_verifiers():
    rows = re.findall(
        r"^\| (\w+) \| `(.+?)` \| `(.+?)` \| (\S+) \|$", (ROOT / "docs/rewards.md").read_text(), re.M
    )
    assert len(rows) > 15
    for name, gold, answer, wanted in rows:
        row = replace(
            example(), answer=gold, columns={"choices": ["red", "green", "blue"]} if name == "choice" else {}
        )
        try:
            found = VERIFIERS[name](ResponseText(rf"\boxed{{{answer}}}"), row)
        except Ungraded as error:
            found = error.outcome
        assert str(found) == wanted or float(found) == float(wanted), (name, gold, answer)


def test_the_sites_menu_has_every_page():
    named = set(re.findall(r"[\w/.-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert {str(path.relative_to(ROOT)) for path in DOCUMENTS} <= named


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_the_page_of_fields_is_that_of_the_classes():
    """`python docs/build.py` writes it anew."""
    assert (ROOT / "docs/config.md").read_text() == config_page()
    names = (ROOT / "docs/coming-from.md").read_text()
    assert names == names_page(names)


def test_fields_that_the_documents_name_exist():
    known = set(re.findall(r"^\| `([a-z_.]+)`", (ROOT / "docs/config.md").read_text(), re.MULTILINE))
    sections = {name.rsplit(".", count)[0] for name in known for count in (1, 2)}
    for path in DOCUMENTS:
        for name in FIELD.findall(path.read_text()):
            assert name.endswith(".yaml") or name in known | sections | OTHERS, f"{path}: {name}"


def test_shipped_configs_that_the_documents_name_exist():
    for path in DOCUMENTS:
        for name in re.findall(r"`(\w+_\dx\w+gb)`", path.read_text()):
            assert (ROOT / f"configs/{name}.yaml").is_file(), f"{path}: {name}"


def test_links_of_the_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert "://" in target or (path.parent / target).exists(), f"{path}: {target}"


SENTENCES = re.compile(r"\"([^\"\n]{12,})\"")
"""What the package prints, quoted in docs/cluster.md with `...` for what differs."""


def printed_texts() -> str:
    """All texts of the package's code, with an ellipsis for the values in them."""
    texts = []
    for path in sorted((ROOT / "vlm_sapo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (item.value if isinstance(item, ast.Constant) else "..." for item in node.values)
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_sentences_that_the_cluster_page_quotes_are_printed():
    page, texts = (ROOT / "docs/cluster.md").read_text(), printed_texts()
    table = "\n".join(line for line in page.splitlines() if line.startswith("| "))
    quotes = SENTENCES.findall(table)
    assert len(quotes) > 12
    for quote in quotes:
        for fragment in quote.split("..."):
            assert fragment.strip() in texts, f"{quote}: {fragment}"


STUBS = """\
scontrol() { printf 'node%s\\n' 1 2 3 4; }
srun() { while [ "${1#-}" != "$1" ]; do shift; done; SLURM_NODEID=0 "$@"; }
torchrun() { echo torchrun "${@@Q}"; }
vlm-sapo() { echo vlm-sapo "${@@Q}"; }
export -f torchrun vlm-sapo
SLURM_JOB_NODELIST=node[1-4] SLURM_NNODES=4
"""
"""What a Slurm script calls, printing its words."""


@pytest.mark.parametrize("script", [block for block in blocks("sh") if "#SBATCH" in block])
def test_slurm_scripts_start_what_they_say(script, monkeypatch):
    """With Slurm's programs replaced: the commands that would run are valid."""
    result = subprocess.run(
        ["bash", "-euc", STUBS + script], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    commands = result.stdout.splitlines()
    assert any(command.startswith("torchrun") for command in commands)
    for command in commands:
        test_commands_are_valid(command, monkeypatch)
