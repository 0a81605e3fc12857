"""Messages to bytes and back: safetensors (never pickle) with a small JSON header in its metadata.

A download carries the global adapter, the other trained tensors and what the client's base lacks (`catch_up`). An upload
carries what the client trained. Whatever arrives is checked against what the round declared before anything is computed with it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedex_lora.aggregation.lowrank import from_parts, parts
from fedex_lora.aggregation.server_state import fresh_adapter
from fedex_lora.errors import AggregationError, LacksError, WireError
from fedex_lora.protocol.delta_sync import CatchUp, require_whole
from fedex_lora.protocol.frame import UNSEALED, Entry, read_table, require_same_names, require_sealed, seal, shown, strict_json
from fedex_lora.types import Adapter, ClientUpdate, Delta, LoRAPair, LowRank

SCHEMA = 1
EXAMPLES = 10_000_000  # of one client, at most, where the configuration says nothing
METRICS, METRIC = 64, re.compile(r"[A-Za-z0-9_.@/ +-]{1,64}")
TAKEN = {"event", "time", "path", "self", "round", "client", "num_examples", "bytes_up"}  # names of an event's own fields
LARGEST = 1e100  # of a metric: sums of such numbers stay finite
HEADER = 8192  # bytes of JSON, beside what the declared tensors need


class Header(BaseModel):
    """What a message says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: int = SCHEMA
    sha256: str = UNSEALED
    kind: Literal["train", "evaluate", "update"]
    run: str
    round: int = Field(ge=0, lt=2**53)
    base_version: int | None = Field(None, ge=0)
    client: str
    method: str
    scalings: dict[str, FiniteFloat] = {}
    num_examples: int = Field(0, ge=0)
    metrics: dict[str, FiniteFloat] = Field({}, max_length=METRICS)
    since: int = Field(0, ge=0)
    log_rounds: list[int] = []
    halts: list[int] = []
    share: None = Field(None, exclude=True)  # older versions write it, also in the answers that their clients keep
    rank: int | None = Field(None, ge=1)
    fresh: int | None = Field(None, ge=0)
    anew: bool = False
    accepted: int = Field(0, ge=0)
    refused: str = ""

    @field_validator("metrics")
    @classmethod
    def _are_plain(cls, metrics: dict[str, float]) -> dict[str, float]:
        for name, value in metrics.items():
            if not METRIC.fullmatch(name) or name in TAKEN or abs(value) > LARGEST:
                raise ValueError(f"{shown(name)} = {value:g} is no metric: its name is odd or taken, or its value absurd")
        return metrics


@dataclass(frozen=True, eq=False)
class Download:
    """Server to client: go on from here.

    Attributes:
        kind: "train" (evaluate what arrives, then train), or "evaluate" (only that).
        round: the round that is going on, from 1; the adapter is the global one after round - 1.
        catch_up: what the client's base lacks of the base delta after round - 1.
        rank: how many components of the adapter this client trains; None: all.
        fresh: the run's seed, where the client draws the adapter itself instead of receiving it.
        anew: the server does not know what the client holds: it forgets its base delta, and the message brings all of it.
        accepted: the last round in which the client's update was part of the mean; what it trained since did not count.
        refused: why its last update was refused, where it was.
    """

    kind: Literal["train", "evaluate"]
    run: str
    round: int
    client: str
    method: str
    adapter: Adapter
    other: Mapping[str, Tensor]
    catch_up: CatchUp
    rank: int | None = None
    fresh: int | None = None
    anew: bool = False
    accepted: int = 0
    refused: str = ""


def encode_download(message: Download, omit: str = "") -> bytes:
    """The bytes of a download; `omit` names the factors ("A", "B", "AB") that the client has already, or draws itself."""
    tensors = _adapter_tensors(message.adapter, omit) | {f"other|{name}": tensor for name, tensor in message.other.items()}
    tensors |= _catch_up_tensors(message.catch_up) | _past_tensors(message.catch_up, message.adapter)
    header = Header(
        kind=message.kind,
        run=message.run,
        round=message.round,
        client=message.client,
        method=message.method,
        scalings={module: pair.scaling for module, pair in message.adapter.items()},
        since=message.catch_up.since,
        log_rounds=list(message.catch_up.log),
        halts=list(message.catch_up.halts),
        rank=message.rank,
        fresh=message.fresh,
        anew=message.anew,
        accepted=message.accepted,
        refused=message.refused,
    )
    return _encode(header, tensors)


