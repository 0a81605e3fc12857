"""`local.head_rounds`: the head first, by itself; then the adapters, with the head as it is."""

import re

import numpy as np
import pytest
import torch
from tests.runs.test_resume import StopError, stopping
from tests.runs.test_run import assert_same_bits, configuration, events_of, ignore

from fedex_lora.client.client import Client
from fedex_lora.config import Rules, base_folder, read_config
from fedex_lora.errors import ConfigError
from fedex_lora.offline.verify import verify
from fedex_lora.runs.run import run
from fedex_lora.server.server import Server
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import round_folder
from fedex_lora.types import ClientUpdate, LoRAPair

SETTING = {"rounds": 4, "local": {"head_rounds": 2}, "keep_rounds": 4, "training": {"learning_rate": 1e-2}}
CLASSES = {"kind": "classification", "text": ["text"], "label": "label"}
CAUSAL = {"kind": "causal-lm", "prompt": "{text}", "completion": " {label}"}
COUNTED = {"count": 3, "partition": "iid", "column": None}


def parts_of(out, round):
    """The factors and the head of the global model after a round, as plain arrays."""
    found = read_result(round_folder(out, round))
    factors = {f"{name}.{part}": getattr(pair, part).numpy() for name, pair in found.adapter.items() for part in "AB"}
    return factors, {name: tensor.numpy() for name, tensor in found.other.items()}


def equal(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def setting(folder, task=CLASSES, **changes):
    """A run on 60 rows in a file."""
    rows = folder / "rows.csv"
    rows.write_text("text,label\n" + "a cough,cold\nhot and red,fever\na cut,wound\n" * 20)
    own = {"name": "custom", "train": str(rows), "eval": str(rows), "train_rows": None, "eval_rows": None, **task}
    return configuration(**{**SETTING, "task": own, "clients": COUNTED, **changes})


@pytest.fixture(scope="module", params=["fedex", "fedit", "rolora"])
def finished(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("heads") / "run"
    run(setting(out.parent, method=request.param), out, ignore)
    return out


def test_the_head_is_trained_first_and_then_stays(finished):
    rounds = [parts_of(finished, number) for number in (1, 2, 3, 4)]
    factors, heads = zip(*rounds, strict=True)
    assert equal(factors[0], factors[1])
    assert all(not value.any() for name, value in factors[0].items() if name.endswith(".B"))
    assert not equal(heads[0], heads[1])
    assert equal(heads[1], heads[2])
    assert equal(heads[2], heads[3])
    assert not equal(factors[1], factors[2])
    assert not equal(factors[2], factors[3])


def test_a_round_of_the_head_alone_is_exact(finished):
    """In it no factor changes, so that there is nothing to lose, by whatever method."""
    errors = {said["round"]: said["exactness_error"] for said in events_of(finished, "round_done")}
    assert max(errors[1], errors[2]) < 1e-6
    assert verify(finished, str(base_folder()))["max_relative_error"] == pytest.approx(max(errors.values()), rel=0.5, abs=1e-6)


def test_all_methods_have_one_warm_up(finished, tmp_path):
    run(setting(tmp_path, method="fedex+balanced", rounds=2), tmp_path / "run", ignore)
    assert equal(parts_of(tmp_path / "run", 2)[1], parts_of(finished, 2)[1])


def test_it_goes_on_where_it_was(finished, tmp_path):
    config = read_config(finished / "config.toml")
    with pytest.raises(StopError):
        run(config, tmp_path / "run", stopping("round_done", 3))
    run(config, tmp_path / "run", ignore, resume=True)
    assert_same_bits(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": {"head_rounds": 1, "optimizer_state": "keep"}}, "local.head_rounds does not go with local.optimizer_state = 'keep'"),
        ({"server": {"momentum": 0.5, "momentum_on": "all"}}, "local.head_rounds does not go with server.momentum_on = 'all'"),
        ({"method": "full-ft"}, "local.head_rounds does not go with full-ft"),
        ({"task": CAUSAL}, "has no head that is trained"),
    ],
)
def test_what_does_not_go_is_one_line(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(setting(tmp_path, **changes), tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()


def test_what_is_frozen_comes_back_as_it_was_or_is_rejected():
    """Its median change is zero, which bounds nothing: one client would move it at will."""
    start, head, names = {"q": LoRAPair(torch.ones(2, 6), torch.zeros(4, 2))}, {"score": torch.zeros(2, 4)}, list("abcd")
    rules = Rules(local={"head_rounds": 1}, clients={"quorum": 0.6})
    server, clients = Server.start(rules, start, head, names), {name: Client(rules, name, start) for name in names}
    for number in (1, 2):
        round, updates = server.open_round(), {}
        for name, message in round.messages.items():
            work = clients[name].receive(message)
            pair, odd = work.start["q"], 1e6 if name == "d" else 0.0
            changes = (odd, 0.1) if number == 1 else (0.1, odd)
            moved = {"q": LoRAPair(A=pair.A, B=pair.B + changes[0])}, {"score": work.other["score"] + changes[1]}
            answer = clients[name].reply(10, {}, update=ClientUpdate(name, moved[0], 10, other=moved[1]))
            updates[name] = getattr(server.receive(name, answer), "update", None)
        ready = round.ready()
        assert [(one.client, one.reason) for one in round.rejections] == [("d", "it changed what local.head_rounds freezes in this round")]
        after = round.close([updates[name] for name in ready.clients]).state
        assert torch.allclose(after.other["score"], torch.full((2, 4), 0.1))
