"""Limits of the whole code base: layers, sizes, light start."""

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "vlm_sapo"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [
    {"algo"},
    {"types", "plugins", "distributed", "search_path", "hub", "fingerprint"},
    {"config"},
    {"models", "rewards", "environments"},
    {"data", "reporting"},
    {"rollout"},
    {"evaluation"},
    {"training"},
    {"tools"},
    {"api"},
    {"cli"},
]
"""Folders and modules of the package; each may import those on its own line and above it."""
OWNERS = {
    "transformers": ("models", "rollout/hf.py", "tools/new_model.py", "tools/plan/simulate.py", "api.py"),
    "vllm": ("rollout/vllm", "rollout/weight_transfer.py"),
    "matplotlib": ("reporting",),
}


def layer(module: str) -> int | None:
    """Position of `vlm_sapo.<...>` in LAYERS, or None for the package itself."""
    name = module.removeprefix("vlm_sapo").strip(".").partition(".")[0]
    return next((index for index, members in enumerate(LAYERS) if name in members), None)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = "vlm_sapo." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for name in imports(path):
        if name.startswith("vlm_sapo.") and layer(name) is not None and layer(own) is not None:
            assert layer(name) <= layer(own), f"{own} imports {name}"
        owners = OWNERS.get(name.partition(".")[0])
        assert owners is None or str(path.relative_to(PACKAGE)).startswith(owners), f"{own} imports {name}"


def test_algo_is_pure():
    for path in (PACKAGE / "algo").glob("*.py"):
        assert all(
            not name.startswith("vlm_sapo") or name.startswith("vlm_sapo.algo") for name in imports(path)
        )


def folder(module: str) -> str:
    """The folder, or the module at the top, that `vlm_sapo.<...>` is in."""
    return module.removeprefix("vlm_sapo").strip(".").partition(".")[0]


def test_folders_have_no_cycle():
    """Folders of one layer may import each other in one direction alone."""
    arrows = {
        (path.relative_to(PACKAGE).with_suffix("").parts[0], folder(name))
        for path in FILES
        for name in imports(path)
        if name.startswith("vlm_sapo.")
    }
    both = {(one, other) for one, other in arrows if one < other and (other, one) in arrows}
    assert not both


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_stay_small():
    lengths = []
    for path in FILES:
        for node in functions(path):
            lengths.append(node.end_lineno - node.lineno + 1)
            assert lengths[-1] <= 80, f"{path}: {node.name}"
    assert sorted(lengths)[len(lengths) // 2] <= 10
    assert len((PACKAGE / "training/trainer.py").read_text().splitlines()) <= 100


INTERFACES = {
    "prefix_attention": "transformers' attention interface",
    "vision_attention": "transformers' attention interface",
    "box": "its parameters are a config's args, of which it builds a dataclass",
    "judge": "its parameters are a config's args, of which it builds a dataclass",
    "score": "the options of a command, of which it builds a dataclass",
}
"""Functions with more than seven parameters, and why."""


def test_functions_have_at_most_seven_parameters():
    for path in FILES:
        for node in functions(path):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([argument for argument in arguments if argument.arg not in ("self", "cls")])
            assert count <= 7 or node.name in INTERFACES, f"{path}: {node.name}"


def test_modules_import_at_most_twenty_others():
    for path in FILES:
        others = {
            node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm_sapo")
        }
        assert len(others) <= 20, f"{path} imports {len(others)} modules of this package"


def test_no_function_branches_too_often():
    limit = "lint.mccabe.max-complexity=15"
    command = [sys.executable, "-m", "ruff", "check", "--select", "C901", "--config", limit, str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


VAGUE = {
    *("found", "told", "settle", "settled", "place", "places", "given", "held", "wanted", "drawn", "draw"),
    *("kept", "chosen", "made", "picture", "pictures"),
}
"""Words that say nothing of the thing they name, or a word beside the field's own."""
STORED = {"vlm_sapo/rewards/verifiers/judge.py": {"given"}}
"""Names that stand in users' files: `{given}` in the prompt of a judge."""


def identifiers(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_are_the_fields_words(path):
    """docs/decisions.md, "Names"."""
    stored = STORED.get(str(path.relative_to(ROOT)), set())
    vague = VAGUE & set(identifiers(ast.parse(path.read_text()))) - stored
    assert not vague, f"{path}: {', '.join(sorted(vague))}"


@pytest.mark.parametrize("module", ["vlm_sapo", "vlm_sapo.cli", "vlm_sapo.config.load"])
def test_the_command_line_starts_without_heavy_imports(module):
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib'}"
    code = f"import sys, {module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
