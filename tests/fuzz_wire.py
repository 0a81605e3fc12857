"""A fuzz campaign on what arrives: mutated messages are refused with a WireError, or are what was sent, byte for byte.

    python -m tests.fuzz_wire 100000

Half of the mutants are sealed again (their checksum is right), as by somebody who means it: those may be another valid message, and what
is decoded then must be what a plain reader finds in the bytes, with the names, shapes, dtypes and limits that were declared.
"""

import json
import random
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from tests.conftest import make_pair
from tests.messages import bounds, parts, sealed, split_roughly, with_table

from fedex_lora.errors import WireError
from fedex_lora.protocol.delta_sync import CatchUp
from fedex_lora.protocol.envelopes import envelope_of, message
from fedex_lora.protocol.frame import PREFIX, digest, join
from fedex_lora.protocol.messages import Body, Download, decode_body, decode_update, encode_body, encode_update
from fedex_lora.protocol.records import Request
from fedex_lora.types import ClientUpdate, LowRank

SECONDS = 1.0
SLACK = 2**14  # bytes, for Python's own small objects (an exception, a validator's message)


@dataclass(frozen=True)
class Subject:
    """Messages of one direction: a valid one, others to splice with, those that may be accepted unsealed, and how they are read."""

    valid: bytes
    others: tuple[bytes, ...]
    whole: tuple[bytes, ...]
    decode: Callable[[bytes], ClientUpdate | Download]

    @property
    def declared(self):
        return len(self.valid)


def adapters(seed):
    return {f"layer.{i}.q": make_pair(seed + i, out, inner, 16) for i, (out, inner) in enumerate(((128, 192), (192, 128), (128, 128)))}


def subjects():
    """An update, and a download with a log, a gain and a snapshot."""
    head = {"head.weight": torch.randn(4, 128, generator=torch.Generator().manual_seed(1))}
    gain = {name: LowRank(pair.B, pair.A) for name, pair in adapters(50).items()}
    log = CatchUp(since=1, version=2, log={2: {"layer.0.q": gain["layer.0.q"]}}, gain={"layer.1.q": gain["layer.1.q"]})
    request, body = Request(kind="train", run="run", round=3, client="a"), Body("fedex", adapters(0), head, log)
    sent = Download(request, body)
    update = ClientUpdate("a", adapters(9), 120, head, {"train_loss": 0.5, "held_out_rows": 7.0})
    up = encode_update(update, request, "fedex", 2)
    earlier, another = request.model_copy(update={"round": 2}), replace(update, client_id="b", adapter=adapters(30))
    ups = (encode_update(update, earlier, "fedex", 1), encode_update(another, request, "fedex", 2))
    down = message(request, encode_body(body))
    downs = (message(request, encode_body(replace(body, adapter=adapters(70)))), up)
    return {
        "update": Subject(up, ups, (up,), lambda payload: decode_update(payload, sent)),
        "download": Subject(down, downs, (down, downs[0]), decode_download),
    }


def decode_download(payload):
    """As a client reads it."""
    request, body = envelope_of(payload, Request, 2**20)
    return Download(request, decode_body(body, request.body))


def with_header(payload, text):
    """The message with another text as its body's table, and right lengths."""
    prefix, envelope, body = split_roughly(payload)
    return prefix + envelope + with_table(body, text)


def table_of(payload):
    """The text of the body's table."""
    body = split_roughly(payload)[2]
    begin, end = bounds(body)
    return body[begin:end]


def resealed(payload):
    """The message with right checksums, as far as it has an envelope."""
    _, envelope, body = split_roughly(payload)
    found = json.loads(envelope)
    return join(json.dumps({**found, "body": digest(body)}) if isinstance(found, dict) else envelope.decode(), body)


def flip(rng, payload, other):
    place = rng.randrange(len(payload))
    return payload[:place] + bytes([payload[place] ^ 1 << rng.randrange(8)]) + payload[place + 1 :]


def flip_header(rng, payload, other):
    _, envelope, body = split_roughly(payload)
    place = rng.choice((rng.randrange(PREFIX, PREFIX + len(envelope)), len(payload) - len(body) + rng.randrange(*bounds(body))))
    return payload[:place] + bytes([rng.choice(b'0129{}[]",:\\ \x00\xffaN-')]) + payload[place + 1 :]


