"""What messages say of themselves, beside their tensors: strict records of plain JSON."""

import re
from numbers import Integral
from typing import Annotated, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, field_validator

from fedex_lora.errors import WireError
from fedex_lora.protocol.frame import shown, strict_json

SCHEMA = 2
METRICS, METRIC = 64, re.compile(r"[A-Za-z0-9_.@/ +-]{1,64}")
RESERVED_METRICS = frozenset("event time path self round client num_examples bytes_up late name".split())  # names of an event's own fields
BASE = 100  # characters of a base's name
LARGEST = 1e100  # of a metric: sums of such numbers stay finite


T = TypeVar("T")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Envelope(_Record):
    """What every envelope says.

    Attributes:
        run: one word; who takes part in two runs cannot mix them up.
        round: that is going on, from 1.
        client: to whom the message goes, or who sent it.
        body: the digest of the body; "" without one.
    """

    schema_version: int = SCHEMA
    run: str
    round: int = Field(ge=0, lt=2**53)
    client: str
    body: str = ""


class Request(_Envelope):
    """Server to client.

    Attributes:
        kind: "train" (evaluate what arrives, then train), or "evaluate" (only that).
        rank: how many components of the adapter this client trains; None: all.
        full: the server does not know what the client holds: it forgets its base delta, and the body brings all of it.
        accepted: the last round in which the client's update was part of the mean; what it trained since did not count.
        rejected: why its last update was rejected, where it was.
        history: what the server's model of this round came from; two servers, or one that lost rounds, differ in it.
        base_history: the same of the model that the body counts from.
        base: the base that the run stands on, see `models.base_weights.FrozenBase.name`; "": nobody has said yet.
        rules: what both sides must say alike, see `Rules.agreed`; empty of older servers.
    """

    kind: Literal["train", "evaluate"]
    rank: int | None = Field(None, ge=1)
    full: bool = False
    accepted: int = Field(0, ge=0)
    rejected: str = ""
    history: str = ""
    base_history: str = ""
    base: str = Field("", max_length=BASE)
    rules: dict[str, str] = Field({}, max_length=16)


class Answer(_Envelope):
    """Client to server: what it trained, or only numbers where it was asked for these.

    Attributes:
        phase: what was asked.
        base_version: of the base that it trained on.
        num_examples: its training rows.
        metrics: what it measured.
        base: as the request's, of the model that it trained; "": its model has no name for it.
    """

    kind: Literal["update"] = "update"
    phase: Literal["train", "evaluate"] = "train"
    base_version: int = Field(ge=0)
    num_examples: int = Field(0, ge=0)
    metrics: dict[str, FiniteFloat] = Field({}, max_length=METRICS)
    base: str = Field("", max_length=BASE)

    @field_validator("metrics")
    @classmethod
    def _are_plain(cls, metrics: dict[str, float]) -> dict[str, float]:
        for name, value in metrics.items():
            if not METRIC.fullmatch(name) or name in RESERVED_METRICS or abs(value) > LARGEST:
                raise ValueError(f"{shown(name)} = {value:g} is no metric: its name is odd or taken, or its value absurd")
        return metrics


def uncountable(rows: object, kind: str, most: int) -> str:
    """Why something is no number of rows that an answer may have, the same at both ends; "" if it is one.

    Args:
        rows: on which was trained.
        kind: of the request: an evaluation trains on none.
        most: `messages.max_examples`.
    """
    least = 0 if kind == "evaluate" else 1
    if isinstance(rows, Integral) and not isinstance(rows, bool) and least <= int(rows) <= most:
        return ""
    say = "a whole number, of the rows that were trained on"
    return f"num_examples is {shown(rows)}: it must be from {least} to messages.max_examples = {most}, {say}"


class Apology(_Envelope):
    """Client to server: why there is no update, as `protocol.failures` has it: a code and a number of rows, never a text."""

    kind: Literal["failure"] = "failure"
    code: str = Field(max_length=40)
    rows: int = Field(0, ge=0, le=10**9)


Envelope: TypeAlias = Request | Answer | Apology
_ENVELOPE: TypeAdapter[Envelope] = TypeAdapter(Annotated[Envelope, Field(discriminator="kind")])


def elsewhere(said: Answer | Apology, asked: Request) -> str:
    """Why an answer is to something else than what was asked; "" where it is not.

    A client that could not read its message says neither run nor round.
    """
    unread = ("run", "round") if isinstance(said, Apology) and not said.run else ()
    for name in (name for name in ("run", "round", "client") if name not in unread):
        if getattr(said, name) != getattr(asked, name):
            return f"the update's {name} is {shown(getattr(said, name))}, this round declared {shown(getattr(asked, name))}"
    if isinstance(said, Answer) and said.phase != asked.kind:
        return f"the update's phase is {said.phase}, this round declared {asked.kind}"
    return ""


class BodyHeader(_Record):
    """What a body says of its tensors.

    Attributes:
        method: the run's.
        scalings: module path -> scaling, in the adapter's order.
        since, version: the body brings a base delta from the one to the other (`protocol.delta_sync`); of an update both are 0.
        log_rounds, halts: see `CatchUp`.
        reinit_seed: the run's seed, where the client draws the adapter itself instead of receiving it.
    """

    method: str
    scalings: dict[str, FiniteFloat] = {}
    since: int = Field(0, ge=0)
    version: int = Field(0, ge=0)
    log_rounds: list[int] = []
    halts: list[int] = []
    reinit_seed: int | None = Field(None, ge=0)


def parse_envelope(text: str) -> Envelope:
    """The record in an envelope's text.

    Raises:
        WireError: it is none of this version.
    """
    return _checked("envelope", text, _ENVELOPE)


def parse_header(text: str) -> BodyHeader:
    """The record in a body's header; see `parse_envelope`."""
    return _checked("header", text, TypeAdapter(BodyHeader))


def _checked(what: str, text: str, adapter: TypeAdapter[T]) -> T:
    try:
        found = strict_json(text)
        if isinstance(found, dict) and what == "envelope" and found.get("schema_version") != SCHEMA:
            there = shown(found.get("schema_version"))
            raise WireError(f"the message has schema {there}, this version speaks {SCHEMA}: use one version everywhere")
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or what
        why = first["msg"] if first["msg"].isprintable() and len(first["msg"]) < 300 else shown(first["msg"])  # it may quote what arrived
        raise WireError(f"the message's {what} is wrong: {shown(where)[1:-1]}: {why}") from None
    except (ValueError, RecursionError):
        raise WireError(f"the message's {what} is wrong: it is not JSON") from None
