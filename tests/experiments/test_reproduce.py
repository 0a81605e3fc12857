"""Recipes, records, tables: every recipe says what can be run; numbers come from records; the paper's settings build the right model."""

import json
import shutil
import sys

import numpy as np
import pytest
from scipy import stats
from scripts.untrained_models import write
from typer.testing import CliRunner

from fedex_lora.aggregation import METHODS
from fedex_lora.cli import app
from fedex_lora.errors import FedexLoraError
from fedex_lora.experiments.reproduce import Only, cells, find_record, read_recipe, reproduce, targets, write_tiny_data
from fedex_lora.experiments.reproduce._recipe import merged
from fedex_lora.experiments.reproduce._records import Paths, make_record
from fedex_lora.runs.run import run
from fedex_lora.storage.events import RoundDone, of_kind, read_events

RECIPE = """
title = "Two methods"
source = "a test"
layout = "scores"
average = "All"
contrasts = [["FedEx", "FedIT"]]
rows = [
  { label = "FedIT", method = "fedit" },
  { label = "FedEx", method = "fedex" },
  { label = "FFA, 2 r", method = "ffa@2r", added = true },
]
columns = [
  { label = "MRPC", metric = "f1", folder = "glue", set.task.name = "glue/mrpc" },
  { label = "STS-B", metric = "spearman", folder = "glue", set.task.name = "glue/stsb" },
]
panels = [
  { label = "few", paper.FedIT = [60.0, 70.0, 65.0], source = "made up" },
  { label = "many", set.training.num_train_epochs = 5 },
]
[config]
torch_threads = 1
base.model = "demo"
lora = { r = 2, target_modules = ["q_proj", "v_proj"] }
task.train_rows = 36
training = { learning_rate = 1e-2, per_device_train_batch_size = 4, num_train_epochs = 1 }
[scale.smoke]
note = "tiny"
tiny = true
seeds = [0, 1]
config = { rounds = 1, task.eval_rows = 12 }
panels.few = {}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "two.toml"
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture(scope="module")
def ran(recipe, tmp_path_factory):
    """Two rows, two columns, two seeds, really run; the third row is left out."""
    out = tmp_path_factory.mktemp("out")
    result, grids = reproduce(recipe, "smoke", out, only=Only(rows=["FedIT", "FedEx"]))
    return out, result, grids


def test_every_recipe_says_what_can_be_run():
    """Every cell of every target at every scale has a valid configuration, its metric's task, and its own run."""
    names = targets()
    assert {*(f"table{n}" for n in (1, 2, 3, 4, 5, 6, 9, 10, 11)), *(f"figure{n}" for n in range(2, 10))} <= set(names)
    for name in names:
        recipe = read_recipe(name)
        assert {"smoke", "small", "full"} == set(recipe.scale) - {"smollm2"}
        for scale in recipe.scale:
            found = list(cells(recipe, scale))
            assert found, (name, scale)
            assert len({cell.place for cell in found}) == len(found)
            assert {cell.config.method.partition("+")[0] for cell in found} <= set(METHODS)
            assert (scale == "smoke") == all(cell.config.base.model == "demo" for cell in found)


def test_full_is_the_paper_s_setting():
    full = {cell.place: cell.config for cell in cells(read_recipe("table3"), "full")}
    config = full["RoBERTa-base", "FedEx-LoRA", "CoLA", 0]
    assert (config.base.model, config.lora.r, config.lora.alpha, config.lora.target_modules) == (
        "FacebookAI/roberta-base",
        4,
        8,
        ["query", "value"],
    )
    assert (config.clients.count, config.training["num_train_epochs"], config.training["per_device_train_batch_size"]) == (3, 3, 128)
    assert full["RoBERTa-large", "FedIT", "CoLA", 2].base.model == "FacebookAI/roberta-large"
    panels = {panel.label: panel for panel in read_recipe("table3").panels}
    assert panels["RoBERTa-large"].metrics == {"MRPC": "f1"}
    for numbers in panels["RoBERTa-base"].paper.values():  # the paper's averages are those of its rows
        assert np.mean(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.0051)


