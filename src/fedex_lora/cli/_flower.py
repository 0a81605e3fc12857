"""Between organisations: the app folder, keys, server and nodes from a file each, a trial, a worker."""

import os
import re
import shlex
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedex_lora.cli._shared import Debug, Json, Overrides, app, consoles, one_line_errors, print_json
from fedex_lora.errors import UsageError, require_extra

if TYPE_CHECKING:
    from fedex_lora.engines.flower._files import Startable

flower = typer.Typer(no_args_is_help=True, help="The same federation between organisations, over Flower. Needs the extra `flower`.")
app.add_typer(flower, name="flower")
ITSELF = ("localhost", "127.0.0.1")  # as which nginx and Flower's own processes reach the server
SERVER = ("ca.crt", "ca.key", "server.pem", "server.key", "server.toml")
ENDS = ("", ".pub", ".toml")  # of a node's key, what the server gets of it, and what starts the node
Show = Annotated[bool, typer.Option("--show", help="Print Flower's command line, and start nothing.")]


@flower.command()
@one_line_errors
def init(
    folder: Annotated[Path, typer.Argument(help="The app folder to write; must not exist or be empty.")],
    config: Annotated[Path, typer.Option(help="A TOML file; paths in it are the server's.")],
    clients: Annotated[
        str | None,
        typer.Option(help="Comma-separated names of the parties, which have rows of their own; without, the configuration deals its rows."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder, on the server; by default FOLDER-run.")] = None,
    set_: Overrides = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a Flower app folder that `flwr run` takes. For a simulation or a deployment."""
    from fedex_lora.config import read_config
    from fedex_lora.engines.flower.app_folder import write_app

    names = [name.strip() for name in (clients or "").split(",") if name.strip()]
    here = Path(os.path.abspath(folder))
    run = (out or here.with_name(f"{here.name}-run")).absolute()
    write_app(folder, read_config(config, set_ or []), str(run), names)
    if as_json:
        print_json({"app": str(folder), "out": str(run), "clients": names})
        return
    console = consoles(False)
    start = f"flwr run {shlex.quote(str(folder))} CONNECTION"
    console.print(f"app folder {folder}: start it by {start}; the run goes to {run}", highlight=False)
    console.print(
        "fedex-lora flower keys writes a file for the server and for each node, which start them: docs/deployment.md", highlight=False
    )


@flower.command()
@one_line_errors
def keys(
    folder: Annotated[Path, typer.Argument(help="Where they go; what is there is not overwritten.")],
    hosts: Annotated[str, typer.Option(help="Comma-separated names and addresses under which the parties reach the server.")] = "",
    node: Annotated[list[str] | None, typer.Option(help="A party's name: its key pair.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Make certificates, node keys, and the files that start server and nodes. The server's certificate is of a CA of its own."""
    _require_flower()
    from fedex_lora.engines.flower._examples import SERVER_EXAMPLE, node_example
    from fedex_lora.engines.flower._keys import make_certificates, make_node_key
    from fedex_lora.storage.files import write_text

    named, nodes = [host.strip() for host in hosts.split(",") if host.strip()], node or []
    plain = re.compile(r"\w[\w .-]*")
    theirs = [f"{name}{end}" for name in nodes for end in ENDS]
    files = Counter([*SERVER, *theirs])
    odd = [name for name in nodes if not plain.fullmatch(name) or any(files[f"{name}{end}"] > 1 for end in ENDS)]
    if odd:
        raise UsageError(
            f"--node {odd[0]}: give each party's name once, without slashes, whose files (NAME{', NAME'.join(ENDS)}) are no other party's, "
            f"and none of {', '.join(SERVER)}"
        )
    wanted = [folder / name for name in [*(SERVER if named else ()), *theirs]]
    if not wanted:
        raise UsageError("nothing to make: give --hosts for the server, --node for a party")
    if there := next((path for path in wanted if path.exists()), None):
        raise UsageError(f"{there} exists and is not overwritten: remove it, or give another folder")
    if named:
        make_certificates(folder, list(dict.fromkeys([*named, *ITSELF])))
        write_text(folder / "server.toml", SERVER_EXAMPLE)
    for name in nodes:
        make_node_key(folder / name)
        write_text(folder / f"{name}.toml", node_example(name))
    made = sorted(path.name for path in folder.iterdir())
    if as_json:
        print_json({"folder": str(folder), "files": made})
    else:
        consoles(False).print(f"in {folder}: {', '.join(made)}", highlight=False)


@flower.command()
@one_line_errors
def server(
    file: Annotated[Path, typer.Argument(help="The server's TOML file, as fedex-lora flower keys writes it.")],
    show: Show = False,
    debug: Debug = False,
) -> None:
    """Start the server from a file. It becomes Flower's SuperLink: with TLS, for registered nodes only, fetching no packages."""
    _require_flower()
    from fedex_lora.cli.doctor import superlink_problems
    from fedex_lora.engines.flower._files import server_file

    found = server_file(file)
    notes = [f"! {problem}" for problem in superlink_problems(found.command)]
    notes += [f"its nodes: fedex-lora flower register {shlex.quote(str(file))}; a run: flwr run APP federation"]
    _become(found, file, show, notes)


@flower.command()
@one_line_errors
def register(
    file: Annotated[Path, typer.Argument(help="The server's TOML file; its table [nodes] says who may join.")],
    debug: Debug = False,
) -> None:
    """Let a server's nodes in. Waits for the SuperLink, and runs `flwr supernode register` for each node of the file."""
    _require_flower()
    from fedex_lora.engines.flower._files import server_file
    from fedex_lora.engines.flower._register import register_nodes

    found = server_file(file)
    _refuse(found, file)
    console = consoles(False)
    register_nodes(found, lambda line: console.print(line, highlight=False, markup=False))
    if not found.nodes:
        console.print(f'{file} names no nodes: add lines such as ward-a = "ward-a.pub" to its table [nodes]', highlight=False, markup=False)


@flower.command()
@one_line_errors
def node(
    file: Annotated[Path, typer.Argument(help="A party's TOML file, as fedex-lora flower keys writes it.")],
    show: Show = False,
    debug: Debug = False,
) -> None:
    """Start a party's node from a file. It becomes Flower's SuperNode."""
    _require_flower()
    from fedex_lora.engines.flower._files import node_file
    from fedex_lora.engines.flower._settings import NodeSettings

    found = node_file(file)
    log = NodeSettings(state=str(found.given.get("state", ""))).folder / "party.log"
    notes = [f"{found.given.get('client', 'a node')} joins {found.given.get('superlink')}; what leaves it, and failures: {log}"]
    notes += [] if {"data", "rows"} & found.given.keys() else ["! no data: it can take part in runs of the demo only"]
    _become(found, file, show, notes)


def _refuse(found: "Startable", file: Path) -> None:
    """Say every problem of a file, a line each, and leave if there is one."""
    for problem in found.problems:
        print(f"error: {file}: {' '.join(problem.split())}", file=sys.stderr)
    if found.problems:
        raise typer.Exit(2)


def _become(found: "Startable", file: Path, show: bool, notes: list[str]) -> None:
    """Replace this process by Flower's, which signals, exit status and supervisors then concern, or print its command line."""
    from fedex_lora.engines.flower import ENVIRONMENT
    from fedex_lora.engines.flower._files import flower_environment

    _refuse(found, file)
    if show:
        print(shlex.join([*(f"{name}={value}" for name, value in ENVIRONMENT.items()), *found.command]))
        return
    for note in notes:
        print(note, file=sys.stderr, flush=True)
    os.execvpe(found.command[0], found.command, flower_environment())


@flower.command(name="try")
@one_line_errors
def try_(
    config: Annotated[Path | None, typer.Option(help="A TOML file; by default two short rounds of the demo.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where logs and both runs go; by default a temporary folder.")] = None,
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
    socket: Annotated[Path, typer.Argument(help='The socket, which the node\'s file names: worker = "SOCKET".')],
    debug: Debug = False,
) -> None:
    """Keep a party's base in memory between messages. Flower starts a process for every message."""
    from fedex_lora.engines.flower._worker import serve

    console = consoles(True)
    serve(socket, lambda line: console.print(line, highlight=False))


def _require_flower() -> None:
    require_extra("flwr", "flower", "federations over Flower")
