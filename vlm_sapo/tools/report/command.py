"""Writes the report of runs or of evaluations once, or serves it live while they go on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from vlm_sapo.reporting.console import Console
from vlm_sapo.tools.report.collect import collect
from vlm_sapo.tools.report.page import render


def report_command(folders: Sequence[Path], out: Path, *, groups: int | None, watch: bool, port: int) -> None:
    """Writes `out` and prints what is worth a look. With `watch`, serves the page on this machine instead,
    collected anew for each request, until interrupted."""
    console = Console()
    if not watch:
        data = collect(folders, groups)
        text = render(data)
        if out.is_dir():
            raise ValueError(
                f"--out ({out}) must be a file, and it is a folder; add a name such as page.html"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        sources = data.get("runs") or data["evaluations"]
        for source in sources:
            for finding in source["findings"]:
                if finding["kind"] != "ok":
                    console.say(f"{source['name'] + ': ' if len(sources) > 1 else ''}{finding['text']}")
        for finding in data.get("between", []):
            console.say(finding["text"])
        console.say(f"{out}: {len(text) / 1e6:.1f} MB; opens in any browser, no network needed")
        return
    collect(folders, groups)
    with ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, folders, groups)) as server:
        console.say(f"live report at http://127.0.0.1:{server.server_address[1]}; stop it with Ctrl-C")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.say("stopped")


class _Handler(BaseHTTPRequestHandler):
    """Serves the page."""

    def __init__(self, folders: Sequence[Path], groups: int | None, *args):
        self.folders, self.groups = folders, groups
        super().__init__(*args)

    def do_GET(self) -> None:
        """Serves the page at / alone, and only under a name of this machine, so that no other site's page can
        read it through a host name of its own."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if self.path != "/" or host not in ("127.0.0.1", "localhost"):
            self.send_error(404)
            return
        try:
            body = render(collect(self.folders, self.groups), refresh=10).encode()
        except (OSError, ValueError, LookupError) as error:  # a file that the run is writing right now
            body = f"<meta http-equiv=refresh content=5><p>{escape(str(error))}; trying again".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Requests aren't logged."""
