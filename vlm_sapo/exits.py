"""How a command begins and ends: quietly, with one sentence for a mistake, with the command that goes on."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import typer

from vlm_sapo.distributed import ElsewhereError, Interrupted
from vlm_sapo.reporting.console import visible

ALARM = 3
"""Exit code of a run that an alarm stopped."""


def run(app: Callable[[], None]) -> None:
    """Runs the command line. What this package says of a user's mistake is one sentence and exit code 1."""
    signal.signal(signal.SIGTERM, _ended)  # schedulers end runs so; processes end with them
    os.umask(os.umask(0o077) | 0o002)  # what a run writes is no one else's to change
    try:
        app()
    except ValueError as error:
        if not _raised_here(error):
            raise
        typer.echo(visible(f"error: {error}"), err=True)
        sys.exit(1)
    except Interrupted as error:
        if main_process():
            words = [word for word in sys.argv[1:] if not word.startswith("run.overwrite")]
            launcher = "your launcher and " if "RANK" in os.environ else ""
            name = "vlm-sapo" if shutil.which("vlm-sapo") else sys.argv[0]
            typer.echo(visible(f"{error}\ngo on with: {launcher}{shlex.join([name, *words])}"))
        if error.alarm:
            sys.exit(ALARM)
    except ElsewhereError:
        sys.exit(1)  # that process says why


def _ended(number: int, _) -> None:
    typer.echo(f"ended by {signal.Signals(number).name}", err=True)
    sys.exit(128 + number)


def main_process() -> bool:
    """Whether this is the process that prints, where a launcher started several."""
    return os.environ.get("RANK", "0") == "0"


def _raised_here(error: BaseException) -> bool:
    """Whether the error was raised by this package's own code, and not inside a library."""
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def quieten() -> None:
    """Silences the libraries' own progress bars and advice, which would bury the run's lines."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
