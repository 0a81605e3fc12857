"""Messages to bytes and back: safetensors (never pickle) with a small JSON header in its metadata.

A download carries the global adapter, the other trained tensors and what the client's base lacks (`catch_up`); to a client of the last
round it may carry only what the client cannot work out from its own factors (`completed`). An upload carries what the client trained.
Whatever arrives is checked against what the round declared before anything is computed with it.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedex_lora.aggregation import derive_seed, fresh_a
from fedex_lora.catch_up import CatchUp, require_whole, with_own
from fedex_lora.errors import AggregationError, WireError
from fedex_lora.types import Adapter, ClientUpdate, Delta, Dense, LoRAPair, LowRank

SCHEMA = 1


class Header(BaseModel):
    """What a message says of itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA
    kind: Literal["train", "evaluate", "update"]
    run: str
    round: int = Field(ge=0)
    client: str
    method: str
    scalings: dict[str, float] = {}
    num_examples: int = Field(0, ge=0)
    metrics: dict[str, float] = {}
    since: int = Field(0, ge=0)
    log_rounds: list[int] = []
    share: float | None = Field(None, ge=0, lt=1)
    rank: int | None = Field(None, ge=1)
    fresh: int | None = Field(None, ge=0)


@dataclass(frozen=True, eq=False)
class Download:
    """Server to client: go on from here.

    Attributes:
        kind: "train" (evaluate what arrives, then train), or "evaluate" (only that).
        round: the round that is going on, from 1; the adapter is the global one after round - 1.
        catch_up: what the client's base lacks of the base delta after round - 1.
        rank: how many components of the adapter this client trains; None: all.
        fresh: the run's seed, where the client draws the adapter itself instead of receiving it.
        share: p_i of this client in the last round, where adapter and gain are those of the others: `completed` adds its own.
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
    share: float | None = None


def encode_download(message: Download, omit: str = "") -> bytes:
    """The bytes of a download; `omit` names the factors ("A", "B", "AB") that the client has already, or draws itself."""
    tensors = _adapter_tensors(message.adapter, omit) | {f"other|{name}": tensor for name, tensor in message.other.items()}
    tensors |= _catch_up_tensors(message.catch_up)
    header = Header(
        kind=message.kind,
        run=message.run,
        round=message.round,
        client=message.client,
        method=message.method,
        scalings={module: pair.scaling for module, pair in message.adapter.items()},
        since=message.catch_up.since,
        log_rounds=list(message.catch_up.log),
        rank=message.rank,
        fresh=message.fresh,
        share=message.share,
    )
    return _encode(header, tensors)


def decode_download(payload: bytes, known: Adapter | None = None) -> Download:
    """A download from its bytes; factors that did not travel are taken from `known`, or drawn in its shapes where the server says so.

    Raises:
        WireError: truncated, or it contradicts itself: see `_catch_up` and `require_whole`.
    """
    header, tensors = _decode(payload)
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
        share=header.share,
    )


def completed(message: Download, own: Adapter | None) -> Download:
    """The whole message, from one that counts on the factors which the client trained in the last round (see `catch_up.with_own`)."""
    if message.share is None:
        return message
    adapter, catch_up = with_own(message.adapter, message.catch_up, message.share, own)
    return replace(message, adapter=adapter, catch_up=catch_up, share=None)


def fresh_adapter(like: Adapter, seed: int, round: int) -> dict[str, LoRAPair]:
    """The adapter that a method with new factors goes on with after `round`, in the shapes of `like`: A drawn, B zero."""
    drawn = derive_seed(seed, round, "fresh")
    return {
        module: LoRAPair(
            A=fresh_a(module, pair.rank, pair.shape[1], drawn).to(pair.A.dtype), B=torch.zeros_like(pair.B), scaling=pair.scaling
        )
        for module, pair in like.items()
    }


def encode_update(update: ClientUpdate, run: str, round: int, method: str, omit: str = "") -> bytes:
    """The bytes of a client's upload; `omit` names the factors that stay: frozen in this round (the server knows them), or private."""
    tensors = _adapter_tensors(update.adapter, omit) | {f"other|{name}": tensor for name, tensor in update.other.items()}
    header = Header(
        kind="update",
        run=run,
        round=round,
        client=update.client_id,
        method=method,
        scalings={module: pair.scaling for module, pair in update.adapter.items()},
        num_examples=update.num_examples,
        metrics={name: float(value) for name, value in update.metrics.items() if math.isfinite(value)},
    )
    return _encode(header, tensors)


def decode_update(payload: bytes, sent: Download, omit: str = "") -> ClientUpdate:
    """A client's update, if it answers `sent`: same run, round, client, method, scalings, names, shapes and dtypes, all finite.

    Args:
        payload: the bytes that arrived.
        sent: the download that they answer.
        omit: the factors that did not travel; they are taken from `sent`.

    Raises:
        WireError: with the first thing that is wrong. Nothing is decoded when the size alone is wrong.
    """
    adapter, other = (sent.adapter, sent.other) if sent.kind == "train" else ({}, {})  # an evaluation answers with numbers only
    if sent.rank is not None:
        adapter = {module: pair.first(sent.rank) for module, pair in adapter.items()}
    expected = _adapter_tensors(adapter, omit) | {f"other|{name}": tensor for name, tensor in other.items()}
    _require_declared(payload, expected)
    header, tensors = _decode(payload)
    for name, here, there in (
        ("kind", header.kind, "update"),
        ("run", header.run, sent.run),
        ("round", header.round, sent.round),
        ("client", header.client, sent.client),
        ("method", header.method, sent.method),
        ("scalings", header.scalings, {module: pair.scaling for module, pair in adapter.items()}),
    ):
        if here != there:
            raise WireError(f"the update's {name} is {here!r}, this round declared {there!r}")
    _require_finite(tensors)
    tensors = _adapter_tensors(adapter) | tensors
    return ClientUpdate(
        client_id=header.client,
        adapter=_adapter(header, tensors),
        num_examples=header.num_examples,
        other=_other(tensors),
        metrics=header.metrics,
    )