def test_targets_share_runs():
    """Figure 2 at `small` reads the runs of table 3; new settings at their defaults change no identity."""
    table = {cell.key for cell in cells(read_recipe("table3"), "small")}
    figure = [cell for cell in cells(read_recipe("figure2"), "small") if cell.panel == "few local epochs"]
    assert {cell.key for cell in figure} <= table
    assert len({cell.name for cell in cells(read_recipe("table3"), "small")}) == 75


def test_a_rate_that_is_given_holds_for_every_method():
    """Also where the scale has rates of its own."""
    recipe = read_recipe("table3")
    assert {cell.config.training["learning_rate"] for cell in cells(recipe, "small")} == {0.003, 0.01}
    given = cells(recipe, "small", ["training.learning_rate=1e-4"])
    assert {cell.config.training["learning_rate"] for cell in given} == {1e-4}


def test_a_method_without_a_global_model_has_a_record(recipe, tmp_path):
    """It has no metrics of the evaluation set, and is read again all the same."""
    path = tmp_path / "personal.toml"
    path.write_text(RECIPE.replace('method = "ffa@2r"', 'method = "fedsa"'))
    only = Only(rows=["FFA, 2 r"], columns=["MRPC"], seeds=[0])
    (cell,) = (cell for cell in cells(read_recipe(str(path)), "smoke") if only.holds(cell))
    result, _ = reproduce(str(path), "smoke", tmp_path, only=only)
    assert result["runs_done"] == 1
    assert find_record(tmp_path, cell).rounds[0].metrics == {}
    assert reproduce(str(path), "smoke", tmp_path, only=only)[0] == result


def test_scores_are_those_of_the_runs(ran):
    """Means, deviations and paired intervals from the records, by numpy and scipy."""
    out, result, grids = ran
    few = result["numbers"][0]
    records = [json.loads(path.read_text()) for path in (out / "runs").iterdir()]
    assert len(records) == 8
    ends = {
        (r["config"].get("method", "fedex"), r["facts"]["task"], r["config"].get("seed", 0)): r["rounds"][-1]["metrics"] for r in records
    }
    ours = [100 * ends["fedit", "glue/mrpc", seed]["f1"] for seed in (0, 1)]
    other = [100 * ends["fedit", "glue/stsb", seed]["spearman"] for seed in (0, 1)]
    assert few["cells"]["FedIT"]["MRPC"] == pytest.approx({"0": ours[0], "1": ours[1]})
    average = np.mean([ours, other], axis=0)
    assert list(few["cells"]["FedIT"]["All"].values()) == pytest.approx(average)
    line = next(row for row in grids[0].rows if row[0] == "FedIT")
    assert line[2] == f"{np.mean(ours):.2f} ± {np.std(ours, ddof=1):.2f}"
    apart = [100 * ends["fedex", "glue/stsb", seed]["spearman"] - other[seed] for seed in (0, 1)]
    found = few["differences"]["FedEx minus FedIT"]["STS-B"]
    assert found["mean"] == pytest.approx(np.mean(apart))
    assert found["half_width"] == pytest.approx(stats.sem(apart) * stats.t.ppf(0.975, 1))
    assert few["runs"]["FedEx"]["exactness_error"] < 1e-6 < 1e-3 < few["runs"]["FedIT"]["exactness_error"]


def test_what_is_not_run_or_not_known_is_said(ran):
    out, result, grids = ran
    assert (result["runs"], result["runs_done"]) == (12, 8)
    by_row = {(row[0], row[1]): row[2:] for row in grids[0].rows}
    assert by_row["FFA, 2 r", "here"] == ["not run"] * 3
    assert [row[2:] for row in grids[0].rows if row[1] == "paper"] == [["60", "70", "65"], ["not published here"] * 3]
    assert result["not_at_this_scale"] == ["many"]
    text = (out / "smoke" / "two.md").read_text()
    assert "Not at this scale: many." in text
    assert "8 of 12 runs" in text
    assert "Not in the paper: FFA, 2 r." in text
    tex = (out / "smoke" / "two.tex").read_text()
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == len(grids)
    assert r"$\pm$" in tex
    assert json.loads((out / "smoke" / "two.json").read_text())["runs_done"] == 8


