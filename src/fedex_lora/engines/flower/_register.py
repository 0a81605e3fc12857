"""`flower register FILE.toml`: the nodes of a server's file, made known to its SuperLink by the `flwr` command."""

import os
import shlex
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tomli_w

from fedex_lora.config.reading import toml_tree
from fedex_lora.engines.flower._files import Startable, flower_environment, own_host
from fedex_lora.errors import FedexLoraError, UsageError

CONNECTION_NAME = "federation"  # as which the `flwr` command knows the server of a file
KNOWN = "key already in use"  # in Flower's words for a node that is registered
ANEW = "start the SuperLink anew"  # which keeps its nodes in memory


def register_nodes(server: Startable, tell: Callable[[str], None], patience: float = 60.0) -> None:
    """Tell the `flwr` command where the SuperLink is, wait until it listens, and register those nodes that it does not know.

    Args:
        server: of `server_file`, without problems.
        tell: told of each command, in words, and of nodes that the file does not name.
        patience: seconds to wait for the SuperLink.

    Raises:
        UsageError: Flower's configuration has another server under this name.
        FedexLoraError: the SuperLink does not listen, or does not take a node.
    """
    host, port = own_host(server.given["host"]), int(server.given["port"])
    home = Path(os.environ.get("FLWR_HOME") or "~/.flwr").expanduser()
    connect(home / "config.toml", f"[{host}]:{port}" if ":" in host else f"{host}:{port}", server.given["ssl_ca_certfile"])
    end = time.monotonic() + patience
    while not listens(host, port):
        if time.monotonic() > end:
            raise FedexLoraError(f"no SuperLink listens at {host}:{port}: start it by fedex-lora flower server FILE")
        time.sleep(0.2)
    ask = partial(subprocess.run, env=flower_environment(), capture_output=True, text=True, check=False)
    for name, key in server.nodes.items():
        command = ["flwr", "supernode", "register", str(key), CONNECTION_NAME, "--name", name]
        done = ask(command)
        words = " ".join((done.stdout + done.stderr).split())
        if done.returncode and KNOWN not in words.lower():
            raise FedexLoraError(f"{shlex.join(command)} failed: {words[-300:]}")
        known = f"{name}: its key is registered already, under the name that it had then; for another name {ANEW}"
        tell(known if done.returncode else shlex.join(command))
    others = ask(["flwr", "supernode", "list", CONNECTION_NAME, "--format", "json"]).stdout.count('"node-id"') - len(server.nodes)
    if others > 0:
        tell(f"! the SuperLink lets in {others} more than the file names: to shut them out {ANEW}")


def connect(path: Path, address: str, authority: str) -> None:
    """Add the server to Flower's configuration file; nothing that is there is changed, nor who may read it.

    Raises:
        UsageError: another server has the name, or nothing can be added to the file.
    """
    tree = toml_tree(path) if path.exists() else {}
    section = tree.get("superlink", {})
    there = section.get(CONNECTION_NAME) if isinstance(section, dict) else section
    wanted = {"address": address, "root-certificates": authority}
    if there == wanted:
        return
    if isinstance(there, dict):
        raise UsageError(f"{path} has another server as {CONNECTION_NAME}, {there.get('address')}: rename it there, or set FLWR_HOME")
    more = f"\n[superlink.{CONNECTION_NAME}]\n{tomli_w.dumps(wanted)}"
    more = more if tree else f'\n[superlink]\ndefault = "{CONNECTION_NAME}"\n{more}'
    try:
        tomllib.loads((path.read_text(encoding="utf-8-sig") if tree else "") + more)
    except tomllib.TOMLDecodeError:
        raise UsageError(f"{path}: superlink, or {CONNECTION_NAME} in it, is no [table]: make it one, or set FLWR_HOME") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
        file.write(more)


def listens(host: str, port: int) -> bool:
    """Does somebody listen there?"""
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True