def cut(rng, payload, other):
    place = rng.randrange(len(payload))
    return payload[:place] + payload[place + rng.choice((1, 7, 100, 10**6)) :]


def insert(rng, payload, other):
    place = rng.choice((rng.randrange(len(payload)), len(payload)))
    return payload[:place] + rng.randbytes(rng.choice((1, 8, 500))) + payload[place:]


def lie(rng, payload, other):
    """Another length of the envelope, or of the body's table."""
    length = rng.choice((0, 1, rng.randrange(5000), len(payload), 2**31, 2**32 - 1))
    if rng.random() < 0.5:
        return payload[:4] + struct.pack("<I", length) + payload[8:]
    prefix, envelope, body = split_roughly(payload)
    return prefix + envelope + struct.pack("<Q", rng.choice((length, 2**40, 2**64 - 1))) + body[8:]


def splice(rng, payload, other):
    place = rng.choice((8, PREFIX + len(split_roughly(payload)[1]), rng.randrange(len(payload))))
    return rng.choice((payload[:place] + other[place:], other[:place] + payload[place:]))


def retype(rng, payload, other):
    """Edit the table of tensors as JSON: offsets, shapes, dtypes, names; swapped between two tensors, or made up."""
    table = json.loads(table_of(payload))
    names = [name for name in table if name != "__metadata__"]
    one, two = rng.choice(names), rng.choice(names)
    field = rng.choice(("dtype", "shape", "data_offsets"))
    odd = (0, -1, 2**63, 10**30, 1.5, None, "x", [], [0], [1] * 9, [-1, 4], [0, 10**12], {}, True, "F64", "I8", [[1]])
    action = rng.randrange(5)
    if action == 0:
        table[one][field], table[two][field] = table[two][field], table[one][field]
    elif action == 1:
        table[one][field] = rng.choice(odd)
    elif action == 2:
        table[rng.choice(("../../etc/passwd", "a\nb", "x" * 5000, two + " ", "adapter|layer.9.q|A"))] = table.pop(one)
    elif action == 3:
        table[one][rng.choice(("extra", "shape "))] = rng.choice(odd)
    else:
        table[one]["shape"] = table[one]["shape"][::-1] if rng.random() < 0.5 else [*table[one]["shape"], 1]
    return with_header(payload, json.dumps(table, separators=(",", ":")).encode())


def retell(rng, payload, other):
    """Edit what the message says of itself."""
    envelope, body = parts(payload)
    table = json.loads(table_of(payload))
    header = json.loads(table["__metadata__"]["header"])
    odd = (-1, 0, 10**7 + 1, 10**30, 1e308, 0.5, "x", None, [], {}, True, "a\nb", {"event": 1.0}, {"rows": -1e308}, {"m": "x"}, [10**15])
    if rng.random() < 0.5:
        envelope[rng.choice((*envelope, "extra"))] = rng.choice(odd)
        return sealed(envelope, body)
    header[rng.choice((*header, "extra"))] = rng.choice(odd)
    table["__metadata__"]["header"] = json.dumps(header, separators=(",", ":"))
    return with_header(payload, json.dumps(table, separators=(",", ":")).encode())


def repeat(rng, payload, other):
    """A key twice, or deep nesting, or many small values, or spaces, in the header."""
    text = table_of(payload).rstrip()
    more = rng.choice((b',"a":' + b"[" * 3000, b',"a":[' + b"{}," * 2000 + b"{}]", b" " * 9000, b',"a":[' + b"9," * 4000 + b"9]"))
    again = text[text.rindex(b',"') :].rstrip(b"}") + b"}"
    return with_header(payload, rng.choice((text[:-1] + more + b"}", text[:-1] + again + b"}", text + b" " * 8)))


MUTATORS = (flip, flip_header, cut, insert, lie, splice, retype, retell, repeat)


def mutant(rng, subject):
    payload = subject.valid
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate = rng.choice(MUTATORS)
        try:
            payload = mutate(rng, payload, rng.choice(subject.others)) or b""
            names.append(mutate.__name__)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, struct.error, WireError):
            continue  # there is no JSON left to edit
    right = rng.random() < 0.5
    if right:
        try:
            payload = resealed(payload)
        except (ValueError, RecursionError, struct.error):
            right = False
    return payload, names, right or "retell" in names  # which seals what it says


