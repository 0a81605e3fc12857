"""What every command shares: the application, errors as one line, where output goes."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from fedex_lora.errors import FedexLoraError, UsageError, require_system, require_versions

if TYPE_CHECKING:
    from rich.console import Console

typer.core.HAS_RICH = False  # help and usage errors as plain text: importing what draws boxes around them is half of the start

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Exact federated fine-tuning with LoRA.")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")]
RoundOption = Annotated[
    str | None,
    typer.Option(metavar="N|best", help="Of a run folder, after which round; best: on the clients' held-out rows; by default the last."),
]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=V", help="Override a key: V as in TOML; may be repeated.")]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Any error becomes one line on standard error and a non-zero exit; `--debug` lets it through."""

    @wraps(command)
    def guarded(*args: Any, **options: Any) -> None:
        try:
            require_system()
            if command.__name__ != "doctor":  # which says that and more
                require_versions()
            command(*args, **options)
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except FedexLoraError as error:
            if options.get("debug"):
                raise
            fail(f"error: {error}", error.exit_status)
        except typer.Exit:
            raise
        except Exception as error:
            if options.get("debug"):
                raise
            if isinstance(error, OSError) and error.filename and error.strerror:
                fail(f"error: {error.filename}: {error.strerror}: give another path, or mend this one", 1)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            fail(f"error: {type(error).__name__}: {reason} (unexpected; --debug shows the trace)", 1)

    return guarded


def fail(line: str, status: int) -> None:
    """Say one line on standard error, and leave with this status."""
    print(" ".join(line.split()), file=sys.stderr)
    raise typer.Exit(status)


def consoles(as_json: bool) -> "Console":
    """Where people look: standard error when standard output carries JSON. Texts are shown as they are: names come from elsewhere."""
    from rich.console import Console

    return Console(stderr=as_json, soft_wrap=True, markup=False)


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    from fedex_lora.storage.files import finite_json

    print(finite_json(value))


def number_list(text: str | None, option: str, example: str, kind: Callable[[str], Any] = float) -> list[Any] | None:
    """Comma-separated numbers of an option."""
    try:
        return None if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: give comma-separated {'whole ' * (kind is int)}numbers, such as {example}") from None
