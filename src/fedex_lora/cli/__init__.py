"""The command line: thin. Each command reads its options, calls the library, and prints."""

import logging
import re
import signal
import sys
import threading
from typing import Annotated, NoReturn

import click
import typer

from fedex_lora.cli import _federation as _federation  # isort: skip (the order of the commands in --help)
from fedex_lora.cli import _init as _init  # isort: skip
from fedex_lora.cli import _data as _data  # isort: skip
from fedex_lora.cli import _privacy as _privacy  # isort: skip
from fedex_lora.cli import _ledger as _ledger  # isort: skip
from fedex_lora.cli import _adapters as _adapters  # isort: skip
from fedex_lora.cli import _report as _report  # isort: skip
from fedex_lora.cli import _flower as _flower  # isort: skip
from fedex_lora.cli import _evaluate as _evaluate  # isort: skip
from fedex_lora.cli import _score as _score  # isort: skip
from fedex_lora.cli import doctor as doctor  # isort: skip
from fedex_lora.cli import _reproduce as _reproduce  # isort: skip
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