def _adapter_tensors(adapter: Adapter, omit: str = "") -> dict[str, Tensor]:
    return {f"adapter|{module}|{part}": getattr(pair, part) for part in "AB" if part not in omit for module, pair in adapter.items()}


def _catch_up_tensors(message: CatchUp) -> dict[str, Tensor]:
    """`log|ROUND|MODULE|U`, `gain|MODULE|U`, `snapshot|MODULE|U`, each with its V; or `snapshot|MODULE|W`."""
    forms: dict[str, Delta] = {f"log|{number}|{module}": gain for number, gains in message.log.items() for module, gain in gains.items()}
    forms |= {f"gain|{module}": gain for module, gain in message.gain.items()}
    forms |= {f"snapshot|{module}": delta for module, delta in message.snapshot.items()}
    tensors: dict[str, Tensor] = {}
    for name, delta in forms.items():
        tensors |= {f"{name}|W": delta.W} if isinstance(delta, Dense) else {f"{name}|U": delta.U, f"{name}|V": delta.V}
    return tensors


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
    message = CatchUp(since=header.since, version=header.round - 1, log=log, gain=gain, snapshot=snapshot)
    require_whole(message)
    return message


def _deltas(tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    """FORM|...|MODULE -> the product of its U and V, or its W."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(("adapter|", "other|")):
            place, _, part = name.rpartition("|")
            parts.setdefault(place, {})[part] = tensor
    deltas: dict[str, Delta] = {}
    for place, found in parts.items():
        shapes = {part: tuple(tensor.shape) for part, tensor in found.items()}
        if not all(tensor.ndim == 2 and tensor.is_floating_point() for tensor in found.values()):
            raise WireError(f"{place[:200]!r} has {shapes}, which are no matrices of floating-point numbers")
        if found.keys() == {"W"}:
            deltas[place] = Dense(W=found["W"])
        elif found.keys() == {"U", "V"} and shapes["U"][1] == shapes["V"][0]:
            deltas[place] = LowRank(U=found["U"], V=found["V"])
        else:
            raise WireError(f"{place[:200]!r} has {shapes}: it must be U and V that chain, or W alone")
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
        raise WireError(f"{error.args[0]} did not travel and is not known here: send the whole adapter") from None
    except AggregationError as error:
        raise WireError(f"the message's adapter is wrong: {error}") from None


def _encode(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, metadata={"header": header.model_dump_json()})


def _json_header(payload: bytes) -> dict[str, Any]:
    """The JSON at the start of a safetensors file, bounded by the payload's own size."""
    if len(payload) < 8:
        raise WireError(f"a message of {len(payload)} bytes is too short")
    (size,) = struct.unpack("<Q", payload[:8])
    if size > len(payload) - 8:
        raise WireError("the message is truncated, or its header is a lie")
    try:
        header = json.loads(payload[8 : 8 + size])
    except (ValueError, RecursionError):
        raise WireError("the message has no readable header") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise WireError("the message has no header of this protocol")
    return header


def _decode(payload: bytes) -> tuple[Header, dict[str, Tensor]]:
    try:
        header = Header.model_validate_json(_json_header(payload)["__metadata__"].get("header", ""))
    except ValidationError as error:
        first = error.errors()[0]
        raise WireError(f"the message's header is wrong: {'.'.join(map(str, first['loc'])) or 'header'}: {first['msg']}") from None
    if header.schema_version != SCHEMA:
        raise WireError(f"the message has schema {header.schema_version}, this version speaks {SCHEMA}: use one version everywhere")
    try:
        return header, load(payload)
    except SafetensorError as error:
        raise WireError(f"the message is not valid safetensors: {error}") from None


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WireError(f"tensor {name[:200]} holds NaN or infinity")


DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}


def _require_declared(payload: bytes, expected: Mapping[str, Tensor], header_bytes: int = 2**20) -> None:
    """Size, names, shapes and dtypes as declared, from the message's own JSON, before a tensor is made of it."""
    limit = sum(tensor.numel() * tensor.element_size() for tensor in expected.values()) + header_bytes + 512 * len(expected)
    if len(payload) > limit:
        raise WireError(f"{len(payload)} bytes arrived where at most {limit} were declared")
    entries = _json_header(payload)
    _require_same_names(set(entries) - {"__metadata__"}, set(expected))
    for name, tensor in expected.items():
        entry = entries[name] if isinstance(entries[name], dict) else {}
        if entry.get("shape") != list(tensor.shape):
            raise WireError(f"tensor {name} has shape {entry.get('shape')}, declared was {list(tensor.shape)}")
        if entry.get("dtype") != DTYPES[tensor.dtype]:
            raise WireError(f"tensor {name} has dtype {entry.get('dtype')}, declared was {DTYPES[tensor.dtype]}")


def _require_same_names(here: set[str], there: set[str]) -> None:
    odd: Sequence[str] = sorted(here ^ there)
    if odd:
        raise WireError(f"tensor {odd[0][:200]!r} is {'not declared' if odd[0] in here else 'missing'} ({len(odd)} such in all)")
