"""Messages to bytes and back: safetensors (never pickle) with a small JSON header in its metadata.

A download carries the global adapter, the other trained tensors and the residuals that the client lacks (the factor log from
its version of the base to the round's). An upload carries what the client trained. Whatever arrives is checked against what
the round declared before anything is computed with it.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedex_lora.aggregation import derive_seed, fresh_a
from fedex_lora.errors import WireError
from fedex_lora.types import Adapter, ClientUpdate, LoRAPair, LowRank

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
    residual_rounds: list[int] = []
    rank: int | None = Field(None, ge=1)
    fresh: int | None = Field(None, ge=0)


@dataclass(frozen=True, eq=False)
class Download:
    """Server to client: go on from here.

    Attributes:
        kind: "train" (evaluate what arrives, then train), or "evaluate" (only that).
        round: the round that is going on, from 1; the adapter is the global one after round - 1.
        residuals: round -> what the base gained in it, for every round that the client's base lacks.
        rank: how many components of the adapter this client trains; None: all.
        fresh: the run's seed, where the client draws the adapter itself instead of receiving it.
    """

    kind: Literal["train", "evaluate"]
    run: str
    round: int
    client: str
    method: str
    adapter: Adapter
    other: Mapping[str, Tensor]
    residuals: Mapping[int, Mapping[str, LowRank]] = field(default_factory=dict)
    rank: int | None = None
    fresh: int | None = None


def encode_download(message: Download, omit: str = "") -> bytes:
    """The bytes of a download; `omit` names the factors ("A", "B", "AB") that the client has already, or draws itself."""
    tensors = _adapter_tensors(message.adapter, omit) | {f"other|{name}": tensor for name, tensor in message.other.items()}
    for number, residual in message.residuals.items():
        for module, gain in residual.items():
            tensors |= {f"residual|{number}|{module}|U": gain.U, f"residual|{number}|{module}|V": gain.V}
    header = Header(
        kind=message.kind,
        run=message.run,
        round=message.round,
        client=message.client,
        method=message.method,
        scalings={module: pair.scaling for module, pair in message.adapter.items()},
        residual_rounds=list(message.residuals),
        rank=message.rank,
        fresh=message.fresh,
    )
    return _encode(header, tensors)


def decode_download(payload: bytes, known: Adapter | None = None) -> Download:
    """A download from its bytes; factors that did not travel are taken from `known`, or drawn in its shapes where the server says so."""
    header, tensors = _decode(payload)
    if header.kind == "update":
        raise WireError("expected a download, got an update: is this message going the wrong way?")
    known = known or {}
    if header.fresh is not None:
        known = fresh_adapter(known, header.fresh, header.round - 1)
    residuals: dict[int, dict[str, LowRank]] = {number: {} for number in header.residual_rounds}
    for name in tensors:
        if name.startswith("residual|") and name.endswith("|U"):
            _, number, module, _ = name.split("|")
            residuals[int(number)][module] = LowRank(U=tensors[name], V=tensors[f"{name[:-1]}V"])
    return Download(
        kind=header.kind,
        run=header.run,
        round=header.round,
        client=header.client,
        method=header.method,
        adapter=_adapter(header, _adapter_tensors(known) | tensors),
        other=_other(tensors),
        residuals=residuals,
        rank=header.rank,
        fresh=header.fresh,
    )


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
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise WireError(f"tensor {name} holds NaN or infinity")
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


def _other(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("other|"): tensor for name, tensor in tensors.items() if name.startswith("other|")}


def _adapter(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, LoRAPair]:
    return {
        module: LoRAPair(A=tensors[f"adapter|{module}|A"], B=tensors[f"adapter|{module}|B"], scaling=scaling)
        for module, scaling in header.scalings.items()
    }


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
