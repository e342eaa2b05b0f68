"""What this package uses of another one, and what the sources of a version of that have: read, not imported."""

from __future__ import annotations

import ast
import json
import platform
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs/versions.json"

DEFINITION = re.compile(r"^(?:class|def|async def) (\w+)|^(\w+)\s*[:=]", re.M)


@dataclass(frozen=True)
class Use:
    """A name of another package that a file of this one imports, and a call of it."""

    module: str
    name: str
    where: str
    positional: int = 0
    keywords: frozenset[str] = frozenset()
    called: bool = False


def uses(package: str) -> list[Use]:
    """All imports of a package's names in vlm_sapo, and all calls of them by name."""
    found = []
    for path in sorted((ROOT / "vlm_sapo").rglob("*.py")):
        tree, names = ast.parse(path.read_text()), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
                names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        where = str(path.relative_to(ROOT))
        found += [Use(module, name, where) for module, name in names.values()]
        found += [
            Use(*names[call.func.id], where, len(call.args), keywords_of(call), called=True)
            for call in ast.walk(tree)
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id in names
            and not any(isinstance(argument, ast.Starred) for argument in call.args)
        ]
    return found


def keywords_of(call: ast.Call) -> frozenset[str]:
    return frozenset(keyword.arg for keyword in call.keywords if keyword.arg)


class Sources:
    """The Python files of one version of a package, by path."""

    def __init__(self, paths: list[str], read: Callable[[str], str]):
        self.paths, self.read = sorted(path for path in paths if path.endswith(".py")), read
        self.texts: dict[str, str] = {}
        self.names: dict[str, dict[str, dict[str, None]]] = {}

    @classmethod
    def of_wheel(cls, path: Path) -> Sources:
        archive = zipfile.ZipFile(path)
        return cls(archive.namelist(), lambda name: archive.read(name).decode())

    @classmethod
    def of_folder(cls, folder: Path, package: str) -> Sources:
        """A package in a folder such as site-packages or an unpacked wheel."""
        paths = [str(path.relative_to(folder)) for path in (folder / package).rglob("*.py")]
        return cls(paths, lambda name: (folder / name).read_text())

    def text(self, path: str) -> str:
        if path not in self.texts:
            self.texts[path] = self.read(path)
        return self.texts[path]

    def has_module(self, name: str) -> bool:
        path = name.replace(".", "/")
        return f"{path}.py" in self.paths or f"{path}/__init__.py" in self.paths

    def definitions(self, module: str, name: str) -> list[ast.stmt]:
        """The statements at the top level of a module's file that define a name, or import it; of a package's
        other files those that define it, since many pass names on in ways of their own."""
        path = module.replace(".", "/")
        paths = [own for own in (f"{path}.py", f"{path}/__init__.py") if own in self.paths]
        if f"{path}.py" not in paths:
            paths += [other for other in self._files_of(f"{path}/", name) if other not in paths]
        return [node for path in paths for node in ast.parse(self.text(path)).body if name in defined(node)]

    def _files_of(self, folder: str, name: str) -> list[str]:
        """Files below a folder that may define a name."""
        if folder not in self.names:
            self.names[folder] = {}
            for path in self.paths:
                for match in DEFINITION.finditer(self.text(path) if path.startswith(folder) else ""):
                    self.names[folder].setdefault(match[1] or match[2], {})[path] = None
        return list(self.names[folder].get(name, {}))

    def signatures(self, module: str, name: str) -> list[ast.arguments]:
        """The arguments of a function, or of a class's own `__init__`, as often as it is defined."""
        return [
            function.args
            for node in self.definitions(module, name)
            for function in (functions(node, "__init__") if isinstance(node, ast.ClassDef) else [node])
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        ]

    def methods(self, module: str, owner: str, name: str) -> list[ast.arguments]:
        """The arguments of a class's own method."""
        return [
            function.args
            for node in self.definitions(module, owner)
            if isinstance(node, ast.ClassDef)
            for function in functions(node, name)
        ]


def defined(node: ast.stmt) -> set[str]:
    """Names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.If | ast.Try):
        return {name for inner in (*node.body, *node.orelse) for name in defined(inner)}
    return (
        {node.target.id} if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else set()
    )


def functions(node: ast.ClassDef, name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.name == name:
            yield item


def fits(arguments: ast.arguments, positional: int, keywords: frozenset[str]) -> bool:
    """Whether a function with these arguments can be called so; `self` is not counted."""
    before = [
        item.arg for item in (*arguments.posonlyargs, *arguments.args) if item.arg not in ("self", "cls")
    ]
    named = {*before[positional:], *(item.arg for item in arguments.kwonlyargs)}
    return (arguments.vararg is not None or positional <= len(before)) and (
        arguments.kwarg is not None or keywords <= named
    )


def problems(sources: Sources, package: str) -> list[str]:
    """What vlm_sapo uses of the package and these sources lack."""
    lines = []
    for use in uses(package):
        if sources.has_module(f"{use.module}.{use.name}"):
            continue
        if not sources.definitions(use.module, use.name):
            lines.append(f"{use.where}: {use.module} has no {use.name}")
        signatures = sources.signatures(use.module, use.name)
        if (
            use.called
            and signatures
            and not any(fits(item, use.positional, use.keywords) for item in signatures)
        ):
            lines.append(f"{use.where}: {use.name} takes no {use.positional} values and {set(use.keywords)}")
    return sorted(set(lines))


def record(tests: str) -> None:
    """Writes the versions of this environment into docs/versions.json, as those that the tests called `tests`
    passed with. `python docs/build.py` makes the table of docs/install.md of it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    row = {"tests": tests, "date": str(date.today()), "python": platform.python_version()}
    row["cuda"] = f"{torch.version.cuda}, {gpu}" if torch.version.cuda else "CPU build"
    for name in ("torch", "transformers", "vllm"):
        try:
            row[name] = version(name)
        except PackageNotFoundError:
            row[name] = "not installed"
    rows = [item for item in json.loads(RECORDS.read_text()) if item["tests"] != tests]
    RECORDS.write_text(json.dumps([*rows, row], indent=1) + "\n")