def test_tables_are_made_again_without_running(ran, recipe):
    out, result, _ = ran
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert reproduce(recipe, "smoke", out, run=False)[0] == result
    assert reproduce(recipe, "smoke", out, only=Only(rows=["FedIT"]))[0] == result  # all there: nothing runs
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert not list((out / "work").glob("*"))


def test_an_interrupted_run_goes_on(recipe, tmp_path, monkeypatch):
    """Stopped after round 1 of 2: what is left is one more round, and the record is that of a run that was left alone; on other rows it
    begins anew."""
    only, longer = Only(rows=["FedEx"], columns=["STS-B"], seeds=[0]), ["rounds=2"]
    cell = next(cell for cell in cells(read_recipe(recipe), "smoke", longer) if only.holds(cell))
    write_tiny_data(tmp_path / "tiny")
    place = Paths(tmp_path / "stopped", tmp_path / "tiny")

    def stop(event):
        if event.name == "round_done":
            raise KeyboardInterrupt

    records = sys.modules[make_record.__module__]
    with monkeypatch.context() as patched:
        patched.setattr(records, "run", lambda config, folder, tell, resume: run(config, folder, stop))
        with pytest.raises(KeyboardInterrupt):
            make_record(place, cell)
    assert not find_record(place.out, cell)
    events = read_events(place.out / "work" / cell.name / "events.jsonl")
    (begun,) = [event.seconds for event in of_kind(events, RoundDone)]
    alone = make_record(Paths(tmp_path / "alone", tmp_path / "tiny"), cell)
    (tmp_path / "tiny").rename(tmp_path / "moved")  # as the rows of the scale smoke are, at every command
    shutil.copytree(place.out, tmp_path / "others")
    went_on = make_record(Paths(place.out, tmp_path / "moved"), cell)
    assert went_on.rounds[0].seconds == float(f"{begun:.6g}")
    assert [one.metrics for one in went_on.rounds] == [one.metrics for one in alone.rounds]
    assert [one.modules for one in went_on.rounds] == [one.modules for one in alone.rounds]
    assert find_record(place.out, cell) == went_on
    assert not list((place.out / "work").iterdir())
    dev = tmp_path / "moved" / "glue" / "STS-B" / "dev.tsv"
    dev.write_text("".join(dev.read_text().splitlines(keepends=True)[:6]))
    anew = make_record(Paths(tmp_path / "others", tmp_path / "moved"), cell)
    assert [one.metrics["rows"] for one in anew.rounds] == [5, 5]


def test_records_hold_the_deviation_of_every_module(ran):
    """|s Bbar Abar - M| of modules adds up to the round's own number, and is divided by sqrt(out in)."""
    out, *_ = ran
    for path in (out / "runs").glob("*_fedex_*.json"):
        record = json.loads(path.read_text())
        modules = record["rounds"][0]["modules"]
        assert len(modules["module"]) == 4
        assert record["rounds"][0]["deviation"] == pytest.approx(
            np.linalg.norm(modules["deviation"]) / np.linalg.norm(modules["ideal"]), rel=1e-4
        )
        for name, apart, scaled in zip(modules["module"], modules["deviation"], modules["scaled"], strict=True):
            out_features = 128 if name.endswith("q_proj") else 64  # two key-value heads of 32
            assert scaled == pytest.approx(apart / np.sqrt(out_features * 128), rel=1e-4)