def decode_download(payload: bytes, known: Adapter | None = None) -> Download:
    """A download from its bytes; factors that did not travel are taken from `known`, or drawn in its shapes where the server says so.

    Raises:
        WireError: truncated or altered, or it contradicts itself: see `read_table`, `_catch_up` and `require_whole`.
    """
    header, _ = _table(payload, 2**20 + len(payload) // 2)
    tensors = _tensors(payload)
    if header.kind == "update":
        raise WireError("expected a download, got an update: is this message going the wrong way?")
    known = known or {}
    if header.fresh is not None:
        known = fresh_adapter(known, header.fresh, header.round - 1)
    _require_finite(tensors)
    adapter = _adapter(header, _adapter_tensors(known) | tensors)
    return Download(
        kind=header.kind,
        run=header.run,
        round=header.round,
        client=header.client,
        method=header.method,
        adapter=adapter,
        other=_other(tensors),
        catch_up=_catch_up(header, tensors, adapter),
        rank=header.rank,
        fresh=header.fresh,
        anew=header.anew,
        accepted=header.accepted,
        refused=header.refused,
    )


def encode_update(update: ClientUpdate, run: str, round: int, method: str, omit: str = "", base: int | None = None) -> bytes:
    """The bytes of a client's upload.

    Args:
        update: what it trained.
        run, round, method: as in the download.
        omit: the factors that stay: frozen in this round (the server knows them), or private.
        base: the version of the base that it trained on; None: that of the round.
    """
    tensors = _adapter_tensors(update.adapter, omit) | {f"other|{name}": tensor for name, tensor in update.other.items()}
    header = Header(
        kind="update",
        run=run,
        round=round,
        base_version=round - 1 if base is None else base,
        client=update.client_id,
        method=method,
        scalings={module: pair.scaling for module, pair in update.adapter.items()},
        num_examples=update.num_examples,
        metrics={name: float(value) for name, value in update.metrics.items() if abs(value) <= LARGEST},
    )
    return _encode(header, tensors)


def decode_update(payload: bytes, sent: Download, omit: str = "", max_examples: int = EXAMPLES) -> ClientUpdate:
    """A client's update, if it answers `sent`: same run, round, base, client, method, scalings, names, shapes and dtypes, all finite.

    Args:
        payload: the bytes that arrived.
        sent: the download that they answer.
        omit: the factors that did not travel; they are taken from `sent`.
        max_examples: of one client.

    Raises:
        WireError: with the first thing that is wrong. No tensor is made before size, names, shapes and dtypes are right.
    """
    adapter, other = (sent.adapter, sent.other) if sent.kind == "train" else ({}, {})  # an evaluation answers with numbers only
    if sent.rank is not None:
        adapter = {module: pair.first(sent.rank) for module, pair in adapter.items()}
    expected = _adapter_tensors(adapter, omit) | {f"other|{name}": tensor for name, tensor in other.items()}
    header = _require_declared(payload, expected)
    for name, here, there in (
        ("kind", header.kind, "update"),
        ("run", header.run, sent.run),
        ("round", header.round, sent.round),
        ("base version", header.base_version, sent.catch_up.version),
        ("client", header.client, sent.client),
        ("method", header.method, sent.method),
        ("scalings", header.scalings, {module: pair.scaling for module, pair in adapter.items()}),
    ):
        if here != there:
            raise WireError(f"the update's {name} is {shown(here)}, this round declared {shown(there)}")
    _require_countable(header, sent.kind, max_examples)
    tensors = _tensors(payload)
    _require_finite(tensors)
    tensors = _adapter_tensors(adapter) | tensors
    return ClientUpdate(
        client_id=header.client,
        adapter=_adapter(header, tensors),
        num_examples=header.num_examples,
        other=_other(tensors),
        metrics=header.metrics,
    )


def round_of(payload: bytes, sent: Download) -> int | None:
    """The round that an update says it is of; None where it says nothing that can be read, or more than an answer to `sent` could."""
    declared = _adapter_tensors(sent.adapter) | {f"other|{name}": tensor for name, tensor in sent.other.items()}
    try:
        return _table(payload, declared_bytes(declared)[0])[0].round
    except WireError:
        return None


def declared_bytes(expected: Mapping[str, Tensor]) -> tuple[int, int]:
    """The most bytes that the header, and the whole, of a message with these tensors may have."""
    header = HEADER + sum(256 + 4 * len(name) for name in expected)
    return header, 8 + header + sum(tensor.numel() * tensor.element_size() for tensor in expected.values())


def _require_countable(header: Header, kind: str, most: int) -> None:
    if not (kind == "evaluate" or header.num_examples) or header.num_examples > most:
        raise WireError(f"num_examples is {header.num_examples}: it must be from 1 to messages.max_examples = {most}")
    rows = header.metrics.get("held_out_rows", 0)
    if not 0 <= rows <= most:
        raise WireError(f"held_out_rows is {rows:g}: it must be from 0 to messages.max_examples = {most}")


def _adapter_tensors(adapter: Adapter, omit: str = "") -> dict[str, Tensor]:
    return {f"adapter|{module}|{part}": getattr(pair, part) for part in "AB" if part not in omit for module, pair in adapter.items()}


def _catch_up_tensors(message: CatchUp) -> dict[str, Tensor]:
    """`log|ROUND|MODULE|U`, `gain|MODULE|U`, each with its V; `snapshot|MODULE|PART` (see `aggregation.lowrank.parts`)."""
    forms: dict[str, Delta] = {f"log|{number}|{module}": gain for number, gains in message.log.items() for module, gain in gains.items()}
    forms |= {f"gain|{module}": gain for module, gain in message.gain.items()}
    forms |= {f"snapshot|{module}": delta for module, delta in message.snapshot.items()}
    return {f"{name}|{part}": tensor for name, delta in forms.items() for part, tensor in parts(delta).items()}


def _past_tensors(message: CatchUp, adapter: Adapter) -> dict[str, Tensor]:
    """`past|ROUND|MODULE|B` of the adapters of past rounds, and A where it is not that of the present one."""
    tensors: dict[str, Tensor] = {}
    for number, past in message.adapters.items():
        for module, pair in past.items():
            tensors[f"past|{number}|{module}|B"] = pair.B.clone()  # after a skipped round it may be the present one
            if not torch.equal(pair.A, adapter[module].A):
                tensors[f"past|{number}|{module}|A"] = pair.A.clone()
    return tensors


def _past(header: Header, tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[int, dict[str, LoRAPair]]:
    """The adapters of past rounds, of the shapes of the present one.

    Raises:
        WireError: else, or a round that the log does not have.
    """
    past: dict[int, dict[str, LoRAPair]] = {}
    for name, tensor in tensors.items():
        if not name.startswith("past|"):
            continue
        number, _, rest = name.removeprefix("past|").partition("|")
        module, _, part = rest.rpartition("|")
        now = getattr(adapter[module], part) if module in adapter and part in ("A", "B") else None
        known = now is not None and now.shape == tensor.shape and now.dtype == tensor.dtype
        if number not in map(str, header.log_rounds[:-1]) or not known:
            raise WireError(
                f"tensor {shown(name)} {list(tensor.shape)} is no factor of a past round's adapter: is the message of another run?"
            )
        found = past.setdefault(int(number), {})
        pair = found.get(module, adapter[module])
        found[module] = replace(pair, A=tensor) if part == "A" else replace(pair, B=tensor)
    return past


def _catch_up(header: Header, tensors: Mapping[str, Tensor], adapter: Adapter) -> CatchUp:
    """What the base lacks, with modules and shapes those of the adapter.

    Raises:
        WireError: else; or half of a product, a tensor of no form, or what `require_whole` refuses.
    """
    log: dict[int, dict[str, LowRank]] = {number: {} for number in header.log_rounds}
    gain: dict[str, LowRank] = {}
    snapshot: dict[str, Delta] = {}
    for place, delta in _deltas(tensors).items():
        form, _, module = place.partition("|")
        number, _, logged = module.partition("|")
        rounds = {str(number): gains for number, gains in log.items()}
        if form == "log" and number in rounds and isinstance(delta, LowRank):
            module = logged
            rounds[number][module] = delta
        elif form == "gain" and isinstance(delta, LowRank):
            gain[module] = delta
        elif form == "snapshot":
            snapshot[module] = delta
        else:
            raise WireError(f"tensor {place[:200]!r} has no place in a download with the log of rounds {header.log_rounds[:20]}")
        if module not in adapter or adapter[module].shape != delta.shape:
            ours = adapter[module].shape if module in adapter else "no such module"
            raise WireError(f"{place[:200]!r} is {delta.shape} and the adapter has {ours}: is the message of another model?")
    past = _past(header, tensors, adapter)
    message = CatchUp(header.since, header.round - 1, log, gain, snapshot, past, header.halts)
    require_whole(message)
    return message


def _deltas(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """FORM|...|MODULE -> the delta that its parts make."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(("adapter|", "other|", "past|")):
            place, _, part = name.rpartition("|")
            found.setdefault(place, {})[part] = tensor
    deltas: dict[str, Delta] = {}
    for place, made_of in found.items():
        try:
            deltas[place] = from_parts(made_of)
        except ValueError as error:
            raise WireError(f"{place[:200]!r} has {error}") from None
    return deltas


def _other(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("other|"): tensor for name, tensor in tensors.items() if name.startswith("other|")}


def _adapter(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, LoRAPair]:
    """The pairs that the header names.

    Raises:
        WireError: a factor is missing, or the two of a module do not chain.
    """
    try:
        return {
            module: LoRAPair(A=tensors[f"adapter|{module}|A"], B=tensors[f"adapter|{module}|B"], scaling=scaling)
            for module, scaling in header.scalings.items()
        }
    except KeyError as error:
        raise LacksError(f"{shown(error.args[0])} did not travel and is not known here: send the whole adapter") from None
    except AggregationError as error:
        raise WireError(f"the message's adapter is wrong: {error}") from None


def _encode(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return seal(save(plain, metadata={"header": header.model_dump_json()}))


def _table(payload: bytes, header_limit: int) -> tuple[Header, dict[str, Entry]]:
    """What the message says of itself and of its tensors, before one is made of it."""
    text, entries = read_table(payload, header_limit)
    try:
        strict_json(text)
        header = Header.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "header"
        raise WireError(f"the message's header is wrong: {shown(where)[1:-1]}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise WireError("the message's header is wrong: it is not JSON") from None
    if header.schema_version != SCHEMA:
        raise WireError(f"the message has schema {header.schema_version}, this version speaks {SCHEMA}: use one version everywhere")
    return header, entries


def _tensors(payload: bytes) -> dict[str, Tensor]:
    require_sealed(payload)
    try:
        return load(payload)
    except SafetensorError as error:
        raise WireError(f"the message is not valid safetensors: {shown(str(error))}") from None


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WireError(f"tensor {shown(name)} holds NaN or infinity")


DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}


def _require_declared(payload: bytes, expected: Mapping[str, Tensor]) -> Header:
    """Size, names, shapes and dtypes as declared, before a tensor is made of the message."""
    header_limit, limit = declared_bytes(expected)
    if len(payload) > limit:
        raise WireError(f"{len(payload)} bytes arrived where at most {limit} were declared")
    header, entries = _table(payload, header_limit)
    require_same_names(list(entries), list(expected))
    for name, tensor in expected.items():
        entry = entries[name]
        if entry.shape != tuple(tensor.shape):
            raise WireError(f"tensor {shown(name)} has shape {list(entry.shape)}, declared was {list(tensor.shape)}")
        if entry.dtype != DTYPES[tensor.dtype]:
            raise WireError(f"tensor {shown(name)} has dtype {entry.dtype}, declared was {DTYPES[tensor.dtype]}")
    return header
