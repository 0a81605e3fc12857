"""A run as others see it while it goes: in a terminal elsewhere, and in experiment trackers."""

import contextlib
import importlib.util
import inspect
import io
import json
import shutil
import threading
import time

import pytest
from accelerate import tracking
from rich.console import Console
from tests.finished_runs import event, small_run, synthetic, written
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.cli._shared import consoles
from fedex_lora.cli.console import Display, console_table
from fedex_lora.config import parse_config
from fedex_lora.errors import UsageError
from fedex_lora.runs.trackers import Trackers, _opened, scalars
from fedex_lora.storage.event_tail import tail_events
from fedex_lora.storage.events import RoundDone, of_kind, read_events, record


def test_watch_a_finished_run(tmp_path):
    run = written(tmp_path / "run", synthetic(rounds=3, clients=4))
    result = CliRunner().invoke(app, ["watch", str(run)])
    assert result.exit_code == 0, result.stderr
    for said in ("round 0/3", "round 3/3", "accuracy 0.7000", "exactness error 1.0e-07", "down 20.00 kB"):
        assert said in result.stdout, said


def test_watch_once_and_nothing(tmp_path):
    run = written(tmp_path / "run", list(synthetic(rounds=3, clients=2))[:-1])
    result = CliRunner().invoke(app, ["watch", str(run), "--once"])
    assert "not done yet" in result.stdout
    bad = CliRunner().invoke(app, ["watch", str(tmp_path)])
    assert bad.exit_code == 2
    assert len(bad.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["[/b]", "[red]x", "[link=http://x]"])
def test_names_are_shown_as_they_are(name):
    """Also on a terminal, with bars, where brackets could be read as markup."""
    shown = io.StringIO()
    with Display(Console(file=shown, force_terminal=True, width=200), clock=lambda: 0.0) as display:
        display(record("started", method="fedex", task=name, clients=[name], rounds=1, metrics={}))
        display(record("round_started", round=1, clients=[name]))
        display(record("step", client=name, step=1, steps=2))
        display(record("client_done", round=1, client=name, train_loss=None))
        display(record("held_out", round=1, metrics={name: 0.5}))
        display(record("round_done", round=1, metrics={name: 0.5}, bytes_down=1, bytes_up=1))
    assert f"fedex on {name}: 1 clients" in shown.getvalue()
    assert f"round 1/1  {name} 0.5000" in shown.getvalue()


def test_watch_shows_bars_of_clients_without_steps():
    shown = io.StringIO()
    with Display(Console(file=shown, force_terminal=True, width=200), clock=lambda: 0.0) as display:
        display(record("started", method="fedex", clients=["a"], rounds=1, metrics={}))
        display(record("round_started", round=1, clients=["a"]))
    assert "clients" in shown.getvalue()
    assert "steps" not in shown.getvalue()


def test_watch_bears_what_is_missing(tmp_path):
    """Numbers that are not finite, fields that an older version did not write, lines that are no events."""
    gone = ("disk_bytes", "realised_error", "floor", "seconds", "trainable_parameters")
    events = [{key: value for key, value in one.items() if key not in gone} for one in synthetic(rounds=2, clients=2)]
    for one in events:
        one |= {key: None for key in ("train_loss", "exactness_error", "deviation", "time") if key in one}
        if one["event"] == "round_done":
            one["metrics"] = {"accuracy": None, "loss": 0.25}
    strange = [[1, 2], "x", 3, {"a": 1}, event("round_done"), event("started", clients=None)]
    run = written(tmp_path / "run", [*strange, *(one for one in events if one["event"] != "round_started")])
    result = CliRunner().invoke(app, ["watch", str(run)])
    assert result.exit_code == 0, result.stderr
    assert "round 2/2  accuracy nan loss 0.2500  exactness error nan  averaging alone is off by nan%  down" in result.stdout
    assert result.stdout.count("cannot be shown") == 2


def test_tables_keep_their_numbers_on_narrow_terminals():
    """The first column and headings fold; at any width every digit is there."""
    heads = ["method", "accuracy", "deviation of plain averaging", "exactness error", "sent down", "sent up"]
    rows = [["a name that is long", "0.5417", "123.4%", "1.2e-16", "123.45 MB", "123.45 MB"] for _ in range(2)]
    for width in (80, 40):
        shown = io.StringIO()
        Console(file=shown, width=width, soft_wrap=True).print(console_table("[x]", heads, rows))
        lines = shown.getvalue().splitlines()
        assert sum(all(cell in line for cell in rows[0][1:]) for line in lines) == 2
        assert "…" not in shown.getvalue()
        assert width == 40 or max(map(len, lines)) <= 80


def test_a_name_is_no_markup(capsys):
    consoles(False).print("ward[/x] [red]bone", console_table("", ["[/a]"], [["[/b]"]]))
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("ward[/x] [red]bone", "[/a]", "[/b]"))


