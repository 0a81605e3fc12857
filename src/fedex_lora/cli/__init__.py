"""The command line: thin. Each command reads its options, calls the library, and prints."""

import logging
import re
import signal
import sys
import threading
from typing import Annotated, NoReturn

import click
import typer

from fedex_lora.cli import _federation, _init, _data, _privacy, _ledger, _adapters  # noqa: F401  # isort: skip (their order is that of --help)
from fedex_lora.cli import _report, _flower, _evaluate, _score, doctor, _reproduce  # noqa: F401  # isort: skip
from fedex_lora.cli._shared import app

__all__ = ["app", "main"]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from fedex_lora import __version__

        print(__version__)
        raise typer.Exit


def _stop(number: int, _: object) -> NoReturn:
    """As Ctrl-C: nothing half-written stays. Once: a second one would interrupt the tidying up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> None:
    """The entry point of the `fedex-lora` command: what is wrong with its arguments is one line, too."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns as it is imported, also where nobody uses it
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    try:
        sys.exit(app(prog_name="fedex-lora", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        message = re.sub(r"( Did you mean [^?]*\?)\1", r"\1", " ".join(error.format_message().split()))  # click and typer both say it
        print(f"error: {message} (see {error.ctx.command_path if error.ctx else 'fedex-lora'} --help)", file=sys.stderr)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
