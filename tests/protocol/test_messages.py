"""Messages: what goes in comes out, and what is not what the round declared is refused with its reason."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import make_pair, make_updates
from tests.messages import retold, with_tensors

from fedex_lora import LoRAPair, aggregate
from fedex_lora.errors import WireError
from fedex_lora.protocol.delta_sync import CatchUp, ModelCopy, caught_up
from fedex_lora.protocol.envelopes import answer_of, envelope_of, message
from fedex_lora.protocol.failures import Failure
from fedex_lora.protocol.messages import Body, Download, decode_body, decode_update, encode_body, encode_update
from fedex_lora.protocol.records import Apology, Request
from fedex_lora.types import Dense, LowRank

UPDATE = make_updates(1)[0]
LOG = CatchUp(since=1, version=2, log={2: aggregate(make_updates(3)).residual})
SENT = Download(Request(kind="train", run="run", round=3, client="client-0"), Body("fedex", UPDATE.adapter, UPDATE.other, LOG))


def encode_download(sent, omit=""):
    return message(sent.request, encode_body(sent.body, omit))


def decode_download(payload, known=None):
    """As a client reads it."""
    request, body = envelope_of(payload, Request, 2**20)
    return Download(request, decode_body(body, request.body, known))


def encoded(update, run="run", round=3, method="fedex", omit="", kind="train"):
    """The answer to SENT, or to another request."""
    return encode_update(update, SENT.request.model_copy(update={"run": run, "round": round, "kind": kind}), method, round - 1, omit)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_download_round_trip():
    got = decode_download(encode_download(SENT))
    request, got = got.request, got.body
    assert (request.kind, request.run, request.round, request.client, got.method) == ("train", "run", 3, "client-0", "fedex")
    assert same(got.other, SENT.body.other)
    for name, pair in SENT.body.adapter.items():
        assert torch.equal(got.adapter[name].A, pair.A)
        assert torch.equal(got.adapter[name].B, pair.B)
        assert got.adapter[name].scaling == pair.scaling
        assert torch.equal(got.catch_up.log[2][name].U, LOG.log[2][name].U)
        assert torch.equal(got.catch_up.log[2][name].V, LOG.log[2][name].V)


def test_update_round_trip():
    update = replace(UPDATE, metrics={"train_loss": 0.5, "bad": float("nan")})
    got = decode_update(encoded(update), SENT)
    assert (got.client_id, got.num_examples, dict(got.metrics)) == ("client-0", 10, {"train_loss": 0.5})
    assert same({n: p.A for n, p in got.adapter.items()}, {n: p.A for n, p in UPDATE.adapter.items()})


def test_a_frozen_a_does_not_travel():
    payload = encoded(UPDATE, omit="A")
    assert len(payload) < 0.8 * len(encoded(UPDATE))
    got = decode_update(payload, SENT, omit="A")
    assert same({n: p.A for n, p in got.adapter.items()}, {n: p.A for n, p in SENT.body.adapter.items()})
    again = decode_download(encode_download(SENT, omit="A"), known=SENT.body.adapter).body
    assert same({n: p.A for n, p in again.adapter.items()}, {n: p.A for n, p in SENT.body.adapter.items()})


def test_an_evaluation_answers_with_numbers_only():
    sent = replace(SENT, request=SENT.request.model_copy(update={"kind": "evaluate"}))
    got = decode_update(encoded(replace(UPDATE, adapter={}, other={}, metrics={"accuracy": 0.5}), kind="evaluate"), sent)
    assert not got.adapter
    with pytest.raises(WireError, match="not declared"):
        decode_update(encoded(UPDATE, kind="evaluate"), sent)


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
            encoded(update)
        payload = retold(encoded(UPDATE), num_examples=-9)
        message = "num_examples"
    else:
        payload = encoded(update)
    with pytest.raises(WireError, match=message):
        decode_update(payload, SENT)


@pytest.mark.parametrize(("run", "round", "method"), [("other", 3, "fedex"), ("run", 2, "fedex"), ("run", 3, "fedit")])
def test_replays_are_refused(run, round, method):
    with pytest.raises(WireError, match="this round declared"):
        decode_update(encoded(UPDATE, run, round, method), SENT)


def test_size_is_looked_at_first():
    with pytest.raises(WireError, match="at most"):
        decode_update(encoded(UPDATE) + bytes(2**21), SENT)


def tampered(header=None, **tensors):
    """The bytes of SENT with other tensors, or with other things in its envelope or header; a tensor given as None is left out."""
    return retold(with_tensors(encode_download(SENT), lambda found: found | tensors), **(header or {}))


U, V, W = torch.ones(12, 2), torch.ones(2, 20), torch.ones(12, 20)
TAMPERED = {
    "two forms": (tampered(**{"gain|m0|U": U, "gain|m0|V": V}), "module m0 comes in two forms"),
    "log and snapshot": (tampered(**{"snapshot|m0|W": W}), "module m0 comes in two forms"),
    "snapshot as factors and matrix": (
        tampered(**{"snapshot|m0|U": U, "snapshot|m0|V": V, "snapshot|m0|W": W}),
        "U and V that chain, or W",
    ),
    "shapes that do not chain": (tampered(**{"log|2|m0|V": torch.ones(5, 20)}), "log[|]2[|]m0 has .* it must be U and V that chain"),
    "no V": (tampered(**{"log|2|m0|V": None}), "it must be U and V that chain"),
    "no U": (tampered(**{"log|2|m0|U": None}), "it must be U and V that chain"),
    "a vector": (tampered(**{"snapshot|m0|W": torch.ones(12)}), "it must be U and V that chain|no floating-point numbers"),
    "integers": (tampered(**{"snapshot|m0|W": W.int()}), "has dtype I32, which no message has"),
    "a transposed gain": (
        tampered(**{"log|2|m0|U": V.T.contiguous(), "log|2|m0|V": U.T.contiguous()}),
        "is .20, 12. and the adapter has .12, 20",
    ),
    "unknown module in a snapshot": (tampered(**{"snapshot|m9|W": W}), "the adapter has no such module"),
    "unknown module in a gain": (tampered(**{"gain|m9|U": U, "gain|m9|V": V}), "the adapter has no such module"),
    "a round that is not declared": (
        tampered(**{"log|3|m0|U": U, "log|3|m0|V": V}),
        "has no place in a download with the log of rounds .2.",
    ),
    "a round that is no number": (tampered(**{"log|two|m0|U": U, "log|two|m0|V": V}), "has no place"),
    "a matrix in the log": (tampered(**{"log|2|m0|U": None, "log|2|m0|V": None, "log|2|m0|W": W}), "has no place"),
    "an unknown form": (tampered(**{"residual|2|m0|U": U, "residual|2|m0|V": V}), "has no place"),
    "no form": (tampered(x=U), "has no place"),
    "NaN in a snapshot": (tampered(**{"snapshot|m0|W": W * float("nan")}), "holds NaN or infinity"),
    "a hole": (tampered({"since": 0}), "from version 0 to 2 has a hole: round 1 is missing"),
    "a hole as wide as the sea": (tampered({"version": 10**15}), "has a hole: round 3 is missing"),
    "rounds that the client has": (tampered({"since": 2}), "holds round 2, which is not between them"),
    "rounds of the future": (tampered({"since": 2, "version": 1}), "goes backwards"),
    "no version at all": (tampered({"version": 0, "since": 0, "log_rounds": []}), "has no place|goes backwards"),
    "more than there is to say": (tampered({"share": 0.25}), "envelope is wrong: train.share"),
    "a module without factors": (tampered({"scalings": {"m0": 2.0, "m1": 2.0, "m2": 2.0, "m3": 2.0}}), "m3[|]A' did not travel"),
    "factors that do not chain": (tampered(**{"adapter|m0|A": torch.ones(5, 20)}), "the message's adapter is wrong"),
    "another schema": (tampered({"schema_version": 1}), "this version speaks 2: use one version everywhere"),
    "truncated": (encode_download(SENT)[:-7], "the message is truncated"),
    "truncated in the envelope": (encode_download(SENT)[:60], "the message is truncated"),
    "nothing": (b"", "0 bytes is too short"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_downloads_that_contradict_themselves_are_refused(case):
    payload, message = TAMPERED[case]
    with pytest.raises(WireError, match=message) as caught:
        decode_download(payload)
    assert "\n" not in str(caught.value)
    decode_download(tampered())


@pytest.mark.parametrize("payload", [encode_download(SENT), b"junk"])
def test_a_failure_is_a_code_and_a_number_whatever_it_answers(payload):
    apology, body = envelope_of(answer_of(payload, "client-0", Failure("label", 3)), Apology)
    assert (apology.client, apology.code, apology.rows, len(body)) == ("client-0", "label", 3, 0)
    assert (apology.run, apology.round) == (("run", 3) if len(payload) > 4 else ("", 0))
    with pytest.raises(WireError, match="going the wrong way"):
        envelope_of(payload if len(payload) > 4 else encode_download(SENT), Apology)


def test_one_body_serves_every_client_of_a_version():
    body = encode_body(SENT.body)
    both = [message(SENT.request.model_copy(update={"client": name}), body) for name in ("client-0", "client-1")]
    assert all(payload.endswith(body.payload) for payload in both)
    assert [decode_download(payload).request.client for payload in both] == ["client-0", "client-1"]


def test_every_form_round_trips():
    forms = CatchUp(
        since=0, version=2, log={1: {"m0": LowRank(U, V)}, 2: {}}, gain={"m1": LowRank(V.T, U.T)}, snapshot={"m2": Dense(torch.eye(16))}
    )
    for snapshot in (Dense(torch.eye(16)), LowRank(torch.ones(16, 2), torch.ones(2, 16))):
        got = decode_download(
            encode_download(replace(SENT, body=replace(SENT.body, catch_up=replace(forms, snapshot={"m2": snapshot}))))
        ).body
        assert (got.catch_up.since, got.catch_up.version, list(got.catch_up.log)) == (0, 2, [1, 2])
        assert type(got.catch_up.snapshot["m2"]) is type(snapshot)
        for delta, want in (
            (got.catch_up.snapshot["m2"], snapshot),
            (got.catch_up.gain["m1"], forms.gain["m1"]),
            (got.catch_up.log[1]["m0"], forms.log[1]["m0"]),
        ):
            assert torch.equal(delta.dense(), want.dense())


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_downloads_are_refused_or_read_never_worse(data):
    payload = bytearray(encode_download(SENT))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(payload) - 1, 2500)))
        if data.draw(st.booleans()):
            payload[position] ^= data.draw(st.integers(1, 255))
        else:
            del payload[position : position + data.draw(st.integers(1, 500))]
    try:
        caught_up(ModelCopy(1), decode_download(bytes(payload)).body.catch_up, {})
    except WireError:
        return


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_messages_are_refused_or_read_never_worse(data):
    """Flip, cut or insert bytes: an update, or a WireError."""
    payload = bytearray(encoded(UPDATE))
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