def test_events_are_followed_as_they_are_written(tmp_path):
    """Also a line that is written in two pieces; broken lines are left out."""
    done = [event("round_done", round=number, metrics={}, bytes_down=1, bytes_up=1) for number in (1, 2)]
    path, events = tmp_path / "events.jsonl", [*done, event("run_done")]
    path.write_text("")

    def write():
        for one in events:
            line = json.dumps(one) + "\n"
            for piece in (line[:9], line[9:], "broken\n"):
                with path.open("a") as file:
                    file.write(piece)
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    assert [(one.name, getattr(one, "round", None)) for one in tail_events(path, 0.01) if one] == [
        ("round_done", 1),
        ("round_done", 2),
        ("run_done", None),
    ]
    writer.join()


def configuration(*names):
    return parse_config({"trackers": list(names), "base": {"model": "demo"}, "task": {"name": "demo"}})


def test_off_by_default(tmp_path):
    with Trackers(configuration(), tmp_path, print) as tell:
        tell(record("round_done", round=1, metrics={"accuracy": 0.5}, bytes_down=1, bytes_up=1))
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install mlflow"):
        Trackers(configuration("mlflow"), tmp_path, print)


def test_only_finite_numbers_are_sent():
    done = RoundDone(round=3, metrics={"loss": float("nan"), "f1": 0.5}, drift={"a": 1.0}, bytes_down=8, bytes_up=9)
    assert scalars(done) == (3, {"eval/f1": 0.5, "round/bytes_down": 8, "round/bytes_up": 9})


def test_tensorboard_has_the_events_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small_run(tmp_path / "run", trackers=["tensorboard"])
    board = EventAccumulator(str(run / "trackers" / "tensorboard"))
    board.Reload()
    events = read_events(run / "events.jsonl")
    for name in ("exactness_error", "deviation", "bytes_down"):
        want = [(one.round, pytest.approx(getattr(one, name), rel=1e-6)) for one in of_kind(events, RoundDone)]
        assert [(point.step, point.value) for point in board.Scalars(f"round/{name}")] == want
    want = [(0, events[0]), *((one.round, one) for one in of_kind(events, RoundDone))]
    assert [(point.step, point.value) for point in board.Scalars("eval/accuracy")] == [
        (number, pytest.approx(one.metrics["accuracy"], rel=1e-6)) for number, one in want
    ]
    assert len(board.Scalars("held_out/accuracy")) == 3


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    """MLflow with a store of files in a folder of the test."""
    module = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    yield module
    with contextlib.suppress(Exception):  # of a run whose store is gone; else it is ended, elsewhere, when Python ends
        module.end_run()


def test_mlflow_has_the_events_numbers(tmp_path, mlflow):
    run = small_run(tmp_path / "run", trackers=["mlflow"])
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("fedex-lora").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["method"] == "fedex"
    done = [one for one in of_kind(read_events(run / "events.jsonl"), RoundDone)]
    for name in ("exactness_error", "deviation", "bytes_down"):
        points = client.get_metric_history(found.info.run_id, f"round/{name}")
        assert [(point.step, point.value) for point in points] == [(one.round, getattr(one, name)) for one in done]


def test_a_tracker_that_cannot_be_reached_is_an_error_before_training(tmp_path, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UsageError, match="trackers: mlflow cannot be opened"):
        small_run(tmp_path / "run", trackers=["mlflow"])
    assert list((tmp_path / "run").iterdir()) == []


def test_a_tracker_that_fails_later_changes_nothing(tmp_path, mlflow):
    """Its store is lost while the run goes on: one warning, and the run's own error is the one that is seen."""
    said = []
    tell = Trackers(configuration("mlflow"), tmp_path, lambda event: said.append((event.name, event.message)))

    def run():
        with tell:
            shutil.rmtree(tmp_path / "mlflow")
            for number in (1, 2, 3):
                tell(record("round_done", round=number, metrics={"accuracy": 0.5}, bytes_down=1, bytes_up=1))
            raise KeyError("the run's own")

    with pytest.raises(KeyError, match="the run's own"):
        run()
    assert [event for event, _ in said] == ["warning"]
    assert said[0][1].startswith("tracker mlflow failed and is told nothing more: ")


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb", "trackio"])
def test_accelerate_s_trackers_take_what_they_are_given(name, tmp_path, monkeypatch):
    """Also those that are not installed here: by the signature of accelerate's class."""
    taken, real = [], tracking.LOGGER_TYPE_TO_CLASS[name]

    class Taking:
        def __init__(self, **arguments):
            made = inspect.signature(real.__init__)
            taken.append(made.bind(self, **arguments).arguments)

        def start(self):
            taken.append("start")

        def store_init_configuration(self, settings):
            taken.append(settings["method"])

    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {name: Taking})
    _opened(name, configuration(), tmp_path)
    assert taken[1:] in (["start"], ["start", "fedex"])
    assert "run_name" in taken[0] or "experiment_name" in taken[0]
