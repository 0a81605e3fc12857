"""A party's own log: all of its failures, what it holds, and a line for each message that left. A file that only its user can read."""

import logging
import math
import sys
import traceback
from pathlib import Path

from fedex_lora.protocol.failures import Failure
from fedex_lora.protocol.frame import printable, read_body_table, split
from fedex_lora.protocol.records import Answer, Request, parse_envelope

FILE = "party.log"


def party_log(folder: Path) -> logging.Logger:
    """The log in a party's folder; where that cannot be written, what its node prints.

    Nothing goes to the engine's own log, which may be sent on.
    """
    logger = logging.getLogger(f"fedex_lora.client.node.{folder}".replace("..", "_"))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(_handler(folder / FILE))
    return logger


def _handler(path: Path) -> logging.Handler:
    handler: logging.Handler
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError, RuntimeError):
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Indented("%(asctime)s %(levelname)s %(message)s"))
    return handler


class _Indented(logging.Formatter):
    """All lines of a record but its first are indented: no word of somebody else is taken for a line of this log, or hides one."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).splitlines()
        return "\n    ".join("".join(one if one.isprintable() or one == "\t" else repr(one)[1:-1] for one in line) for line in lines)


def log_failure(log: logging.Logger, error: BaseException, failure: Failure, who: str) -> None:
    """The full text and the trace stay; what is told of it is said beside them."""
    who = printable(who)  # the server's word
    log.error("%s: %s", who, traceback.format_exception_only(error)[-1].strip(), exc_info=error)  # that of one whose text raises, too
    log.info("%s: sent the failure %r and nothing else: %s", who, failure.code, failure)


def left(log: logging.Logger, payload: bytes, who: str, asked: bytes) -> None:
    """The line of an answer: kind, bytes, tensors, numbers, and each number that it says beside its tensors.

    Before it, why the server left out the last one, where the message that is `asked` says so.
    """
    request = parse_envelope(split(asked, len(asked))[0])
    if isinstance(request, Request) and request.rejected:
        log.warning("%s: its last answer is no part of the mean: %s", printable(who), request.rejected)
    text, body = split(payload, len(payload))
    envelope, table = parse_envelope(text), read_body_table(body, len(body))[1] if body else {}
    numbers = sum(math.prod(entry.shape) for entry in table.values())
    beside = {"rows": envelope.num_examples, **envelope.metrics} if isinstance(envelope, Answer) else {}
    said = ", ".join(f"{name} {value:.6g}" for name, value in beside.items())
    log.info(
        "%s: sent a message of kind %s, round %d: %d bytes, %d tensors, %d numbers in them; beside them: %s",
        printable(who), envelope.kind, envelope.round, len(payload), len(table), numbers, said,
    )  # fmt: skip
