"""What is said before a run: bytes and disk are bounds from above, steps are counted as Trainer does, and the run's bits stay the same."""

import json
import re
from functools import partial

import pytest
import torch
from rich.console import Console
from tests.runs.test_run import assert_same_bits, configuration, events_of, ignore
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.cli._around_run import said_before
from fedex_lora.client.arguments import training_arguments
from fedex_lora.config import base_folder, write_config
from fedex_lora.runs.estimate import bytes_of, estimate, steps_of
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.checkpoint import adapter_bytes, bytes_needed, gained_bytes
from fedex_lora.types import LoRAPair, ServerState

SENT, KEPT = 1.7, 3.5  # times what is so: the most that the bounds of bytes and of disk are
SOME = {"partition": "iid", "count": 4, "column": None, "fraction": 0.5}
RUNS = {
    "fedex": {},
    "fedex, sampled": {"clients": SOME},
    "fedex, momentum": {"server": {"momentum": 0.5}},
    "fedex-svd": {},
    "reinit": {},
    "keep": {},
    "fedit": {},
    "ffa": {},
    "fed-sb": {},
    "fedsa": {},
    "fedex-best": {"clients": {"partition": "iid", "count": 3, "column": None, "ranks": [1, 2, 4]}, "lora": {"r": 4}},
    "centralised": {},
    "full-ft": {"training": {"learning_rate": 1e-3, "num_train_epochs": 0.3}},
}


@pytest.mark.parametrize("name", RUNS)
def test_bytes_and_disk_are_bounds_from_above(name, tmp_path):
    """Against what a run of three rounds sent and left behind."""
    method, changes = name.partition(",")[0], {"training": {"num_train_epochs": 0.3}, **RUNS[name]}
    config = configuration(method=method, rounds=3, **changes)
    place = LocalSimulation(config, ignore)
    state, clients = place.initial(), len(place.pool.learner.rows)
    down, up, travelled = bytes_of(config, state, clients, place.host.ranks)
    run(config, tmp_path / "run", ignore)
    rounds, final = events_of(tmp_path / "run", "round_done"), events_of(tmp_path / "run", "evaluated")
    for event in rounds:
        taking_part = len(event["accepted"])
        assert event["bytes_down"] <= taking_part * down
        assert event["bytes_up"] <= taking_part * up
    sent = sum(event["bytes_down"] + event["bytes_up"] for event in (*rounds, *final))
    assert sent <= travelled <= SENT * sent
    left = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    needed = bytes_needed(config, state, clients)
    assert left <= needed + 250 * 1024  # events, configuration, manifests, and the tables of 21 files
    assert needed <= KEPT * left


@pytest.mark.parametrize(
    "training",
    [
        {"num_train_epochs": 2},
        {"num_train_epochs": 0.5},
        {"max_steps": 3},
        {"gradient_accumulation_steps": 2},
        {"dataloader_drop_last": True},
    ],
    ids=str,
)
def test_steps_are_those_of_trainer(training, tmp_path):
    config = configuration(rounds=1, training=training, task={"train_rows": 100})
    run(config, tmp_path / "run", ignore)
    done = events_of(tmp_path / "run", "client_done")
    assert len(done) == 3
    assert all(event["steps"] == steps_of(event["num_examples"], training_arguments(config)) for event in done)


def test_who_is_asked_seldom_lacks_no_more_rounds_than_there_are(tmp_path):
    """One client is asked a round, of two, four or forty: in two rounds nobody misses more than two."""
    found = set()
    for clients, fraction in ((2, 0.5), (4, 1e-9), (40, 1e-9)):
        config = configuration(rounds=2, clients=SOME | {"fraction": fraction})
        place = LocalSimulation(config, ignore)
        found.add(bytes_of(config, place.initial(), clients, place.host.ranks)[:2])
    assert len(found) == 1


