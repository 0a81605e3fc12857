"""Comparisons: paired, tuned on held-out training rows only, continued after an interruption."""

import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from scipy import stats
from tests.runs.test_run import configuration

from fedex_lora.config import parse_config, write_config
from fedex_lora.errors import FedexLoraError, TrainingError, UnreadableError, UnwritableError, UsageError
from fedex_lora.experiments.compare import compare as compare_by
from fedex_lora.experiments.compare import configured, interval, parse_protocol
from fedex_lora.experiments.compare._plan import RATE, Variant, grid_around, label
from fedex_lora.experiments.compare._runs import RunJob, nobody, outcomes
from fedex_lora.experiments.compare._statistics import Curve, curve, held_out_score, rounds_to, summary
from fedex_lora.experiments.compare._tuning import best_point
from fedex_lora.experiments.compare._variants import controls, variants
from fedex_lora.report.analysis import sent
from fedex_lora.runs.run import run
from fedex_lora.storage.events import HeldOut, RoundDone, Started, of_kind, read_events, record
from fedex_lora.storage.files import finite_json


def compare(config, methods, seeds, out, learning_rates=None, with_controls=True, jobs=1, tell=lambda line, done, total: None, **more):
    """By a protocol of these."""
    tree = {"methods": methods, "seeds": seeds, "controls": with_controls, **more}
    tree |= {"grid": {RATE: learning_rates}} if learning_rates else {}
    return compare_by(config, parse_protocol(tree), out, jobs, tell)


CURVE = Curve([0.4, 0.5, 0.6, 0.7], {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.7}, {0: 3.0, 1: 2.0, 2: 1.0, 3: 0.5}, 10.0, 5.0, 1e-8, 3.0, 100)


