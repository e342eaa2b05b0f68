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
    {"types", "plugins", "distributed"},
    {"config"},
    {"models", "rewards"},
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


def test_nothing_grows_too_long():
    lengths = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths.append(node.end_lineno - node.lineno + 1)
                assert lengths[-1] <= 80, f"{path}: {node.name}"
    assert sorted(lengths)[len(lengths) // 2] <= 14
    assert len((PACKAGE / "training/trainer.py").read_text().splitlines()) <= 150


@pytest.mark.parametrize("module", ["vlm_sapo", "vlm_sapo.cli", "vlm_sapo.config.load"])
def test_the_command_line_starts_without_heavy_imports(module):
    heavy = "{'torch', 'transformers', 'datasets', 'matplotlib'}"
    code = f"import sys, {module}; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
