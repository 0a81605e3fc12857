"""Server momentum as a federation sees it: bytes, who was absent, what a run says of itself, what is refused."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import oracle
from tests.fake import Fake, Network, setting
from tests.protocol.test_delta_sync import adapters, federate
from tests.protocol.test_hostile import bits, equal
from tests.runs.test_estimate import KEPT
from tests.runs.test_round_loop import quick  # noqa: F401 (a fixture)
from tests.runs.test_run import ignore

from fedex_lora import METHODS
from fedex_lora.aggregation.lowrank import same_bits
from fedex_lora.config import parse_config
from fedex_lora.errors import AggregationError, ConfigError, StorageError, WireError
from fedex_lora.offline.merge_results import merge_folders
from fedex_lora.offline.verify import require_continued, verify
from fedex_lora.protocol.delta_sync import CatchUp, require_whole
from fedex_lora.runs.round_loop import run_rounds
from fedex_lora.server.checkpoint import bytes_needed, last_checkpoint
from fedex_lora.storage.events import RoundDone, of_kind
from fedex_lora.storage.motion import read_motion
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import strays
from fedex_lora.types import Dense, LowRank

MOVING = [name for name, row in METHODS.items() if row.momentum]
HALF, RANK = {"momentum": 0.5}, 3
ROUNDS = 8


@pytest.mark.parametrize("method", ["fedex", "fedit"])
def test_nothing_more_travels_to_who_is_always_there(method):
    """And who missed rounds 4 and 5 of 8 gets the adapters of those rounds beside what it is sent anyway."""
    first, attending = adapters(), ["abc"] * 3 + ["ab"] * 2 + ["abc"] * 3
    plain, moving = (federate(attending, first, method=method, pace=pace, catch_up="log") for pace in (None, HALF))
    for number, (ours, theirs) in enumerate(zip(moving.sizes, plain.sizes, strict=True), start=1):
        for client in ours:
            catching_up = number == 6 and client == "c"
            pair = 4 * RANK * sum(sum(one.shape) for one in first.values())  # bytes of A and B
            more = 2 * pair if catching_up else 0  # its own base is of round 2: it lacks the adapters after rounds 3 and 4
            names = 2 * 2 * 2 * 100 if catching_up else 0  # of two rounds, modules, factors: their entries in the table
            said = len(',"server":"{\\"momentum\\": 0.5}"')  # in every request, for both sides must have it alike
            assert 0 <= ours[client] - theirs[client] - said - more <= names, (number, client)
    for name in first:
        for client in "abc":
            assert same_bits(moving.delta(client, name), moving.state.base_delta[name])


def test_a_snapshot_brings_the_velocity():
    shapes = ((20, 24), (24, 20))
    story = federate(["ab"] * 6 + ["abc"] + ["abc"], adapters(shapes), "abc", pace=HALF)
    sent = story.sent[6]["c"].body.catch_up
    assert sent.snapshot.keys() == {"m0", "m1"}
    assert not sent.gain
    for name in ("m0", "m1"):
        assert same_bits(story.delta("c", name), story.state.base_delta[name])


def test_no_sum_is_sent_in_place_of_what_was_missed():
    """A recompressed sum would leave the client without the velocity: what it is sent has the server's bits."""
    story = federate(["ab"] * 3 + ["abc"] * 2, adapters(((200, 300),)), "abc", pace=HALF)
    assert all(not message.body.catch_up.gain for sent in story.sent for message in sent.values())
    assert same_bits(story.delta("c", "m0"), story.state.base_delta["m0"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("pace", [HALF, {"learning_rate": 2.0}, {"momentum": 0.3, "learning_rate": 1.5, "momentum_on": "all"}], ids=str)
@pytest.mark.parametrize("method", MOVING)
def test_a_run_says_its_error_resumes_to_the_bit_and_verifies(method, pace, tmp_path):
    config, events = setting(method=method, rounds=ROUNDS, server=pace, keep_rounds=ROUNDS), []
    whole = Fake(config, ignore)
    whole.remember_in(tmp_path / "whole")
    final = run_rounds(config, whole.initial(), whole.federation(), tmp_path / "whole", events.append)
    errors = [event.exactness_error for event in of_kind(events, RoundDone)]
    assert len(errors) == ROUNDS
    assert all(error < 1e-6 for error in errors) == METHODS[method].exact
    if "momentum" in pace:
        assert all(event.change_error < 1e-6 for event in of_kind(events, RoundDone))
    found = verify(tmp_path / "whole")
    assert (found["max_relative_error"] < 1e-6) == METHODS[method].exact

    part = config.model_copy(update={"rounds": 5})
    place = Fake(part, ignore)
    place.remember_in(tmp_path / "part")
    run_rounds(part, place.initial(), place.federation(), tmp_path / "part", ignore)
    place = Fake(config, ignore)
    place.remember_in(tmp_path / "part")
    resumed = run_rounds(config, last_checkpoint(tmp_path / "part")[0], place.federation(), tmp_path / "part", ignore)
    assert equal(bits(resumed), bits(final))
    assert all(same_bits(resumed.base_delta[name], delta) for name, delta in final.base_delta.items())


@pytest.mark.usefixtures("quick")
def test_old_rounds_go(tmp_path):
    config = setting(rounds=5, server=HALF, keep_rounds=2)
    place = Fake(config, ignore)
    place.remember_in(tmp_path / "run")
    events = []
    run_rounds(config, place.initial(), place.federation(), tmp_path / "run", events.append)
    assert {int(folder.name) for folder in (tmp_path / "run" / "rounds").iterdir()} == {events[-1].best_round, 4, 5}
    assert not strays(tmp_path / "run", "rounds")
    assert verify(tmp_path / "run")["max_relative_error"] < 1e-6


def test_who_never_comes_does_not_make_the_log_grow():
    """What would be larger than a snapshot is dropped: adapters of past rounds, too."""
    first = adapters(((40, 40), (40, 40)))
    log = federate(["ab"] * 60, first, "abc", method="fedit", pace=HALF).log
    kept = sum(pair.A.numel() + pair.B.numel() for past in log.adapters.values() for pair in past.values())
    assert kept <= 2 * 2 * 40 * 40 + 2 * RANK * 80  # two matrices a module, and the round that made it too many


@pytest.mark.usefixtures("quick")
def test_verify_compares_rounds_with_those_before(tmp_path):
    """A round whose change was left out, and all its numbers made anew without it, is exact in itself, and not the run's."""
    config = setting(rounds=4, server=HALF)
    place = Fake(config, ignore)
    run_rounds(config, place.initial(), place.federation(), tmp_path / "run", ignore)
    results = [read_result(tmp_path / "run" / "rounds" / f"000{number}") for number in (2, 3, 4)]
    require_continued(tmp_path, results[2], results[:2])
    for motion, words in (
        (replace(results[2].motion, change={}), "off by"),
        (replace(results[2].motion, momentum=0.4), "another momentum"),
        (replace(results[2].motion, adapter=results[2].adapter), "did not start from"),
        (None, "does not say"),
    ):
        with pytest.raises(StorageError, match=words):
            require_continued(tmp_path, replace(results[2], motion=motion), results[:2])
    with pytest.raises(StorageError, match="did not start from"):
        require_continued(tmp_path, replace(results[2], previous_delta={}), results[:2])
    state = replace(place.trace.states[4], adapter={"wide": place.trace.states[4].adapter["wide"]})
    with pytest.raises(StorageError, match="does not fit the folder's adapter"):
        read_motion(tmp_path / "run" / "rounds" / "0004" / "motion.safetensors", state.adapter)


@pytest.mark.usefixtures("quick")
def test_a_round_after_a_skipped_one_repeats_nothing(tmp_path):
    """Its file has no change; older files have one of zero, which is none, too. And `final/` is verified by itself."""
    config = setting(rounds=4, server=HALF, clients={"partition": "iid", "count": 4, "below_quorum": "skip"})
    net = Network(Fake(config, ignore), {3: "lost"})
    final = run_rounds(config, net.place.initial(), replace(net.place.federation(), exchange=net.exchange), tmp_path / "run", ignore)
    assert verify(tmp_path / "run")["max_relative_error"] < 1e-6
    assert verify(tmp_path / "run" / "final")["recomputed"] is False
    second, third, fourth = (read_result(tmp_path / "run" / "rounds" / f"000{number}") for number in (2, 3, 4))
    assert (bool(third.manifest["skipped"]), fourth.motion.change) == (True, {})
    for size in (0.0, 1.0):
        change = {name: Dense(size * delta.dense()) for name, delta in net.place.trace.states[2].base_delta.items()}
        with nullcontext() if size == 0 else pytest.raises(StorageError, match="there was none before it"):
            require_continued(tmp_path, replace(fourth, motion=replace(fourth.motion, change=change)), [second, third])
    assert final.round == 4


def test_a_round_that_is_called_skipped_has_no_gains():
    gains = {1: {"m": LowRank(torch.ones(3, 1), torch.ones(1, 2))}}
    with pytest.raises(WireError, match="which it calls skipped"):
        require_whole(CatchUp(0, 1, gains, halts=[1]))


def test_a_small_learning_rate_is_refused():
    """What the base takes up is (h - 1) P: the error is that of fp32 over h."""
    with pytest.raises(ConfigError, match=r"server\.learning_rate"):
        parse_config({"base": {"model": "demo"}, "task": {"name": "demo"}, "server": {"learning_rate": 0.02}})


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("method", "pace"), [("fedex", HALF), ("fedit", {**HALF, "momentum_on": "all", "momentum_of": "factors"})])
def test_many_rounds_of_matrices_are_within_the_bound_of_disk(method, pace, tmp_path, monkeypatch):
    """With velocities, the changes that are repeated, and a log for those who were absent."""
    monkeypatch.setattr("tests.fake.SHAPES", {"q": (96, 96)})
    clients = {"partition": "iid", "count": 4, "fraction": 0.75}
    config = setting(method=method, rounds=20, server=pace, clients=clients)
    place = Fake(config, ignore)
    place.remember_in(tmp_path / "run")
    final = run_rounds(config, place.initial(), place.federation(), tmp_path / "run", ignore)
    left = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert bytes_needed(config, final, 4) / KEPT <= left <= bytes_needed(config, final, 4) + 250 * 1024  # JSON


@pytest.mark.usefixtures("quick")
def test_momentum_of_the_factors_is_plain_fedavgm(tmp_path):
    config = setting(method="fedit", rounds=4, server={**HALF, "momentum_of": "factors"})
    place = Fake(config, ignore)
    place.remember_in(tmp_path / "run")
    final = run_rounds(config, place.initial(), place.federation(), tmp_path / "run", ignore)
    assert not final.base_delta
    states, given = place.trace.states, [one for one in place.trace.given if one.trained]
    p = oracle.shares([one.trained.num_examples for one in given if one.round == 4])
    for name, pair in final.adapter.items():
        for part in "AB":
            x, y = (oracle.numpy64(getattr(states[number].adapter[name], part)) for number in (3, 2))
            trained = [oracle.numpy64(getattr(one.trained.adapter[name], part)) for one in given if one.round == 4]
            mean = sum(w * tensor for w, tensor in zip(p, trained, strict=True))
            assert np.allclose(oracle.numpy64(getattr(pair, part)), mean + 0.5 * (x - y), atol=1e-6)
    verify(tmp_path / "run")


@pytest.mark.usefixtures("quick")
def test_a_folder_that_lost_its_motion_does_not_verify(tmp_path):
    config = setting(rounds=3, server=HALF)
    place = Fake(config, ignore)
    run_rounds(config, place.initial(), place.federation(), tmp_path / "run", ignore)
    with pytest.raises(AggregationError, match=r"server\.momentum"):
        merge_folders([tmp_path / "run" / "rounds" / "0002", tmp_path / "run" / "rounds" / "0003"], tmp_path / "out", None)
    (tmp_path / "run" / "rounds" / "0003" / "motion.safetensors").unlink()
    with pytest.raises(Exception, match="missing"):
        verify(tmp_path / "run")


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.momentum])
def test_methods_without_one_global_model_are_refused_by_name(method):
    with pytest.raises(ConfigError, match=f"do not go with {method}"):
        Fake(setting(method=method, server=HALF), ignore)


def test_what_says_nothing_is_refused():
    with pytest.raises(ConfigError, match="momentum_of = 'factors' is a control for fedit"):
        Fake(setting(server={**HALF, "momentum_of": "factors"}), ignore)
    with pytest.raises(ConfigError, match="say nothing without"):
        Fake(setting(server={"momentum_on": "all"}), ignore)


def test_the_head_is_as_the_mean_where_adapters_alone_move(tmp_path):
    plain, moving = (Fake(setting(rounds=3, server=pace), ignore) for pace in ({}, HALF))
    heads = [
        run_rounds(one.pool._rules, one.initial(), one.federation(), tmp_path / str(index), ignore).other
        for index, one in enumerate((plain, moving))
    ]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
