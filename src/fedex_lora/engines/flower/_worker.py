"""A party's process that keeps the base in memory: Flower starts a process for every message, which asks this one over a local socket."""

import os
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedex_lora.engines.flower._request import NodeRequest
from fedex_lora.engines.flower._settings import node_settings
from fedex_lora.errors import UsageError
from fedex_lora.protocol.envelopes import answer_of
from fedex_lora.protocol.failures import failure_of, ignored_failures, in_one_line
from fedex_lora.protocol.frame import printable

if TYPE_CHECKING:
    from fedex_lora.engines.flower._node import Node

MOST_BYTES = 2**36  # of a request: a length that is no length is not reserved


def ask(request: NodeRequest) -> bytes:
    """The answer of this machine's party: of its worker where the node config names one, else worked out in this process.

    Raises:
        UsageError: the worker is not there, or the node's settings are wrong.
    """
    worker = node_settings(request.node).worker
    if not worker:
        from fedex_lora.engines.flower._node import Node

        return Node(lambda event: None).reply(request)
    try:
        with Client(worker, "AF_UNIX") as connection:
            connection.send_bytes(request.to_bytes())
            return connection.recv_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(
            f"the worker at {worker} does not answer ({error}): start it by fedex-lora flower worker {worker}", "worker"
        ) from None


def serve(path: Path, tell: Callable[[str], None]) -> None:
    """Answer requests at a socket until interrupted, one at a time.

    Args:
        path: of the socket; only this user can open it.
        tell: told of each request, in words; that it fails ends nothing.

    Raises:
        UsageError: the socket cannot be made.
    """
    from fedex_lora.engines.flower._node import Node

    node = Node(lambda event: None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(f"cannot make {path.parent}: {error.strerror}: give another path") from None
    _require_free(path)
    mask = os.umask(0o177)  # nobody else may open the socket, from its first moment
    try:
        listener = Listener(str(path), "AF_UNIX")
    except OSError as error:
        raise UsageError(f"cannot listen at {path}: {error}: give another path (at most about 100 characters)") from None
    finally:
        os.umask(mask)

    def say(line: str) -> None:
        with ignored_failures():
            tell(line)

    say(f"listening at {path}")
    try:
        while True:
            with listener.accept() as connection:
                _answer_one(connection, node, say)
    finally:
        listener.close()


def _require_free(path: Path) -> None:
    """Remove a socket that nobody listens at any more; nothing else."""
    if not path.exists():
        return
    if not path.is_socket():
        raise UsageError(f"{path} exists and is no socket: give another path")
    try:
        Client(str(path), "AF_UNIX").close()
    except ConnectionRefusedError:
        path.unlink()
    except OSError as error:
        raise UsageError(f"{path} cannot be opened, and may be somebody's: {error.strerror}: give another path") from None
    else:
        raise UsageError(f"a worker listens at {path} already: give another path, or stop that one")


def _answer_one(connection: "Connection[Any, Any]", node: "Node", say: Callable[[str], None]) -> None:
    """One bad message must not end the service; what it was about is in the party's log, and not in what goes back."""
    try:
        message = connection.recv_bytes(MOST_BYTES)
    except (OSError, EOFError, MemoryError):
        return
    client, payload = "", b""
    try:
        request = NodeRequest.from_bytes(message)
        client, payload = request.client, request.payload
        reply = node.reply(request)
        say(f"{printable(client)}: answered with {len(reply) / 1e6:.2f} MB")
    except (Exception, SystemExit) as error:  # a tokenizer's code may leave so; this service stays
        reply = answer_of(payload, client, failure_of(error).private)
        say(f"refused a request: {in_one_line(error)}")
    try:
        connection.send_bytes(reply)
    except OSError as error:
        say(f"the answer was not wanted any more: {error}")
