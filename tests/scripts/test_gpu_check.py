"""scripts/gpu_check: its short form, on the emulated accelerator; and that a check which cannot be made is not a check that holds."""

import json
import math
import sys

import pytest
from scripts import gpu_check, gpu_checks
from tests.fake_accelerator import accelerator

from fedex_lora.cli import demo
from fedex_lora.config import TaskSettings
from fedex_lora.storage.events import append_event


def test_a_check_runs_on_a_device():
    with accelerator():
        found = gpu_check.one("causal-lm nf4")
    assert found["status"] == "ok"
    assert found["device"] == "fake:0"
    assert found["exactness_error"] < 1e-6


def test_the_demo_is_checked_where_there_are_no_packages_for_a_report(monkeypatch):
    whole, short = demo.configuration, TaskSettings(name="demo", train_rows=60)
    monkeypatch.setattr(demo, "SHOWN", ("fedex",))
    monkeypatch.setattr(demo, "configuration", lambda *how: whole(*how).model_copy(update={"task": short}))
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    found = gpu_check.one("demo")
    assert (found["status"], found["report"]) == ("ok", "skipped: no vl_convert")
    assert found["fedex"]["exactness_error"] < 1e-6


def test_the_file_has_versions_times_and_reasons(tmp_path, monkeypatch, capsys):
    """Three checks in processes of their own: one that runs, one that hangs, one for which no time is left."""
    steps = {**gpu_check.STEPS, "demo": (gpu_checks.demo, 0.1), "glue": (gpu_checks.glue, 60)}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    assert gpu_check.main(["--steps", "device", "demo", "--out", str(tmp_path / "one.json")]) == 1
    assert gpu_check.main(["--steps", "glue", "--seconds", "1", "--out", str(tmp_path / "other.json")]) == 1
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "other"))
    assert one["versions"].keys() >= {"python", "torch", "transformers", "peft"}
    assert one["steps"]["device"]["status"] == "ok"
    assert one["steps"]["demo"] == {"status": "failed", "why": "took more than 0 seconds", "seconds": one["steps"]["demo"]["seconds"]}
    assert other["steps"]["glue"]["why"] == "no time left"
    assert "1 ok, 0 skipped, 1 failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"exactness_error": None}, {"exactness_error": 1e-3}, {"side_error": math.nan}, {"metrics": {"loss": None}}]
)
def test_a_number_that_is_missing_or_too_large_fails(change, tmp_path):
    started = {
        "method": "fedex",
        "clients": ["a"],
        "metrics": {"loss": 1.0},
        "base_quantization": "none",
        "device": "cpu",
        "base_delta": {},
    }
    append_event(tmp_path / "events.jsonl", "started", **started, total_parameters=1, trainable_parameters=1)
    done = {
        "round": 1,
        "bytes_down": 1,
        "bytes_up": 1,
        "exactness_error": 1e-8,
        "realised_error": 1e-7,
        "floor": 1e-6,
        "side_error": 1e-7,
        "metrics": {"loss": 1.0},
        "seconds": 1.0,
    }
    append_event(tmp_path / "events.jsonl", "round_done", **done)
    assert gpu_checks.numbers(tmp_path)["exactness_error"] == 1e-8
    append_event(tmp_path / "events.jsonl", "round_done", **{**done, **change})
    with pytest.raises((AssertionError, TypeError)):
        gpu_checks.numbers(tmp_path)
