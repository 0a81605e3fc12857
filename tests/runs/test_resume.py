"""Interrupted runs go on to the same bits, whenever they stopped and whatever the method keeps."""

import json
import shutil

import pytest
from tests.fake import Fake
from tests.fake import setting as without_model
from tests.runs.test_run import assert_same_bits, configuration, events_of, ignore
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import read_config
from fedex_lora.errors import StorageError, UsageError
from fedex_lora.offline.verify import verify
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.storage.events import is_over, read_events
from fedex_lora.storage.files import checksum, read_manifest
from fedex_lora.storage.run_folder import locked, round_folder, run_rounds_of, strays

CASES = {
    "fedex": {},
    "keep, two of three": {"method": "keep", "clients": {"fraction": 0.6}},
    "fedsa": {"method": "fedsa"},
    "ranks": {"method": "fedex-best", "clients": {"ranks": [1, 2, 4]}},
    "reinit": {"method": "reinit"},
    "cores, moments kept": {"method": "fed-sb", "local": {"optimizer_state": "keep"}, "lora": {"alpha": 1.1}},
    "moments kept, uneven scaling": {"local": {"optimizer_state": "keep", "schedule": "run"}, "lora": {"alpha": 1.1}},
    "full-ft": {"method": "full-ft", "training": {"learning_rate": 1e-3}},
}
# Of them, those that train a model; the others move factors by noise.
TRAINED = ("fedex", "cores, moments kept", "moments kept, uneven scaling", "full-ft")


class StopError(Exception):
    """What kills a run here; test_crash.py kills processes."""