def test_controls_stand_in_every_comparison():
    def names(*chosen):
        return [variant.name for variant in controls(variants(chosen))]

    assert names("fedit", "fedex", "ffa", "fedex") == ["fedit+balanced", "ffa@2r"]
    assert names("fedit+balanced", "ffa@2r") == []
    assert names("full-ft") == []
    assert [variant.name for variant in variants(["fedit", "fedit "])] == ["fedit"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedx", "did you mean 'fedex'"),
        ("ffa@r2", "METHOD@2r"),
        ("ffa@", "METHOD@2r"),
        ("fedit+balance", "did you mean 'balanced'"),
        ("", "unknown method"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(UsageError, match=message):
        variants(["fedit", name])


def test_a_variant_changes_method_rate_seed_and_rank_only():
    config = configuration(lora={"r": 2, "alpha": 6, "rank_pattern": {"q_proj": 3}})
    made = configured(config, Variant.parse("ffa@2r"), {RATE: 0.5}, 7)
    assert (made.method, made.seed, made.training["learning_rate"]) == ("ffa", 7, 0.5)
    assert (made.lora.r, made.lora.alpha, made.lora.rank_pattern) == (4, 12, {"q_proj": 6})  # alpha / r stays
    assert made.model_copy(update={key: getattr(config, key) for key in ("method", "seed", "lora", "training")}) == config
    assert grid_around(config) == [0.00167, 0.005, 0.015]


def test_twice_the_rank_has_the_same_scaling_rank_stabilised_too():
    lora = {"r": 2, "alpha": 6, "rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}}
    made = configured(configuration(lora=lora), Variant.parse("ffa@2r"), {}, 0).lora
    assert (made.r, made.rank_pattern) == (4, {"q_proj": 6})
    assert (made.alpha / 4**0.5, made.alpha_pattern["q_proj"] / 6**0.5) == pytest.approx((6 / 2**0.5, 5 / 3**0.5))


def test_a_comparison_goes_on_from_a_result(tmp_path):
    """Also with keys for all runs; its rank is that of the result, so no variant has another."""
    run(configuration(rounds=1), tmp_path / "first", nobody)
    tree = configuration(rounds=1, base={"start": str(tmp_path / "first")}).model_dump(mode="json", exclude_none=True)
    config = parse_config({**tree, "lora": {}})
    result = compare(config, ["fedit", "fedex"], [0], tmp_path / "out", [5e-3], with_controls=False, set={"task.eval_rows": 15})
    assert [row["name"] for row in result["methods"]] == ["fedit", "fedex"]
    assert result["config"]["lora"] == {}
    begun = read_events(next((tmp_path / "out" / "runs" / "fedex").rglob("events.jsonl")))
    assert of_kind(begun, Started)[0].start["round"] == 1
    with pytest.raises(UsageError, match=r"ffa@2r: base\.start goes on with an adapter as it is: leave @2r out, or remove base\.start"):
        compare(config, ["fedit", "ffa@2r"], [0], tmp_path / "twice", [5e-3])


def test_a_rate_is_chosen_by_the_later_half_of_the_held_out_rows():
    """Rounds 2 and 3 of 3; ties go to the lower loss; smaller metrics can be the better ones."""
    assert held_out_score(CURVE, 1) == (pytest.approx(0.6), pytest.approx(-0.75))
    assert held_out_score(CURVE, -1)[0] == pytest.approx(-0.6)
    assert held_out_score(replace(CURVE, held_out_loss={2: 0.1, 3: 0.1}), 1) > held_out_score(CURVE, 1)


@pytest.mark.parametrize("values", [[0.7, 0.72, 0.75], [0.1, 0.9], list(np.linspace(0, 1, 9))])
def test_intervals_are_students(values):
    """Against scipy's own interval."""
    mean, width = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - width, mean + width) == (pytest.approx(low), pytest.approx(high))
    assert interval([0.5]) == (0.5, None)


def test_differences_are_paired_by_seed():
    """Two methods whose seeds vary far more than their difference: the paired interval is narrow, the single ones are not."""

    def ending(value):
        return replace(CURVE, metric=[0.0, value])

    noise = {0: 0.2, 1: 0.5, 2: 0.9}
    runs = {"a": {s: ending(v) for s, v in noise.items()}, "b": {s: ending(v + 0.01 + 0.001 * s) for s, v in noise.items()}}
    target, (a, b) = summary(runs, "a", None, 1)
    assert target == pytest.approx(np.mean(list(noise.values())))
    assert a["difference"] is None
    assert b["difference"] == pytest.approx(0.011)
    assert b["difference_half_width"] == pytest.approx(interval([0.01, 0.011, 0.012])[1])
    assert b["half_width"] > 100 * b["difference_half_width"]


def test_rounds_to_a_target():
    assert rounds_to([0.1, 0.5, 0.4, 0.9], 0.5, 1) == 1
    assert rounds_to([3.0, 2.0, 1.0], 1.5, -1) == 2
    assert rounds_to([0.1, 0.2], 0.5, 1) is None
    assert rounds_to([0.9, 0.2, 0.8], 0.5, 1) == 2  # an untrained model reaches nothing


def recorded(metrics, errors=(1e-8, 2e-8), held=(0.5, 0.6)):
    """The events of a run of two rounds; None is null: a number that was not finite."""
    started = Started(method="fedex", clients=[], headline="accuracy", metrics={"accuracy": 0.3}, trainable_parameters=10)
    rounds = [
        record(
            "round_done",
            round=number,
            metrics={} if value == "none" else {"accuracy": value},
            exactness_error=error,
            bytes_down=2,
            bytes_up=1,
            seconds=1.0,
        )
        for number, (value, error) in enumerate(zip(metrics, errors, strict=True), 1)
    ]
    own = [HeldOut(round=number, metrics={"accuracy": value, "loss": 1.0}) for number, value in enumerate(held, 1)]
    return [started, *rounds, *own]


def test_a_metric_that_is_not_finite_is_not_replaced_by_one_of_other_rows():
    """It stays NaN on the rows it is of; only a method that has no global model is measured on the clients' own rows."""
    assert curve(recorded([0.7, 0.8])).metric == [0.3, 0.7, 0.8]
    broken = curve(recorded([None, 0.8]))
    assert [broken.metric[0], broken.metric[2]] == [0.3, 0.8]
    assert math.isnan(broken.metric[1])
    own = curve(recorded(["none", "none"])).metric
    assert own[1:] == [0.5, 0.6]


def test_an_error_that_is_not_finite_is_the_worst():
    """Instead of an exception after hours, or of the largest of the others."""
    assert curve(recorded([0.7, 0.8])).exactness == 2e-8
    for errors in ([None, 1e-8], [1e-8, None]):
        broken = curve(recorded([0.7, 0.8], errors))
        assert math.isnan(broken.exactness)
        _, rows = summary({"fedit": {0: curve(recorded([0.7, 0.8])), 1: broken}}, "fedit", None, 1)
        assert math.isnan(rows[0]["exactness_error"])


def test_a_rate_whose_held_out_score_is_not_finite_is_the_worst():
    broken, fine = (curve(recorded([0.7, 0.8], held=held)) for held in ((None, None), (0.1, 0.1)))
    assert held_out_score(broken, 1) < held_out_score(fine, 1)
    assert held_out_score(broken, -1) < held_out_score(fine, -1)


def test_a_whole_comparison(tmp_path):
    """Each rate is the best on the held-out rows, seeds are paired, the table and the JSON say the same, and a second call runs nothing."""
    config, told = configuration(rounds=2, clients={"partition": "iid", "count": 2, "holdout": 0.2}), []

    def tell(line, done, total):
        told.append((line, done, total))

    out = tmp_path / "out"
    result = compare(config, ["fedit", "fedex", "fedsa"], [0, 1], out, [1e-3, 1e-2], tell=tell)
    assert (out / "compare.json").read_text() == finite_json(result) + "\n"
    assert [row["name"] for row in result["methods"]] == ["fedit", "fedex", "fedsa", "fedit+balanced"]
    starts, finals = {}, {}
    for row in result["methods"]:
        travelled = []
        scores = {point["settings"][RATE]: point["score"] for point in row["tuning"]}
        assert row["settings"] == {RATE: max(scores, key=scores.get)}
        for seed in (0, 1):
            events = read_events(out / "runs" / row["name"] / label(row["settings"]) / f"seed-{seed}" / "events.jsonl")
            starts.setdefault(seed, []).append((events[0].metrics, events[0].train_rows))
            travelled.append([size / config.rounds for size in sent(events)])
            finals[row["name"], seed] = [event.metrics.get("accuracy") for event in of_kind(events, RoundDone)]
            if row["name"] != "fedsa":
                assert row["seeds"][str(seed)][1:] == finals[row["name"], seed]
        assert [row["bytes_down"], row["bytes_up"]] == np.mean(travelled, axis=0).tolist()
        assert f"| {row['name']}" in (out / "compare.md").read_text()
    for same in starts.values():  # one partition and one initial model for all variants
        assert all(start == same[0] for start in same)
    fedsa = next(row for row in result["methods"] if row["name"] == "fedsa")
    assert fedsa["measured_on"] == "clients' held-out rows"
    assert fedsa["exactness_error"] is None
    assert fedsa["difference"] is None
    assert result["methods"][1]["exactness_error"] < 1e-6
    files = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    again = compare(config, ["fedit", "fedex", "fedsa"], [0, 1], out, [1e-3, 1e-2])
    assert finite_json(again) == finite_json(result)
    assert files == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    assert not list(out.rglob("rounds"))
    with pytest.raises(UsageError, match="another configuration"):
        compare(configuration(rounds=1), ["fedit"], [0], out)


@pytest.mark.campaign
def test_a_killed_comparison_continues_to_the_same_numbers(tmp_path):
    """SIGKILL in the middle: its workers stop too, finished runs are kept, and the end is that of a comparison left alone."""
    config = configuration(rounds=2)
    (tmp_path / "config.toml").write_text(write_config(config))
    command = [
        sys.executable,
        "-m",
        "fedex_lora.cli",
        "compare",
        "config.toml",
        "--methods",
        "fedit,fedex",
        "--seeds",
        "0,1",
        "--no-controls",
    ]
    command += ["--learning-rates", "5e-3", "--jobs", "2", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "killed"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "killed" / "runs"
    deadline = time.time() + 600  # a wait, however loaded the machine
    while time.time() < deadline and not any("run_done" in path.read_text() for path in runs.rglob("events.jsonl")):
        time.sleep(0.2)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers
    assert not psutil.wait_procs(workers, timeout=120)[1]  # without a parent they end
    finished = {path: path.stat().st_mtime_ns for path in runs.rglob("events.jsonl") if "run_done" in path.read_text()}
    assert 0 < len(finished) < 4
    left, right = (
        compare(config, ["fedit", "fedex"], [0, 1], tmp_path / name, [5e-3], with_controls=False) for name in ("killed", "alone")
    )
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    for one in (left, right):
        for row in one["methods"]:
            row["bytes_up"] = round(row["bytes_up"], -2)  # seconds travel as decimals
    assert finite_json(left) == finite_json(right)


@pytest.mark.campaign
def test_a_comparison_that_is_left_stops_its_workers(tmp_path):
    jobs = [RunJob(configuration(rounds=rounds), tmp_path / f"{rounds}") for rounds in (1, 500)]
    results = outcomes(jobs, 2)
    assert next(results).job == jobs[0]
    results.close()
    assert not multiprocessing.active_children()
    events = jobs[1].folder / "events.jsonl"
    assert not events.exists() or "run_done" not in events.read_text()


def test_a_worker_that_dies_is_one_line_and_the_rest_goes_on(tmp_path):
    jobs = [RunJob(configuration(rounds=1, seed=seed), tmp_path / f"{seed}") for seed in (0, 1, 2)]

    def kill_one():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.05)
        workers[0].kill()

    threading.Thread(target=kill_one).start()
    with pytest.raises(TrainingError, match=r"a worker process died.*the same command goes on") as caught:
        list(outcomes(jobs, 2))
    assert "\n" not in str(caught.value)
    assert all(outcome.curve for outcome in outcomes(jobs, 1))


def test_a_rate_that_diverges_is_left_out(tmp_path):
    """A rate at which training fails is no candidate; a method that fails at every rate is an error that names it."""
    config = configuration(rounds=1)
    result = compare(config, ["fedit"], [0], tmp_path / "a", [5e-3, 1e30], with_controls=False)
    assert result["methods"][0]["settings"] == {RATE: 5e-3}
    assert [point["score"] is None for point in result["methods"][0]["tuning"]] == [False, True]
    assert math.isfinite(result["methods"][0]["mean"])
    with pytest.raises(TrainingError, match="fedit fails at every point of the grid"):
        compare(config, ["fedit"], [0], tmp_path / "b", [1e30], with_controls=False)


@pytest.mark.parametrize("error", [UnwritableError("cannot write a"), UnreadableError("a cannot be read")])
def test_what_the_system_refuses_now_costs_no_round(error, tmp_path, monkeypatch):
    """A full disk stops a comparison; what its runs have is kept, and is what it goes on with."""
    job = RunJob(configuration(rounds=2), tmp_path / "run")
    (want,) = outcomes([job], 1)
    shutil.rmtree(job.folder)
    run(job.config.model_copy(update={"rounds": 1}), job.folder, nobody)
    (job.folder / "config.toml").write_text(write_config(job.config))
    with monkeypatch.context() as here:
        here.setattr("fedex_lora.experiments.compare._runs.run", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            list(outcomes([job], 1))
    assert (job.folder / "rounds" / "0001").is_dir()
    (again,) = outcomes([job], 1)
    assert again.curve.metric == want.curve.metric


def test_a_seed_that_fails_costs_its_tests_and_not_the_comparison(tmp_path, monkeypatch):
    """All other numbers are those of a comparison without it; it is said, and an error is NaN, with which the command fails."""
    failing = {1}

    def some_fail(jobs, at_once):
        for outcome in outcomes(jobs, at_once):
            lost = outcome.job.config.method == "fedex" and outcome.job.config.seed in failing
            yield replace(outcome, curve=None, reason="training diverged") if lost else outcome

    config, tests = configuration(rounds=1), [{"equivalent": ["fedex", "fedit"], "bound": 0.5}]
    options = {"tuning_seeds": [100], "learning_rates": [5e-3], "with_controls": False, "tests": tests}
    whole = compare(config, ["fedit", "fedex"], [0, 1, 2], tmp_path, **options)
    assert not whole["failed"]
    monkeypatch.setattr("fedex_lora.experiments.compare.outcomes", some_fail)
    lost = compare(config, ["fedit", "fedex"], [0, 1, 2], tmp_path, **options)
    assert lost["failed"] == [{"method": "fedex", "seed": 1, "reason": "training diverged"}]
    assert lost["methods"][0] == whole["methods"][0]
    fedex = lost["methods"][1]
    assert all(math.isnan(fedex[name]) for name in ("mean", "difference", "p", "exactness_error"))
    assert [fedex["seeds"][seed] == whole["methods"][1]["seeds"][seed] for seed in "012"] == [True, False, True]
    assert not lost["tests"][0]["computable"]
    assert "fedex failed with seed 1, and has no numbers there: training diverged." in (tmp_path / "compare.md").read_text()
    failing |= {0, 2}
    with pytest.raises(TrainingError, match="fedex fails with every seed at the settings chosen for it: training diverged"):
        compare(config, ["fedit", "fedex"], [0, 1, 2], tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["fedex"], "reference": "fedit"}, "reference 'fedit' is not among the methods compared: fedex, fedit\\+balanced"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "each once"),
        ({"learning_rates": [0.0]}, "learning rates"),
        ({"config": configuration(clients={"holdout": 0})}, "clients.holdout is 0"),
        ({"seeds": [-1]}, "seed = -1"),
        ({"seeds": [2**40]}, "seed = 1099511627776"),
        ({"target": math.nan}, "target nan"),
        ({"methods": ["fedit", "fedsa"], "reference": "fedsa"}, "fedsa has no global model, so it cannot be the reference"),
        ({"methods": ["fedsa"], "with_controls": False}, "fedsa has no global model"),
        ({"methods": ["fedit", "fedex@50r"]}, "rank 100 is above the size of module"),
        ({"methods": ["fedit", "fedx"]}, "did you mean 'fedex'"),
        (
            {"grid": {"training.weight_decay": [0.0, "a"]}},
            r"fedit, training\.weight_decay=a: training\.weight_decay = 'a': give a finite number",
        ),
        ({"config": configuration(base={"model": "nowhere"})}, "'nowhere' is neither a local folder"),
        ({"config": configuration(training={"learning_rate": "abc"})}, "learning_rate = 'abc' is no number"),
        ({"methods": ["fedex"], "reference": "fedex", "config": configuration(clients={"ranks": [1, 2, 2]})}, "needs one rank"),
    ],
)
def test_comparisons_that_cannot_be(options, message, tmp_path):
    """One line, before anything is written, also for what only the model or the data can tell."""
    given = {"config": configuration(), "methods": ["fedit"], "seeds": [0], "out": tmp_path / "out", **options}
    with pytest.raises(FedexLoraError, match=message) as caught:
        compare(**given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "methods", "dropped"),
    [
        (configuration(clients={"ranks": [1, 2, 2]}, rounds=1), ["fedex-best", "flexlora"], ["fedit+balanced"]),
        (configuration(local={"optimizer_state": "keep"}, rounds=1), ["fedex"], ["fedit+balanced"]),
        (configuration(lora={"r": 40}, rounds=1), ["ffa"], ["ffa@2r"]),
    ],
)
def test_a_control_that_cannot_be_is_left_out_and_said(config, methods, dropped, tmp_path):
    told = []
    result = compare(config, methods, [0], tmp_path / "out", [1e-3], reference=methods[0], tell=lambda line, done, total: told.append(line))
    names = [row["name"] for row in result["methods"]]
    assert names[: len(methods)] == methods
    assert not set(dropped) & set(names)
    assert [name for name in dropped if any(line.startswith(f"without the control {name}: ") for line in told)] == dropped


