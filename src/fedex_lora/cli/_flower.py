"""Between organisations: `flower init`, `flower keys`, `flower try`, `flower worker`."""

import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fedex_lora.cli._shared import Debug, Json, Overrides, app, consoles, one_line_errors, print_json
from fedex_lora.errors import UsageError

flower = typer.Typer(no_args_is_help=True, help="The same federation between organisations, over Flower. Needs the extra `flower`.")
app.add_typer(flower, name="flower")
SERVER = ("ca.crt", "ca.key", "server.pem", "server.key")


@flower.command()
@one_line_errors
def init(
    folder: Annotated[Path, typer.Argument(help="The app folder to write; must not exist or be empty.")],
    config: Annotated[Path, typer.Option(help="A TOML file; paths in it are the server's.")],
    clients: Annotated[
        Optional[str],  # noqa: UP045 (typer)
        typer.Option(help="Comma-separated names of the parties, which have rows of their own; without, the configuration deals its rows."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="The run folder, on the server; by default FOLDER-run.")] = None,  # noqa: UP045
    set_: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a Flower app folder that `flwr run` takes. For a simulation or a deployment."""
    from fedex_lora.config import read_config
    from fedex_lora.engines.flower.app_folder import write_app

    names = [name.strip() for name in (clients or "").split(",") if name.strip()]
    run = (out or folder.with_name(f"{folder.name}-run")).absolute()
    write_app(folder, read_config(config, set_ or []), str(run), names)
    if as_json:
        print_json({"app": str(folder), "out": str(run), "clients": names})
        return
    console = consoles(False)
    console.print(f"app folder {folder}: start it by flwr run {folder} CONNECTION; the run goes to {run}", highlight=False)
    console.print("how SuperLink and SuperNodes are started: docs/deployment.md", highlight=False)


@flower.command()
@one_line_errors
def keys(
    folder: Annotated[Path, typer.Argument(help="Where they go; what is there is not overwritten.")],
    hosts: Annotated[str, typer.Option(help="Comma-separated names and addresses under which the parties reach the server.")] = "",
    node: Annotated[Optional[list[str]], typer.Option(help="A party's name: its key pair.")] = None,  # noqa: UP045
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the server's certificate, and nodes' key pairs. The certificate is of a CA of its own."""
    _require_flower()
    from fedex_lora.engines.flower._keys import make_certificates, make_node_key

    named, nodes = [host.strip() for host in hosts.split(",") if host.strip()], node or []
    plain = re.compile(r"\w[\w .-]*")
    odd = [name for name in nodes if not plain.fullmatch(name) or name.removesuffix(".pub") in SERVER or nodes.count(name) > 1]
    if odd:
        raise UsageError(f"--node {odd[0]}: give each party's name once, without slashes, and none of {', '.join(SERVER)}")
    wanted = [folder / name for name in (SERVER if named else ())] + [folder / f"{name}{end}" for name in nodes for end in ("", ".pub")]
    if not wanted:
        raise UsageError("nothing to make: give --hosts for the server, --node for a party")
    if there := next((path for path in wanted if path.exists()), None):
        raise UsageError(f"{there} exists and is not overwritten: remove it, or give another folder")
    if named:
        make_certificates(folder, named)
    for name in nodes:
        make_node_key(folder / name)
    made = sorted(path.name for path in folder.iterdir())
    if as_json:
        print_json({"folder": str(folder), "files": made})
    else:
        consoles(False).print(f"in {folder}: {', '.join(made)}", highlight=False)


@flower.command(name="try")
@one_line_errors
def try_(
    config: Annotated[Optional[Path], typer.Option(help="A TOML file; by default two short rounds of the demo.")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="Where logs and both runs go; by default a temporary folder.")] = None,  # noqa: UP045
    seconds: Annotated[float, typer.Option(help="Give up after so long.")] = 900.0,
    set_: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Try a real deployment on this machine. With TLS and node keys: a job over it, compared with the run in process; then all stops."""
    _require_flower()
    from fedex_lora.client.training import silence_libraries
    from fedex_lora.config import read_config
    from fedex_lora.engines.flower._trial import short_demo, trial

    silence_libraries()
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: whatever was started is stopped
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    console = consoles(as_json)
    settings = read_config(config, set_ or []) if config else short_demo(set_ or [])
    result: dict[str, Any] = trial(settings, out, seconds, lambda line: console.print(line, highlight=False))
    if as_json:
        print_json(result)


@flower.command()
@one_line_errors
def worker(
    socket: Annotated[Path, typer.Argument(help="The socket; the node's own settings name it: --node-config 'worker=\"SOCKET\"'.")],
    debug: Debug = False,
) -> None:
    """Keep a party's base in memory between messages. Flower starts a process for every message."""
    from fedex_lora.engines.flower._worker import serve

    console = consoles(True)
    serve(socket, lambda line: console.print(line, highlight=False))


def _require_flower() -> None:
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise UsageError("Flower is not installed: pip install '.[flower]'")
