"""A run as others see it while it goes: in a terminal elsewhere, and in experiment trackers."""

import importlib.util
import json
import threading
import time

import pytest
from tests.runs import event, small_run, synthetic, written
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import parse_config
from fedex_lora.errors import UsageError
from fedex_lora.storage import followed_events, read_events
from fedex_lora.trackers import Trackers, scalars


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


def test_events_are_followed_as_they_are_written(tmp_path):
    """Also a line that is written in two pieces; broken lines are left out."""
    path, events = tmp_path / "events.jsonl", [event("round_done", round=number) for number in (1, 2)] + [event("run_done")]
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
    assert [one for one in followed_events(path, 0.01) if one] == events
    writer.join()


def configuration(*names):
    return parse_config({"trackers": list(names), "base": {"model": "demo"}, "task": {"name": "demo"}})


def test_off_by_default(tmp_path):
    with Trackers(configuration(), tmp_path) as tell:
        tell("round_done", round=1, metrics={"accuracy": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install mlflow"):
        Trackers(configuration("mlflow"), tmp_path)


def test_only_finite_numbers_are_sent():
    assert scalars("round_done", {"round": 3, "metrics": {"loss": float("nan"), "f1": 0.5}, "drift": {"a": 1.0}, "bytes_up": 9}) == (
        3,
        {"eval/f1": 0.5, "round/bytes_up": 9},
    )


def test_tensorboard_has_the_events_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small_run(tmp_path / "run", trackers=["tensorboard"])
    board = EventAccumulator(str(run / "trackers" / "tensorboard"))
    board.Reload()
    events = read_events(run / "events.jsonl")
    for name in ("exactness_error", "deviation", "bytes_down"):
        want = [(one["round"], pytest.approx(one[name], rel=1e-6)) for one in events if one["event"] == "round_done"]
        assert [(point.step, point.value) for point in board.Scalars(f"round/{name}")] == want
    want = [(0, events[0]), *((one["round"], one) for one in events if one["event"] == "round_done")]
    assert [(point.step, point.value) for point in board.Scalars("eval/accuracy")] == [
        (number, pytest.approx(one["metrics"]["accuracy"], rel=1e-6)) for number, one in want
    ]
    assert len(board.Scalars("held_out/accuracy")) == 3