def test_a_truncation_is_for_those_that_truncate(tmp_path):
    config = configuration(rounds=1, truncation={"rank": 1}, training={"num_train_epochs": 2})
    result = compare(config, ["fedex", "fedex-svd"], [0], tmp_path / "out", [5e-3], with_controls=False)
    assert result["reference"] == "fedex"
    exact, cut = (row["exactness_error"] for row in result["methods"])
    assert exact < 1e-6 < 1e-3 < cut


def test_more_jobs_continue_the_same_comparison(tmp_path):
    """The number of threads is that of the first call, so the bits are too."""
    config = configuration(rounds=1).model_copy(update={"torch_threads": None})
    before = compare(config, ["fedit"], [0], tmp_path / "out", [1e-3], with_controls=False, jobs=2)
    shutil.rmtree(tmp_path / "out" / "runs")
    after = compare(config, ["fedit"], [0], tmp_path / "out", [1e-3], with_controls=False, jobs=1)
    assert before["methods"][0]["seeds"]["0"] == after["methods"][0]["seeds"]["0"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is no comparison"):
        compare(configuration(), ["fedit"], [0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_configuration_of_one_s_own_is_not_written_over(tmp_path):
    """It means the same as the comparison's, so a killed comparison could have left it; but its comments are somebody's."""
    mine = "# mine\n" + write_config(configuration())
    (tmp_path / "config.toml").write_text(mine)
    with pytest.raises(UsageError, match="is no comparison"):
        compare(configuration(), ["fedit"], [0], tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"config.toml": mine}


def test_where_no_held_out_score_is_finite_no_rate_is_the_best(tmp_path):
    plan = SimpleNamespace(points=lambda _: [{"rate": 1}, {"rate": 2}], tuned=lambda _: True, tuning_seeds=[7], grid={"rate": [1, 2]})
    curve = Curve(
        metric=[0.5, math.nan],
        held_out={0: 0.5, 1: math.nan},
        held_out_loss={},
        bytes_down=0,
        bytes_up=0,
        exactness=0,
        seconds=0,
        trainable=0,
    )
    ran = {("fedex", label(point), 7): SimpleNamespace(curve=curve, reason="") for point in plan.points(None)}
    with pytest.raises(TrainingError, match="fails at every point of the grid: rate=1: what the clients measured"):
        best_point(plan, SimpleNamespace(name="fedex"), ran, 1)
