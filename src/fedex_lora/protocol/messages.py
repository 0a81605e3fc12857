"""Messages to bytes and back: an envelope of one client and a body of tensors, safetensors and never pickle.

A request's body carries the global adapter, the other trained tensors and what the client's base lacks (`catch_up`): the same bytes for
every client of one version. An answer's body carries what the client trained. Whatever arrives is checked against what the round
declared before anything is computed with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import save
from torch import Tensor

from fedex_lora.aggregation.flatten import flatten_adapter, scalings_of, under, unflatten_adapter
from fedex_lora.aggregation.lowrank import finite
from fedex_lora.aggregation.server_state import fresh_adapter
from fedex_lora.errors import AggregationError, LacksError, WireError
from fedex_lora.protocol.delta_sync import CatchUp
from fedex_lora.protocol.dumps import apart
from fedex_lora.protocol.envelopes import ENVELOPE, Encoded, envelope_of, message
from fedex_lora.protocol.frame import BodyEntry, digest, read_body_table, shown
from fedex_lora.protocol.records import LARGEST, Answer, BodyHeader, Request, parse_header, uncountable
from fedex_lora.protocol.sync_tensors import catch_up_of, catch_up_tensors
from fedex_lora.types import Adapter, ClientUpdate, LoRAPair

EXAMPLES = 10_000_000  # of one client, at most, where the configuration says nothing
HEADER = 8192  # bytes of JSON, beside what the declared tensors need
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Body:
    """What the clients of one version are sent.

    Attributes:
        method: the run's.
        adapter: the global one after the last round; of a body as it arrived, the factors that travelled are in it.
        other: the other trained tensors.
        catch_up: what the clients' base lacks of the base delta after that round.
        reinit_seed: the run's seed, where clients draw the adapter themselves instead of receiving it.
    """

    method: str
    adapter: Adapter
    other: Mapping[str, Tensor]
    catch_up: CatchUp
    reinit_seed: int | None = None


@dataclass(frozen=True, eq=False)
class Download:
    """What one client is asked: the envelope and the body of one message."""

    request: Request
    body: Body


def encode_body(body: Body, omit: str = "") -> Encoded:
    """The bytes of a request's body; `omit` names the factors ("A", "B", "AB") that the clients have already, or draw themselves."""
    tensors = flatten_adapter("adapter", body.adapter, omit) | {f"other|{name}": tensor for name, tensor in body.other.items()}
    tensors |= catch_up_tensors(body.catch_up, body.adapter)
    header = BodyHeader(
        method=body.method,
        scalings=scalings_of(body.adapter),
        since=body.catch_up.since,
        version=body.catch_up.version,
        log_rounds=list(body.catch_up.log),
        halts=list(body.catch_up.halts),
        reinit_seed=body.reinit_seed,
    )
    return _encode(header, tensors)


