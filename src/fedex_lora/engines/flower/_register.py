"""`flower register FILE.toml`: the nodes of a server's file, made known to its SuperLink by the `flwr` command."""

import os
import shlex
import socket
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import tomli_w

from fedex_lora.engines.flower._files import Startable, flower_environment, own_host
from fedex_lora.errors import FedexLoraError, UsageError
from fedex_lora.storage.files import write_text

CONNECTION_NAME = "federation"  # as which the `flwr` command knows the server of a file
KNOWN = "key already in use"  # in Flower's words for a node that is registered


def register_nodes(server: Startable, tell: Callable[[str], None], patience: float = 60.0) -> None:
    """Tell the `flwr` command where the SuperLink is, wait until it listens, and register those nodes that it does not know.

    Args:
        server: of `server_file`, without problems.
        tell: told of each command, in words.
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
    for name, key in server.nodes.items():
        command = ["flwr", "supernode", "register", str(key), CONNECTION_NAME, "--name", name]
        done = subprocess.run(command, env=flower_environment(), capture_output=True, text=True, check=False)
        words = " ".join((done.stdout + done.stderr).split())
        if done.returncode and KNOWN not in words.lower():
            raise FedexLoraError(f"{shlex.join(command)} failed: {words[-300:]}")
        tell(f"{name}: its key is registered already" if done.returncode else shlex.join(command))


def connect(path: Path, address: str, authority: str) -> None:
    """Add the server to Flower's configuration file; nothing that is there is changed.

    Raises:
        UsageError: another server has the name.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else f'[superlink]\ndefault = "{CONNECTION_NAME}"\n'
    wanted = {"address": address, "root-certificates": authority}
    there = tomllib.loads(text).get("superlink", {}).get(CONNECTION_NAME)
    if there is None:
        write_text(path, f"{text}\n[superlink.{CONNECTION_NAME}]\n{tomli_w.dumps(wanted)}")
    elif there != wanted:
        raise UsageError(f"{path} has another server as {CONNECTION_NAME}, {there.get('address')}: rename it there, or set FLWR_HOME")


def listens(host: str, port: int) -> bool:
    """Does somebody listen there?"""
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True
