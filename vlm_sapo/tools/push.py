"""`vlm-sapo push`: uploads a finished run's model with its card."""

from __future__ import annotations

from pathlib import Path

from vlm_sapo import hub
from vlm_sapo.config.files import parse
from vlm_sapo.reporting.card import CARD, is_edited, write_card
from vlm_sapo.reporting.console import Console
from vlm_sapo.reporting.run_folder import RunFolder


def push_command(run: Path, repo: str | None, *, private: bool | None) -> None:
    """Uploads `final/` of a run to a repository, by default that of its config. The card is written for this
    repository, unless it was edited by hand. Raises ValueError for a run that isn't finished, and where the
    hub refuses."""
    console, folder = Console(), RunFolder(run)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"RUN ({run}) must be the folder of a run; there is no config.yaml in it")
    summary = folder.summary()
    if summary is None or not (run / "final").is_dir():
        raise ValueError(f"RUN ({run}) must be finished; start its command again, which goes on with it")
    section = parse((run / "config.yaml").read_text(encoding="utf-8")).get("hub", {})
    field, repo = ("--repo", repo) if repo else ("hub.push", section.get("push"))
    if repo is None:
        raise ValueError(f"--repo is missing, and the config of {run} has no hub.push; add --repo owner/name")
    if not hub.HUB_ID.fullmatch(repo):
        raise ValueError(f"--repo ({repo}) must be owner/name, such as my-team/qwen-geometry")
    private = section.get("private") if private is None else private
    if note := hub.prepare_push(repo, private=private, field=field):
        console.warn(note)
    written = run / "final" / CARD
    if not is_edited(written):
        write_card(folder, summary, repo)
    console.say(f"{run / 'final'} is at {hub.push(run / 'final', repo, field=field)}")
