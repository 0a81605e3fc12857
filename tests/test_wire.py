"""Messages: what goes in comes out, and what is not what the round declared is refused with its reason."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import make_pair, make_updates

from fedex_lora import LoRAPair, aggregate
from fedex_lora.catch_up import CatchUp
from fedex_lora.errors import WireError
from fedex_lora.wire import Download, decode_download, decode_update, encode_download, encode_update

UPDATE = make_updates(1)[0]
LOG = CatchUp(since=1, version=2, log={2: aggregate(make_updates(3)).residual})
SENT = Download("train", "run", 3, "client-0", "fedex", UPDATE.adapter, UPDATE.other, LOG)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_download_round_trip():
    got = decode_download(encode_download(SENT))
    assert (got.kind, got.run, got.round, got.client, got.method) == ("train", "run", 3, "client-0", "fedex")
    assert same(got.other, SENT.other)
    for name, pair in SENT.adapter.items():
        assert torch.equal(got.adapter[name].A, pair.A)
        assert torch.equal(got.adapter[name].B, pair.B)
        assert got.adapter[name].scaling == pair.scaling
        assert torch.equal(got.catch_up.log[2][name].U, LOG.log[2][name].U)
        assert torch.equal(got.catch_up.log[2][name].V, LOG.log[2][name].V)


def test_update_round_trip():
    update = replace(UPDATE, metrics={"train_loss": 0.5, "bad": float("nan")})
    got = decode_update(encode_update(update, "run", 3, "fedex"), SENT)
    assert (got.client_id, got.num_examples, dict(got.metrics)) == ("client-0", 10, {"train_loss": 0.5})
    assert same({n: p.A for n, p in got.adapter.items()}, {n: p.A for n, p in UPDATE.adapter.items()})


def test_a_frozen_a_does_not_travel():
    payload = encode_update(UPDATE, "run", 3, "fedex", omit="A")
    assert len(payload) < 0.8 * len(encode_update(UPDATE, "run", 3, "fedex"))
    got = decode_update(payload, SENT, omit="A")
    assert same({n: p.A for n, p in got.adapter.items()}, {n: p.A for n, p in SENT.adapter.items()})
    again = decode_download(encode_download(SENT, omit="A"), known=SENT.adapter)
    assert same({n: p.A for n, p in again.adapter.items()}, {n: p.A for n, p in SENT.adapter.items()})


def test_an_evaluation_answers_with_numbers_only():
    sent = replace(SENT, kind="evaluate")
    got = decode_update(encode_update(replace(UPDATE, adapter={}, other={}, metrics={"accuracy": 0.5}), "run", 3, "fedex"), sent)
    assert not got.adapter
    with pytest.raises(WireError, match="not declared"):
        decode_update(encode_update(UPDATE, "run", 3, "fedex"), sent)


def with_pair(pair):
    return replace(UPDATE, adapter={**UPDATE.adapter, "m0": pair})


FIRST = UPDATE.adapter["m0"]
HOSTILE = {
    "NaN": (with_pair(LoRAPair(A=FIRST.A * float("nan"), B=FIRST.B, scaling=2.0)), "NaN or infinity"),
    "infinity": (with_pair(LoRAPair(A=FIRST.A, B=FIRST.B / 0, scaling=2.0)), "NaN or infinity"),
    "wrong names": (replace(UPDATE, adapter={"other": FIRST}), "not declared|missing"),
    "transposed shape": (with_pair(make_pair(0, 20, 12)), "has shape"),
    "wrong rank": (with_pair(make_pair(0, rank=2)), "has shape"),
    "wrong dtype": (with_pair(make_pair(0, dtype=torch.float64)), "has dtype"),
    "other scaling": (with_pair(replace(FIRST, scaling=1e6)), "scalings"),
    "other client": (replace(UPDATE, client_id="client-1"), "client is 'client-1'"),
    "broadcastable head": (replace(UPDATE, other={"head.weight": torch.ones(1, 12)}), "has shape"),
    "negative examples": (replace(UPDATE, num_examples=-1), None),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_updates_are_refused(case):
    update, message = HOSTILE[case]
    if message is None:
        with pytest.raises(ValueError, match="num_examples"):
            encode_update(update, "run", 3, "fedex")
        payload = encode_update(UPDATE, "run", 3, "fedex").replace(b'num_examples\\":10', b'num_examples\\":-9')
        message = "num_examples"
    else:
        payload = encode_update(update, "run", 3, "fedex")
    with pytest.raises(WireError, match=message):
        decode_update(payload, SENT)


@pytest.mark.parametrize(("run", "round", "method"), [("other", 3, "fedex"), ("run", 2, "fedex"), ("run", 3, "fedit")])
def test_replays_are_refused(run, round, method):
    with pytest.raises(WireError, match="this round declared"):
        decode_update(encode_update(UPDATE, run, round, method), SENT)


def test_size_is_looked_at_first():
    with pytest.raises(WireError, match="at most"):
        decode_update(encode_update(UPDATE, "run", 3, "fedex") + bytes(2**21), SENT)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_messages_are_refused_or_read_never_worse(data):
    """Flip, cut or insert bytes: an update, or a WireError."""
    payload = bytearray(encode_update(UPDATE, "run", 3, "fedex"))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(0, min(len(payload) - 1, 1200))))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip" and payload:
            payload[position] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del payload[position : position + data.draw(st.integers(1, 500))]
        else:
            payload[position:position] = data.draw(st.binary(min_size=1, max_size=20))
    try:
        update = decode_update(bytes(payload), SENT)
    except WireError:
        return
    assert update.adapter.keys() == UPDATE.adapter.keys()
    assert all(bool(torch.isfinite(pair.A).all()) and pair.shape == UPDATE.adapter[name].shape for name, pair in update.adapter.items())
