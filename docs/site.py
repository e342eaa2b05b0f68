"""A hook of mkdocs: the site's pages are the repository's Markdown files, where they stand, with the files
that they link to.

make docs
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "data", "eval", "docs", "docs/examples", "docs/stability")
LINK = re.compile(r"\]\(([^)#:\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files: those of this function instead of all in docs/, and the theme's."""
    theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    pages = [ROOT / "README.md", *(page for name in FOLDERS for page in sorted((ROOT / name).glob("*.md")))]
    paths = dict.fromkeys([*pages, *(ROOT / name for name in config.extra_css)])
    for page in pages:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            if path.is_file() and path.is_relative_to(ROOT):
                paths[path] = None
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return Files([*theme, *(File.generated(config, name, abs_src_path=str(ROOT / name)) for name in names)])
