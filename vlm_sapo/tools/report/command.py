"""Writes the report of runs, once or again and again while they go on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

from plotly.offline import get_plotlyjs

from vlm_sapo.reporting.console import Console
from vlm_sapo.tools.report.collect import collect


def report_command(folders: Sequence[Path], out: Path, *, groups: int, watch: bool, port: int) -> None:
    """Writes `out`; with `watch` serves it on loopback, made anew on every visit, until interrupted."""
    console = Console()
    if not watch:
        text = page(collect(folders, groups))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        console.say(f"{out}: {len(text) / 1e6:.1f} MB, opens in any browser without a network")
        return
    collect(folders, groups)
    with ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, folders, groups)) as server:
        console.say(f"http://127.0.0.1:{server.server_address[1]} shows the runs as they are; Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.say("ended")


def page(data: dict, *, refresh: int = 0) -> str:
    """The report as one file; with `refresh` it asks for itself anew every so many seconds."""
    parts = files("vlm_sapo.tools.report")
    text = parts.joinpath("page.html").read_text(encoding="utf-8")
    for name in ("page.css", "page.js"):
        text = text.replace(f"/*{name}*/", parts.joinpath(name).read_text(encoding="utf-8"))
    # what a response says must not end the script that holds it
    held = json.dumps(data | {"refresh": refresh}, ensure_ascii=False, allow_nan=False).replace(
        "<", "\\u003c"
    )
    before, rest = text.split("/*data*/")
    between, after = rest.split("/*plotly*/")
    return "".join((before, held, between, get_plotlyjs(), after))


class _Handler(BaseHTTPRequestHandler):
    """Gives the page."""

    def __init__(self, folders: Sequence[Path], groups: int, *args):
        self.folders, self.groups = folders, groups
        super().__init__(*args)

    def do_GET(self) -> None:
        """The page at /, nothing else, and nothing to a page of elsewhere that calls itself this host."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if self.path != "/" or host not in ("127.0.0.1", "localhost"):
            self.send_error(404)
            return
        try:
            body = page(collect(self.folders, self.groups), refresh=10).encode()
        except (OSError, ValueError, LookupError) as error:  # of a run that writes just now
            body = f"<meta http-equiv=refresh content=5><p>{escape(str(error))}; trying again".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing."""