def stopping(event, count):
    """An emit that fails at the count-th event of that name."""
    seen = []

    def emit(told):
        if told.name == event:
            seen.append(told)
            if len(seen) == count:
                raise StopError

    return emit


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that were never interrupted, each made once."""
    made = {}

    def get(case="fedex"):
        if case not in made:
            home, config = (LocalSimulation, configuration) if case in TRAINED else (Fake, without_model)
            made[case] = config(rounds=3, **CASES[case]), tmp_path_factory.mktemp("whole") / "run", home
            run(*made[case][:2], ignore, home=home)
        return made[case]

    return get


STOPS = [("started", 1), ("client_done", 2), ("round_done", 1), ("evaluated", 1), ("client_done", 5)]


@pytest.mark.parametrize(
    ("case", "event", "count"),
    [
        *(("fedex", *stop) for stop in STOPS[1::3]),
        *(("keep, two of three", *stop) for stop in STOPS),
        *((case, "client_done", 5) for case in CASES if case not in ("fedex", "keep, two of three", "full-ft")),
        ("full-ft", "client_done", 2),
    ],
)
def test_a_run_goes_on_to_the_same_bits(case, event, count, whole, tmp_path):
    config, want, home = whole(case)
    with pytest.raises(StopError):
        run(config, tmp_path / "run", stopping(event, count), home=home)
    trained = []
    run(
        config,
        tmp_path / "run",
        lambda event: trained.append(event.client) if event.name == "step" and event.step == 1 else None,
        True,
        home,
    )
    assert_same_bits(tmp_path / "run", want)
    assert sorted(path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*")) == sorted(
        path.relative_to(want) for path in want.rglob("*")
    )
    assert [event["round"] for event in events_of(tmp_path / "run", "round_done")] == [1, 2, 3]
    if event == "evaluated":
        assert not trained  # every round was whole
    if event == "client_done":
        assert len(trained) == sum(len(one["clients"]) for one in events_of(want, "round_started")) - count  # answers are kept


def test_a_run_that_an_older_version_began_goes_on(whole, tmp_path):
    """Its configuration says `messages.per_client = false`, a default of a key that is gone."""
    config, want, home = whole("reinit")
    with pytest.raises(StopError):
        run(config, tmp_path / "run", stopping("client_done", 5), home=home)
    mark = tmp_path / "run" / "config.toml"
    mark.write_text(mark.read_text().replace("[messages]\n", "[messages]\nper_client = false\n"))
    assert "per_client" in mark.read_text()
    run(read_config(mark), tmp_path / "run", ignore, True, home)
    assert_same_bits(tmp_path / "run", want)


def test_a_run_that_is_finished_stays_as_it_is(whole, tmp_path):
    config, want, _ = whole()
    shutil.copytree(want, tmp_path / "run")
    before = {path: path.stat().st_mtime for path in tmp_path.rglob("*") if path.name != "config.toml" and path.is_file()}
    told = []
    run(config, tmp_path / "run", lambda event: told.append(event.name), True)
    assert told == ["finished"]
    assert all(path.stat().st_mtime == time for path, time in before.items())
    again = CliRunner().invoke(app, ["run", str(want / "config.toml"), "--out", str(tmp_path / "run"), "--resume"])
    assert again.exit_code == 0, again.output
    assert "nothing is left to do" in again.output


MORE = {name: change for name, change in CASES.items() if name not in ("moments kept, uneven scaling", "full-ft")} | {
    "momentum": {"server": {"momentum": 0.5}},
    "moments kept": {"local": {"optimizer_state": "keep"}},
    "momentum, moments kept, two of three": {
        "server": {"momentum": 0.5},
        "local": {"optimizer_state": "keep"},
        "clients": {"fraction": 0.6},
        "keep_rounds": 2,
    },
}


@pytest.mark.parametrize("case", MORE)
def test_a_finished_run_with_more_rounds_ends_as_one_that_had_them_at_once(case, tmp_path):
    """3 rounds, then 2 more, are 5 rounds: the same bits, and its log says when it was over."""
    home, config = (LocalSimulation, configuration) if case == "fedex" or "moments kept" in case else (Fake, without_model)
    run(config(rounds=5, **MORE[case]), tmp_path / "want", ignore, home=home)
    out = tmp_path / "run"
    run(config(rounds=3, **MORE[case]), out, ignore, home=home)
    first = [event["round"] for event in events_of(out, "round_done")]
    over = []
    run(config(rounds=5, **MORE[case]), out, lambda event: over.append(is_over(read_events(out / "events.jsonl"))), True, home)
    assert (first, [event["round"] for event in events_of(out, "round_done")]) == ([1, 2, 3], [1, 2, 3, 4, 5])
    assert_same_bits(out, tmp_path / "want")
    assert not any(over[1:-1])  # it was over before, and is again at its end
    assert [event["rounds"] for event in events_of(out, "run_done")] == [3, 5]
    assert read_config(out / "config.toml").rounds == 5


def test_rounds_that_cannot_be_added_are_refused(whole, tmp_path):
    config, want, home = whole("reinit")
    out = shutil.copytree(want, tmp_path / "run")
    with pytest.raises(UsageError, match="has 3 rounds already, and rounds = 2: give rounds = 3 or more"):
        run(config.model_copy(update={"rounds": 2}), out, ignore, True, home)
    config, want, home = whole("moments kept, uneven scaling")
    again = CliRunner().invoke(app, ["run", str(want / "config.toml"), "--out", str(want), "--rounds", "5", "--resume"])
    assert again.exit_code == 2
    assert 'local.schedule = "run" spreads the learning rate' in " ".join(again.output.split())
    assert read_config(out / "config.toml").rounds == read_config(want / "config.toml").rounds == 3


@pytest.mark.parametrize("lost", ["final", "final/base_delta.safetensors", "rounds/0003", "an update in final"])
def test_a_finished_run_that_lost_something_gets_it_again(lost, whole, tmp_path):
    """Also where its events say that it was done."""
    config, want, home = whole("reinit")
    out = shutil.copytree(want, tmp_path / "run")
    if lost == "final":
        shutil.rmtree(out / "final")
    elif lost == "rounds/0003":
        (out / "rounds" / "0003").rename(out / "rounds" / "0003.broken")
        shutil.copytree(out / "rounds" / "0002" / "trainable", out / "final" / "trainable", dirs_exist_ok=True)
    elif lost == "an update in final":
        update = next((out / "rounds" / "0003" / "updates").iterdir()).relative_to(out / "rounds" / "0003")
        (out / "final" / "updates").mkdir()
        shutil.copyfile(out / "rounds" / "0003" / update, out / "final" / update)
        manifest = read_manifest(out / "final")
        manifest["files"][str(update)] = checksum(out / "final" / update)
        (out / "final" / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(StorageError, match=r"final/updates/.* is not what the last round left"):
            verify(out)
    else:
        (out / lost).unlink()
    told = []
    run(config, out, lambda event: told.append(event.name), True, home)
    assert "finished" not in told
    assert told.count("round_done") == (lost == "rounds/0003")
    assert_same_bits(out, want)
    assert sorted(path.name for path in (out / "final").iterdir()) == sorted(path.name for path in (want / "final").iterdir())
    verify(out)


def test_another_process_is_kept_out(tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(UsageError, match="another process is at work"):
        run(configuration(), tmp_path / "run", ignore, True)


def test_a_broken_round_is_set_aside_and_said(whole, tmp_path):
    config, want, _ = whole()
    shutil.copytree(want, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    (tmp_path / "run" / "events.jsonl").write_text("\n".join(line for line in lines if "run_done" not in line) + "\n{torn")
    (tmp_path / "run" / "rounds" / "0003.broken").mkdir()  # of an earlier time
    broken = tmp_path / "run" / "rounds" / "0003" / "base_delta.safetensors"
    broken.write_bytes(broken.read_bytes()[:-3])
    said = []
    run(config, tmp_path / "run", lambda event: said.append(event.message) if event.name == "warning" else None, True)
    assert any("set aside" in message and "0003" in message for message in said)
    assert (tmp_path / "run" / "rounds" / "0003.broken1").is_dir()
    assert not strays(tmp_path / "run")
    assert_same_bits(tmp_path / "run", want)


@pytest.mark.parametrize("rounds", [(3,), (2, 3), (1, 2, 3)])
def test_the_command_goes_on_after_broken_rounds(rounds, whole, tmp_path):
    """Also when the clients' memories are ahead of the last whole round: they are sent everything."""
    _, want, _ = whole()
    shutil.copytree(want, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    events = tmp_path / "run" / "events.jsonl"
    events.write_text("\n".join(line for line in events.read_text().splitlines() if "run_done" not in line) + "\n")
    for number in rounds:
        broken = tmp_path / "run" / "rounds" / f"000{number}" / "base_delta.safetensors"
        broken.write_bytes(broken.read_bytes()[:-3])
    result = CliRunner().invoke(app, ["run", str(want / "config.toml"), "--out", str(tmp_path / "run"), "--resume"])
    assert result.exit_code == 0, result.output
    assert result.output.count("a broken round was set aside") == len(rounds)
    assert_same_bits(tmp_path / "run", want)


def test_another_configuration_is_refused(whole, tmp_path):
    config, want, _ = whole()
    with pytest.raises(
        UsageError,
        match=rf"another configuration \(seed: yours 7, the run's {config.seed}\): go on with .*config.toml, or give another out",
    ):
        run(config.model_copy(update={"seed": 7}), want, ignore, True)
    looser = config.model_copy(update={"messages": config.messages.model_copy(update={"norm_bound": 50.0})})
    run(looser, want, ignore, True)  # a bound may change: the run is the same
    run(config, want, ignore, True)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no run"):
        run(config, tmp_path / "else", ignore, True)


def test_rounds_are_in_the_order_of_their_numbers(tmp_path):
    for number in (9999, 10000, 2):
        round_folder(tmp_path, number).mkdir(parents=True)
    assert [folder.name for folder in run_rounds_of(tmp_path)] == ["10000", "9999", "0002"]


def test_other_rows_are_refused_and_the_first_ones_go_on(tmp_path):
    lines = [f"day {i},{'ab'[i % 2]},{'ns'[i % 3 % 2]}" for i in range(24)]
    rows, out = tmp_path / "rows.csv", tmp_path / "run"
    task = {"name": "custom", "train": str(rows), "eval": str(rows), "train_rows": None, "eval_rows": None, "labels": ["a", "b"]}

    def on(rounds, lines):
        rows.write_text("\n".join(["text,label,site", *lines]) + "\n")
        run(configuration(rounds=rounds, task=task, clients={"column": "site"}), out, ignore, resume=True)

    on(1, lines)
    for others in (lines[:-1], lines[::-1], [lines[0].replace("day", "week"), *lines[1:]]):
        with pytest.raises(UsageError, match=r"the rows are not those that the run in .* began with"):
            on(2, others)
    assert len((out / "rows-digest").read_text().strip()) == 16  # one of all, and nothing of single rows
    assert not list((out / "final").rglob("rows-digest"))
    on(2, lines)
    (out / "rows-digest").unlink()  # as of a run that an older version began
    on(3, lines[:-1])
    assert [event["round"] for event in events_of(out, "round_done")] == [1, 2, 3]