@pytest.mark.parametrize(("target", "rounds"), [("figure2", 2), ("figure3", 3), ("table6", 2)])
def test_other_layouts(target, rounds, tmp_path):
    command = ["reproduce", target, "--scale", "smoke", "--seed", "0", "--set", f"rounds={rounds}", "--out", str(tmp_path)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "smoke" / f"{target}.json").read_text())
    if target == "table6":
        sizes = found["numbers"][0]["bytes"]
        records = {r["config"].get("method", "fedex"): r for r in (json.loads(p.read_text()) for p in (tmp_path / "runs").iterdir())}
        fedex = [*records["fedex"]["rounds"], records["fedex"]["final"]]  # its last message brings what every other round's does
        assert fedex[-1]["bytes_down"] == pytest.approx(fedex[-2]["bytes_down"], rel=1e-2)
        assert sizes["FedEx-LoRA"]["down"] == sum(one["bytes_down"] for one in fedex)
        assert sizes["FedEx-LoRA"]["up"] == sum(one["bytes_up"] for one in fedex)
        assert sizes["FedEx-LoRA"]["down"] > sizes["FedIT"]["down"] > sizes["FFA-LoRA"]["down"]
        assert sizes["FedEx-LoRA"]["up"] == pytest.approx(sizes["FedIT"]["up"], rel=0.01)
        assert sizes["FedIT"]["up"] > sizes["FFA-LoRA"]["up"]
        assert sizes["FedIT"]["base"] == 3 * records["fedit"]["facts"]["base_bytes"]
        assert "7.03" in result.stdout
        return
    shown = " ".join(result.stdout.split())
    assert found["pictures"] == [f"{target}-MRPC-relative.png", f"{target}-MRPC-scaled.png"]
    for name in found["pictures"]:
        assert (tmp_path / "smoke" / name).read_bytes().startswith(b"\x89PNG")
        assert name in result.stdout
    series = {(one["panel"], one["series"], one["measure"]): one for one in found["numbers"]}
    if target == "figure2":
        assert set(series["few local epochs", "q_proj", "scaled"]["layer"]) == {"0", "1"}
        few, many = (
            np.mean(
                [value for name in ("q_proj", "v_proj") for (value,) in series[f"{how} local epochs", name, "relative"]["layer"].values()]
            )
            for how in ("few", "many")
        )
        assert f"| grows with local epochs | {'yes' if many > few else 'no'}, {many / few:.2f}" in shown
    else:
        assert set(series["few local epochs", "q_proj of the first layer", "relative"]["round"]) == {"1", "2", "3"}
        means = [value for (value,) in series["few local epochs", "mean over all modules", "relative"]["round"].values()]
        rho = np.corrcoef(np.argsort(np.argsort(means)), [0, 1, 2])[0, 1]
        held = "yes" if rho < 0 and means[2] < means[0] else "no"
        assert f"| falls with the rounds | {held}, {means[2] / means[0]:.2f}" in shown
    assert all(
        np.isfinite(value) and value > 0
        for one in series.values()
        for line in (one.get("layer") or one["round"]).values()
        for value in line
    )


def test_layouts_of_runs_that_average_no_adapters(tmp_path):
    """Full fine-tuning has no deviation to draw; without contrasts, bytes are relative to the first row."""
    base, rows = RECIPE.partition("contrasts = ")[0], 'rows = [{ label = "Full", method = "full-ft" }]\n'
    rest = "columns = " + RECIPE.partition("columns = ")[2].replace("paper.FedIT = [60.0, 70.0, 65.0], ", "")
    only = Only(columns=["MRPC"], seeds=[0])
    for layout in ("layers", "rounds", "bytes"):
        (tmp_path / f"{layout}.toml").write_text(base.replace('layout = "scores"', f'layout = "{layout}"') + rows + rest)
        result, grids = reproduce(str(tmp_path / f"{layout}.toml"), "smoke", tmp_path, only=only)
        assert result["pictures"] == []
        assert grids[0].rows[0][-1].startswith("1.000 (") if layout == "bytes" else grids[0].rows == [["not run"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tabel3"], "unknown target 'tabel3': did you mean table3?"),
        (["table3", "--scale", "huge"], "table3 has no scale 'huge': it has smoke, small, full"),
        (["table3", "--row", "FedEx"], "table3 at scale smoke has no row 'FedEx': did you mean 'FedEx-LoRA'?"),
        (["table3", "--scale", "small", "--column", "QNLI"], "has no column 'QNLI'"),
        (["table3", "--seed", "7"], "has no seed '7': it has 0, 1"),
        (["table3", "--scale", "small", "--data", "nowhere", "--set", "base.model=demo"], "train.tsv does not exist"),
        (["table3", "--set", "rounds=0"], "rounds"),
        (["table3", "--set", "seed=7"], "--set seed: every run of a table has its own"),
        (["table3", "--set", "method=ffa"], "--set method: every run of a table has its own"),
        (["table3", "--no-run", "--seed", "7"], "has no seed '7': it has 0, 1"),
        (["broken.toml"], "title"),
        (["itself.toml"], "itself.toml extends itself"),
        (["orphan.toml"], "nobody.toml, which does not exist"),
        (["latin.toml"], "latin.toml is not TOML"),
        (["../recipes/table3"], "unknown target '../recipes/table3'"),
        (["./_glue"], "unknown target './_glue'"),
    ],
)
def test_bad_requests_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("broken", 'layout = "scores"'), ("itself", 'extends = "itself"'), ("orphan", 'extends = "nobody"')):
        (tmp_path / f"{name}.toml").write_text(f"{text}\n")
    (tmp_path / "latin.toml").write_bytes('title = "Präzision"\n'.encode("latin-1"))
    result = CliRunner().invoke(app, ["reproduce", *arguments, "--out", "out"])
    assert result.exit_code != 0
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))


