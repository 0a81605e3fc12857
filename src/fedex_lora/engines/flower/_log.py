"""A party's own log: all of its failures, what it holds, and a line for each message that left. A file that only its user can read."""

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedex_lora.engines.flower._settings import NodeSettings, node_settings
from fedex_lora.errors import ConfigError
from fedex_lora.protocol.failures import Failure

FILE = "party.log"


def party_log(folder: Path) -> logging.Logger:
    """The log in a party's folder; where that cannot be written, what its node prints.

    Flower never sends what a ClientApp logs to the server; still nothing goes to Flower's own log.
    """
    logger = logging.getLogger(f"fedex_lora.client.node.{folder}".replace("..", "_"))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(_handler(folder / FILE))
    return logger


def log_of(node: Mapping[str, Any]) -> logging.Logger:
    """The log of the party whose node config this is; in the default folder where its settings are wrong."""
    try:
        return party_log(node_settings(node).folder)
    except ConfigError:
        return party_log(NodeSettings().folder)


def _handler(path: Path) -> logging.Handler:
    handler: logging.Handler
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    return handler


def failed(log: logging.Logger, error: BaseException, failure: Failure, who: str) -> None:
    """The full text and the trace stay; what is told of it is said beside them."""
    log.error("%s: %s", who, traceback.format_exception_only(error)[-1].strip(), exc_info=error)  # that of one whose text raises, too
    log.info("%s: sent the failure %r and nothing else: %s", who, failure.code, failure)


def left(log: logging.Logger, payload: bytes, who: str) -> None:
    """The line of an answer: kind, bytes, tensors, numbers, and each number that it says beside its tensors."""
    size = int.from_bytes(payload[:8], "little")
    table = json.loads(payload[8 : 8 + size])
    header = json.loads(table.pop("__metadata__")["header"])
    numbers = sum(_count(entry) for entry in table.values())
    said = ", ".join(f"{name} {value:.6g}" for name, value in {"rows": header["num_examples"], **header["metrics"]}.items())
    log.info(
        "%s: sent a message of kind %s, round %d: %d bytes, %d tensors, %d numbers in them; beside them: %s",
        who, header["kind"], header["round"], len(payload), len(table), numbers, said,
    )  # fmt: skip


def _count(entry: Mapping[str, list[int]]) -> int:
    count = 1
    for extent in entry["shape"]:
        count *= extent
    return count
