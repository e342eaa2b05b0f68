"""Every file of this folder says the fault and where it was reported.

Source: docs/public-cases.md
"""

import ast
from pathlib import Path

import pytest


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda path: path.stem)
def test_a_file_names_its_source(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    fault, _, source = docstring.partition("\n\nSource: ")
    assert fault.strip() and source.strip(), f"{path.name} must say the fault and its source"