def test_recipes_extend_each_other():
    assert merged({"a": {"b": 1, "c": [1]}}, {"a": {"c": [2], "d": 3}}) == {"a": {"b": 1, "c": [2], "d": 3}}


def _without(*path):
    """A change of a record: what is at a path is gone."""

    def change(record):
        for name in path[:-1]:
            record = record[name]
        record.pop(path[-1])

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("facts"),
        _without("facts", "headline"),
        _without("held_out"),
        _without("rounds", 0),
        _without("rounds", 0, "metrics"),
        _without("rounds", 0, "modules"),
        _without("rounds", 0, "modules", "ideal"),
        _without("rounds", 0, "modules", "ideal", 0),
        _without("rounds", 0, "bytes_down"),
        lambda record: record["rounds"][0].update(metrics=[]),
        lambda record: record["rounds"][0].update(metrics={"other": 1.0}),
        lambda record: record["rounds"][0].update(round=7),
        lambda record: record.update(tests=None),
        lambda record: record.update(failed=None),
        lambda record: record["config"]["training"].update(learning_rate=0.9),
    ],
)
def test_a_record_of_something_else_is_named(change, ran, recipe, tmp_path):
    shutil.copytree(ran[0] / "runs", tmp_path / "runs")
    path = next((tmp_path / "runs").glob("*_fedex_*"))
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(FedexLoraError, match=f"{path.name} is no record of the run .*: remove it"):
        reproduce(recipe, "smoke", tmp_path, run=False)


@pytest.mark.parametrize("text", ["{", "null", "[]", "{}", "[" * 200_000])
def test_a_record_that_is_broken_is_named(text, recipe, tmp_path):
    name = next(cells(read_recipe(recipe), "smoke")).name
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{name}.json").write_text(text)
    with pytest.raises(FedexLoraError, match=f"{name}.json is .*: remove it"):
        reproduce(recipe, "smoke", tmp_path)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """RoBERTa-base's configuration without weights."""
    folder = tmp_path_factory.mktemp("models")
    write(folder, ("roberta-base",))
    return folder


def test_the_full_scale_builds_the_paper_s_roberta(roberta, data_folder, tmp_path):
    """A user's command, with random weights in place of the download: one round on CoLA, with q and v at r = 4 and the head trained."""
    command = (
        f"reproduce table3 --scale full --panel RoBERTa-base --row FedEx-LoRA --column CoLA --seed 0 --model {roberta} --data {data_folder}"
    )
    short = "base.random_weights=true rounds=1 torch_threads=1 task.train_rows=9 task.eval_rows=4 task.max_length=16"
    sets = [
        word
        for one in (*short.split(), "training.num_train_epochs=1", "training.per_device_train_batch_size=1", "training.warmup_steps=0")
        for word in ("--set", one)
    ]
    result = CliRunner().invoke(app, [*command.split(), *sets, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    record = json.loads(next((tmp_path / "runs").iterdir()).read_text())
    adapters = 12 * 2 * (4 * 768 + 768 * 4)
    head = 768 * 768 + 768 + 2 * 768 + 2
    assert record["facts"]["trainable_parameters"] == adapters + head == 739_586
    assert f"{adapters + head:,}" in result.stdout
    assert record["rounds"][0]["exactness_error"] < 1e-6
    assert len(record["rounds"][0]["modules"]["module"]) == 24
    assert record["rounds"][0]["deviation"] > 0