def plain(payload):
    """Name -> dtype, shape, bytes: an independent reader."""
    _, _, body = split_roughly(payload)
    begin, end = bounds(body)
    table = json.loads(body[begin:end])
    table.pop("__metadata__")
    return {
        name: (e["dtype"], tuple(e["shape"]), body[end + e["data_offsets"][0] : end + e["data_offsets"][1]]) for name, e in table.items()
    }


def require_same(got, payload, valid):
    """Every tensor that the server uses is the one that a plain reader finds, of the declared name, shape and dtype, and finite."""
    read, declared = plain(payload), plain(valid)
    body = got if isinstance(got, ClientUpdate) else got.body
    tensors = {f"adapter|{name}|{part}": getattr(pair, part) for name, pair in body.adapter.items() for part in "AB"}
    tensors |= {f"other|{name}": tensor for name, tensor in body.other.items()}
    for name, tensor in tensors.items():
        dtype, shape, data = read[name]
        assert dtype == "F32"
        assert shape == tuple(tensor.shape)
        assert tensor.numpy().tobytes() == data
        assert np.isfinite(np.frombuffer(data, np.float32)).all()
    if isinstance(got, ClientUpdate):
        assert {name: (dtype, shape) for name, (dtype, shape, _) in read.items()} == {n: (d, s) for n, (d, s, _) in declared.items()}
        assert tensors.keys() == declared.keys()
        assert got.client_id == "a"
        assert 0 < got.num_examples <= 10**7
        assert all(pair.scaling == 2.0 for pair in got.adapter.values())


def check(subject, payload, sealed):
    """One message: (accepted?, the most seconds, the most bytes beyond what was there before)."""
    tracemalloc.reset_peak()
    before, began = tracemalloc.get_traced_memory()[0], time.perf_counter()
    got, reason = None, ""
    try:
        got = subject.decode(payload)
    except WireError as error:
        reason = str(error)
    seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1] - before
    assert reason.isprintable(), reason
    assert len(reason) < 1000, reason
    assert seconds < SECONDS, seconds
    assert peak <= 2 * max(subject.declared, len(payload) if subject.decode is decode_download else 0) + SLACK, peak
    if got is not None and sealed:
        require_same(got, payload, subject.valid)
    elif got is not None:
        assert payload in subject.whole
    return got is not None, seconds, peak


def campaign(count, seed=0, progress=lambda line: None):
    """So many mutants of both directions in turn; the counts of what became of them."""
    rng, counts, slowest, largest = random.Random(seed), Counter(), 0.0, 0.0
    both = subjects()
    tracemalloc.start()
    try:
        for name, subject in both.items():
            assert check(subject, subject.valid, sealed=False)[0], f"the valid {name} is refused"
        for number in range(count):
            name = ("update", "download")[number % 2]
            payload, mutators, sealed = mutant(rng, both[name])
            try:
                accepted, seconds, peak = check(both[name], payload, sealed)
            except Exception as error:
                raise AssertionError(f"mutant {number} of seed {seed} ({name}, {mutators}, sealed {sealed}): {error!r}") from error
            slowest, largest = max(slowest, seconds), max(largest, peak / both[name].declared)
            kind = ("sealed" if sealed else "raw") if payload != both[name].valid else "unchanged"
            counts[f"{name} {kind} {'accepted' if accepted else 'refused'}"] += 1
            if (number + 1) % 10_000 == 0:
                progress(f"{number + 1} mutants, slowest {slowest:.3f} s, most memory {largest:.2f} x the message")
    finally:
        tracemalloc.stop()
    return counts, slowest, largest


if __name__ == "__main__":
    torch.set_num_threads(1)
    began = time.perf_counter()
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    counts, slowest, largest = campaign(wanted, int(sys.argv[2]) if len(sys.argv) > 2 else 0, lambda line: print(line, flush=True))
    for kind, number in sorted(counts.items()):
        print(f"{kind:32} {number}")
    print(
        f"{wanted} mutants in {time.perf_counter() - began:.0f} s; slowest {slowest:.3f} s; most memory {largest:.2f} x the valid message"
    )