def test_a_run_that_is_estimated_first_has_the_same_bits(tmp_path):
    config = configuration(lora={"dropout": 0.1}, clients={"fraction": 0.6})
    run(config, tmp_path / "plain", ignore)
    run(config, tmp_path / "said", ignore, home=partial(said_before, console=Console(quiet=True)))
    assert_same_bits(tmp_path / "plain", tmp_path / "said")
    place = LocalSimulation(config, ignore)
    before = place.initial()
    found = estimate(place)
    after = place.initial()
    assert all(before.adapter[name].A.equal(pair.A) and before.adapter[name].B.equal(pair.B) for name, pair in after.adapter.items())
    assert 0 < found.step_seconds < found.round_seconds < found.run_seconds
    assert found.memory_bytes > 10**8  # Python with PyTorch alone


def test_the_command_says_it_before_a_run_and_instead_of_one(tmp_path):
    (tmp_path / "run.toml").write_text(write_config(configuration(rounds=1)))
    call = partial(CliRunner(env={"COLUMNS": "400"}).invoke, app)
    only = call(["run", str(tmp_path / "run.toml"), "--dry-run", "--out", str(tmp_path / "out")])
    assert (only.exit_code, (tmp_path / "out").exists()) == (0, False), only.stderr
    assert "expected: " in only.stdout
    assert "each client and round: up to" in only.stdout
    found = json.loads(call(["run", str(tmp_path / "run.toml"), "--dry-run", "--json"]).stdout)
    assert found["device_bytes"] is None
    assert found["run_seconds"] > 0
    begun = call(["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")])
    assert len(set(re.findall(r"up to ([\d.]+ .B) of disk", begun.stdout))) == 1  # in two lines, in one way
    assert begun.stdout.count("of disk") == 2
    assert begun.stdout.index("expected: ") < begun.stdout.index("round 1/1")
    assert "as one adapter it has rank 6: 2, and 4 a round" in begun.stdout
    more = call(["run", str(tmp_path / "run.toml"), "--rounds", "2", "--resume", "--out", str(tmp_path / "out")])
    assert more.exit_code == 0, more.stderr
    assert "expected: " not in more.stdout
    bad = call(["run", str(tmp_path / "run.toml"), "--dry-run", "--set", f"base.model={base_folder()}/none"])
    assert (bad.exit_code, len(bad.stderr.strip().splitlines())) == (1, 1)


@pytest.mark.parametrize("method", ["fedex", "fedex-svd", "keep", "ffa", "rolora", "fedit"])
@pytest.mark.parametrize("keep", [None, 2, 4])
def test_bounds_of_any_number_of_rounds_are_said_at_once(method, keep):
    """What is kept, against a plain loop over the rounds; what travels grows by the same every two rounds, up to a billion."""
    pair = LoRAPair(A=torch.zeros(2, 24), B=torch.zeros(40, 2))
    state = ServerState(method=method, round=0, adapter={"q": pair, "k": pair.first(1)}, base_delta={}, other={})

    def of(rounds):
        config = configuration(method=method, rounds=rounds, **({} if keep is None else {"keep_rounds": keep}))
        return config, bytes_needed(config, state, 3), bytes_of(config, state, 3, {})[2]

    for rounds in (1, 2, 3, 9, 30):
        config, needed, _ = of(rounds)
        gained = [gained_bytes(config, state.adapter, 3, number) for number in range(rounds + 1)]
        own = method == "keep"
        kept = [adapter_bytes(state) * (1 + 3 * (1 + own)) + 3 * size for size in gained[1:]][-rounds if keep is None else -keep - 1 :]
        assert needed == sum(kept) + adapter_bytes(state) + gained[-1] + 3 * adapter_bytes(state) * (5 + own)
    travelled = {rounds: of(rounds)[2] for rounds in (10, 12, 10**9)}
    assert travelled[10**9] == travelled[10] + (10**9 - 10) // 2 * (travelled[12] - travelled[10])
    assert of(10**9)[1] >= of(10**6)[1] > 0
