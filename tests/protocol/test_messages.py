"""Messages: what goes in comes out, and what is not what the round declared is refused with its reason."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from tests.conftest import make_pair, make_updates

from fedex_lora import LoRAPair, aggregate
from fedex_lora.errors import WireError
from fedex_lora.protocol.delta_sync import BaseCopy, CatchUp, caught_up
from fedex_lora.protocol.frame import read_table, seal
from fedex_lora.protocol.messages import Download, decode_download, decode_update, encode_download, encode_update
from fedex_lora.types import Dense, LowRank

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


def tampered(header=None, **tensors):
    """The bytes of SENT with other tensors, or with other things in its header; a tensor given as None is left out."""
    payload = encode_download(SENT)
    with_header = json.loads(read_table(payload, len(payload))[0]) | (header or {})
    found = {name: tensor for name, tensor in (load(payload) | tensors).items() if tensor is not None}
    return seal(save(found, metadata={"header": json.dumps(with_header, separators=(",", ":"))}))


U, V, W = torch.ones(12, 2), torch.ones(2, 20), torch.ones(12, 20)
TAMPERED = {
    "two forms": (tampered(**{"gain|m0|U": U, "gain|m0|V": V}), "module m0 comes in two forms"),
    "log and snapshot": (tampered(**{"snapshot|m0|W": W}), "module m0 comes in two forms"),
    "snapshot as factors and matrix": (
        tampered(**{"snapshot|m0|U": U, "snapshot|m0|V": V, "snapshot|m0|W": W}),
        "U and V that chain, or W",
    ),
    "shapes that do not chain": (tampered(**{"log|2|m0|V": torch.ones(5, 20)}), "'log[|]2[|]m0' has .* it must be U and V that chain"),
    "no V": (tampered(**{"log|2|m0|V": None}), "it must be U and V that chain"),
    "no U": (tampered(**{"log|2|m0|U": None}), "it must be U and V that chain"),
    "a vector": (tampered(**{"snapshot|m0|W": torch.ones(12)}), "it must be U and V that chain|no floating-point numbers"),
    "integers": (tampered(**{"snapshot|m0|W": W.int()}), "it must be U and V that chain|no floating-point numbers"),
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
    "no form": (tampered(x=U), "it must be U and V that chain"),
    "NaN in a snapshot": (tampered(**{"snapshot|m0|W": W * float("nan")}), "holds NaN or infinity"),
    "a hole": (tampered({"since": 0}), "from version 0 to 2 has a hole: round 1 is missing"),
    "a hole as wide as the sea": (tampered({"round": 10**15}), "has a hole: round 3 is missing"),
    "rounds that the client has": (tampered({"since": 2}), "holds round 2, which is not between them"),
    "rounds of the future": (tampered({"since": 2, "round": 2}), "goes backwards"),
    "no version at all": (tampered({"round": 0, "since": 0, "log_rounds": []}), "has no place|goes backwards"),
    "counting on what the client trained, as older versions could": (tampered({"share": 0.25}), "header is wrong: share"),
    "a module without factors": (tampered({"scalings": {"m0": 2.0, "m1": 2.0, "m2": 2.0, "m3": 2.0}}), "m3[|]A' did not travel"),
    "factors that do not chain": (tampered(**{"adapter|m0|A": torch.ones(5, 20)}), "the message's adapter is wrong"),
    "another schema": (tampered({"schema_version": 2}), "this version speaks 1: use one version everywhere"),
    "truncated": (encode_download(SENT)[:-7], "the message is truncated"),
    "truncated in the header": (encode_download(SENT)[:40], "truncated, or its header is a lie"),
    "nothing": (b"", "0 bytes is too short"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_downloads_that_contradict_themselves_are_refused(case):
    payload, message = TAMPERED[case]
    with pytest.raises(WireError, match=message) as caught:
        decode_download(payload)
    assert "\n" not in str(caught.value)
    decode_download(tampered())


def test_headers_of_older_versions_are_read():
    """They say `share: null`; the answers that clients kept in a run that goes on do, too."""
    payload = encode_update(UPDATE, "run", 3, "fedex")
    header = json.loads(read_table(payload, len(payload))[0])
    assert "share" not in header
    old = seal(save(load(payload), metadata={"header": json.dumps(header | {"share": None}, separators=(",", ":"))}))
    assert decode_update(old, SENT).num_examples == UPDATE.num_examples
    assert decode_download(tampered({"share": None})).round == SENT.round


def test_every_form_round_trips():
    forms = CatchUp(
        since=0, version=2, log={1: {"m0": LowRank(U, V)}, 2: {}}, gain={"m1": LowRank(V.T, U.T)}, snapshot={"m2": Dense(torch.eye(16))}
    )
    sent = replace(SENT, catch_up=forms)
    for snapshot in (Dense(torch.eye(16)), LowRank(torch.ones(16, 2), torch.ones(2, 16))):
        got = decode_download(encode_download(replace(sent, catch_up=replace(forms, snapshot={"m2": snapshot}))))
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
        caught_up(BaseCopy(1), decode_download(bytes(payload)).catch_up)
    except WireError:
        return


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