def decode_body(body: memoryview, declared: str, known: Adapter | None = None) -> Body:
    """A request's body from its bytes; factors that did not travel are taken from `known`, or drawn in its shapes where it says so.

    Args:
        body: the bytes.
        declared: their digest, as the envelope has it.
        known: the client's own copy of the global adapter.

    Raises:
        WireError: truncated or altered, or it contradicts itself: see `read_body_table` and `catch_up_of`.
    """
    text, entries = read_body_table(body, 2**20 + len(body) // 2)
    header = parse_header(text)
    tensors = _tensors(body, entries, declared)
    known = known or {}
    if header.reinit_seed is not None:
        known = fresh_adapter(known, header.reinit_seed, header.version)
    adapter = _adapter(header.scalings, flatten_adapter("adapter", known) | tensors)
    catch_up = catch_up_of(header.since, header.version, header.log_rounds, header.halts, tensors, adapter)
    return Body(header.method, adapter, under("other", tensors), catch_up, header.reinit_seed)


def encode_update(update: ClientUpdate, sent: Request, method: str, base_version: int, omit: str = "", base: str = "") -> bytes:
    """The bytes of a client's update.

    Args:
        update: what it trained; of an evaluation, numbers only.
        sent: the request that it answers.
        method: the run's.
        base_version: of the base that it trained on.
        omit: the factors that stay: frozen in this round (the server knows them), or private.
        base: the name of its base.
    """
    tensors = flatten_adapter("adapter", update.adapter, omit) | {f"other|{name}": tensor for name, tensor in update.other.items()}
    answer = Answer(
        run=sent.run,
        round=sent.round,
        client=update.client_id,
        phase=sent.kind,
        base_version=base_version,
        num_examples=update.num_examples,
        metrics={name: float(value) for name, value in update.metrics.items() if abs(value) <= LARGEST},
        base=base,
    )
    return message(answer, _encode(BodyHeader(method=method, scalings=scalings_of(update.adapter)), tensors))


def decode_update(payload: bytes, sent: Download, omit: str = "", max_examples: int = EXAMPLES) -> ClientUpdate:
    """A client's update, if it answers `sent`: same run, round, base, client, method, scalings, names, shapes and dtypes, all finite.

    Args:
        payload: the bytes that arrived.
        sent: what they answer.
        omit: the factors that did not travel; they are taken from `sent`.
        max_examples: of one client.

    Raises:
        WireError: with the first thing that is wrong. No tensor is made before size, names, shapes and dtypes are right.
    """
    request, body = sent.request, sent.body
    adapter, other = (body.adapter, body.other) if request.kind == "train" else ({}, {})  # an evaluation answers with numbers only
    if request.rank is not None:
        adapter = {module: pair.first(request.rank) for module, pair in adapter.items()}
    expected = flatten_adapter("adapter", adapter, omit) | {f"other|{name}": tensor for name, tensor in other.items()}
    header_limit, most = declared_bytes(expected)
    if len(payload) > most:
        raise WireError(f"{len(payload)} bytes arrived where at most {most} were declared")
    answer, bytes_of = envelope_of(payload, Answer)
    text, entries = read_body_table(bytes_of, header_limit)
    header = parse_header(text)
    _require_declared(entries, expected)
    for name, here, there in (
        ("run", answer.run, request.run),
        ("round", answer.round, request.round),
        ("base version", answer.base_version, body.catch_up.version),
        ("client", answer.client, request.client),
        ("phase", answer.phase, request.kind),
        ("method", header.method, body.method),
        ("scalings", header.scalings, scalings_of(adapter)),
    ):
        if here != there:
            raise WireError(f"the update's {name} is {shown(here)}, this round declared {shown(there)}")
    if wrong := uncountable(answer.num_examples, request.kind, max_examples):
        raise WireError(wrong)
    if not 0 <= (rows := answer.metrics.get("held_out_rows", 0)) <= max_examples:
        raise WireError(f"held_out_rows is {rows:g}: it must be from 0 to messages.max_examples = {max_examples}")
    tensors = _tensors(bytes_of, entries, answer.body)
    return ClientUpdate(
        client_id=answer.client,
        adapter=_adapter(header.scalings, flatten_adapter("adapter", adapter) | tensors),
        num_examples=answer.num_examples,
        other=under("other", tensors),
        metrics=answer.metrics,
    )


def declared_bytes(expected: Mapping[str, Tensor]) -> tuple[int, int]:
    """The most bytes that the header of the body, and the whole, of an answer with these tensors may have."""
    header = HEADER + sum(256 + 4 * len(name) for name in expected)
    return header, 64 + ENVELOPE + header + sum(tensor.numel() * tensor.element_size() for tensor in expected.values())


def _require_declared(entries: Mapping[str, BodyEntry], expected: Mapping[str, Tensor]) -> None:
    """Names, shapes and dtypes as declared, before a tensor is made of the message."""
    for what, names in (("not declared", entries.keys() - expected.keys()), ("missing", expected.keys() - entries.keys())):
        if names:
            raise WireError(f"tensor {shown(min(names))} is {what} ({len(names)} such in all)")
    for name, tensor in expected.items():
        entry = entries[name]
        if entry.shape != tuple(tensor.shape):
            raise WireError(f"tensor {shown(name)} has shape {list(entry.shape)}, declared was {list(tensor.shape)}")
        if entry.dtype != DTYPES[tensor.dtype]:
            raise WireError(f"tensor {shown(name)} has dtype {entry.dtype}, declared was {DTYPES[tensor.dtype]}")


def _adapter(scalings: Mapping[str, float], tensors: Mapping[str, Tensor]) -> dict[str, LoRAPair]:
    """The pairs that the header names.

    Raises:
        WireError: a factor is missing, or the two of a module do not chain.
    """
    try:
        return unflatten_adapter("adapter", scalings, tensors)
    except KeyError as error:
        raise LacksError(f"{shown(error.args[0])} did not travel and is not known here: send the whole adapter") from None
    except AggregationError as error:
        raise WireError(f"the message's adapter is wrong: {error}") from None


def _encode(header: BodyHeader, tensors: Mapping[str, Tensor]) -> Encoded:
    payload = save(apart(tensors), metadata={"header": header.model_dump_json()})
    return Encoded(payload, digest(payload))


def _tensors(body: memoryview, entries: Mapping[str, BodyEntry], declared: str) -> dict[str, Tensor]:
    """The tensors of a body, each with memory of its own: safetensors' `load`, from a table that was checked, and with one copy less.

    Raises:
        WireError: the body is not the one that was declared, a dtype is not one of factors, or a number is not finite.
    """
    if digest(body) != declared:  # against accidents: who alters a message on purpose can name the new digest
        raise WireError("the message's checksum is wrong: it was altered on the way; send it again")
    data, tensors = body[len(body) - max((entry.end for entry in entries.values()), default=0) :], dict[str, Tensor]()
    for name, entry in entries.items():
        if entry.dtype not in _TORCH:
            raise WireError(f"tensor {shown(name)} has dtype {entry.dtype}, which no message has")
        dtype = _TORCH[entry.dtype]
        part = bytearray(data[entry.begin : entry.end])
        tensors[name] = torch.frombuffer(part, dtype=dtype).reshape(entry.shape) if part else torch.empty(entry.shape, dtype=dtype)
        if not finite(tensors[name]):
            raise WireError(f"tensor {shown(name)} holds NaN or infinity")
    return tensors
