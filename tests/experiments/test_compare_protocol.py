"""What a comparison is asked: by options or a file, the same; and what cannot be asked."""

import hashlib
import json
import re
import shutil
import tomllib
from dataclasses import replace

import pytest
import tomli_w
from tests.experiments.test_compare import CURVE
from tests.runs.test_run import configuration
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.cli._federation import OPTIONS, _protocol
from fedex_lora.config import write_config
from fedex_lora.errors import FedexLoraError, StorageError, UsageError
from fedex_lora.experiments.compare import compare, grid_option, parse_protocol, primary_option, variant_option
from fedex_lora.experiments.compare._plan import RATE, canonical, label, planned, settled_plan
from fedex_lora.experiments.compare._runs import RunJob, RunOutcome, outcomes
from fedex_lora.experiments.compare._tuning import best_point
from fedex_lora.runs.run import run
from fedex_lora.storage.events import read_events
from fedex_lora.storage.run_folder import locked

CONFIG = configuration(rounds=2)
TREE = {
    "methods": ["fedit"],
    "variants": {"kept": {"method": "fedex+balanced@2r", "local": {"schedule": "run"}, "training.weight_decay": 0.1}},
    "seeds": [0, 1],
    "tuning_seeds": [100, 101],
    "grid": {"training": {"learning_rate": [1e-2, 5e-3]}, "training.weight_decay": [0, 0.5]},
    "controls": False,
    "at": [1],
    "tests": [{"better": "kept", "than": "fedit", "primary": True}],
}


def plan(config=CONFIG, out=None, **changes):
    protocol = parse_protocol({**TREE, **changes})
    return settled_plan(planned(config, protocol, out), protocol)


def test_options_and_files_say_the_same():
    assert grid_option(["a.b=1e-3,3e-3 a.c=x,y", "d=[[1, 2], [3]]".replace(" ", "")]) == {
        "a.b": [1e-3, 3e-3],
        "a.c": ["x", "y"],
        "d": [[[1, 2], [3]]],
    }
    assert variant_option('kept: method=fedex@2r local.schedule=run x="a"') == (
        "kept",
        {"method": "fedex@2r", "local.schedule": "run", "x": "a"},
    )
    assert primary_option("fedex+balanced@4 > ffa@2r@8")["round_than"] == 8
    assert primary_option("a>ffa@2r") == {"better": "a", "than": "ffa@2r", "primary": True}


def test_a_variant_s_own_keys_are_not_varied(tmp_path):
    made = plan(out=tmp_path)
    fedit, kept = made.variants
    assert made.grid == {RATE: [5e-3, 1e-2], "training.weight_decay": [0.0, 0.5]}
    assert len(made.points(fedit)) == 4
    assert made.points(kept) == [{RATE: 5e-3}, {RATE: 1e-2}]
    job = made.job(kept, {RATE: 1e-2}, 101)
    assert (job.config.seed, job.config.training[RATE.split(".")[1]], job.config.training["weight_decay"]) == (101, 1e-2, 0.1)
    assert (job.config.local.schedule, job.config.lora.r, job.config.method) == ("run", 2 * CONFIG.lora.r, "fedex+balanced")
    assert job.folder == tmp_path / "runs/kept" / "training.learning_rate=0.01" / "seed-101"
    assert made.runs == (4 + 2) * 2 + 2 * 2


def test_the_canonical_protocol_is_a_fixed_point(tmp_path):
    """Options and files that ask the same have one text; it reads as itself, and names the configuration."""
    text = canonical(plan(out=tmp_path))
    again = parse_protocol(tomllib.loads(text))
    assert canonical(settled_plan(planned(CONFIG, again, tmp_path), again)) == text
    for other in ({"seeds": [0, 2]}, {"at": []}, {"tests": []}, {"reference": "kept"}, {"config": configuration(rounds=3)}):
        assert canonical(plan(out=tmp_path, **other)) != text
    assert canonical(plan(configuration(rounds=2, torch_threads=3), tmp_path)) == text  # threads are no part of the question
    with pytest.raises(UsageError, match="the protocol is for another configuration"):
        compare(configuration(rounds=3), again, tmp_path / "out")


def test_settings_are_chosen_by_the_mean_over_the_tuning_seeds(tmp_path):
    """Better with one seed and worse with the other; a point where one seed fails is none; edges are told key by key."""
    made = plan(out=tmp_path, grid={RATE: [1e-3, 2e-3, 4e-3], "training.weight_decay": [0.1]}, methods=["fedit"], variants={}, tests=[])
    held = {1e-3: (0.5, 0.5), 2e-3: (0.9, 0.3), 4e-3: (1.0, None)}
    ran = {
        ("fedit", label({RATE: rate, "training.weight_decay": 0.1}), seed): RunOutcome(
            None, None if value is None else replace(CURVE, held_out=dict.fromkeys((2, 3), value)), "diverged"
        )
        for rate, values in held.items()
        for seed, value in zip((100, 101), values, strict=True)
    }
    choice = best_point(made, made.variants[0], ran, 1)
    assert choice.settings == {RATE: 2e-3, "training.weight_decay": 0.1}
    assert choice.at_edge == []
    assert [point["score"] for point in choice.tried] == [pytest.approx(0.5), pytest.approx(0.6), None]
    assert choice.tried[2]["seeds"] == {"100": 1.0, "101": None}
    assert best_point(made, made.variants[0], ran, -1).at_edge == [RATE]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning_seeds": [100, 1]}, "seed 1 is among the seeds and the tuning seeds"),
        ({"tuning_seeds": [5, 5]}, "tuning seeds .*each once"),
        ({"tuning_seeds": []}, "tuning_seeds"),
        ({"grid": {"training.lerning_rate": [1e-3]}}, "unknown key training.lerning_rate: did you mean training.learning_rate"),
        ({"grid": {"lora.q": [1]}}, "unknown key lora.q"),
        ({"grid": {"lora.r": [2, 500]}}, "rank 500 is above the size of module"),
        ({"grid": {RATE: 1e-3}}, "give a list of values"),
        ({"grid": {"seed": [1, 2]}}, "seed cannot be varied by a grid"),
        ({"grid": {"lora.dropout": [0.0, float("nan")]}}, "give finite numbers"),
        ({"methods": ["kept"]}, "unknown method"),
        ({"methods": ["fedit"], "variants": {"fedit": {"method": "fedex"}}}, "two variants are named 'fedit'"),
        ({"variants": {"x": {"local.schedule": "run"}}}, "variant 'x' has no method"),
        ({"variants": {"../x": {"method": "fedit"}}}, "its runs get a folder"),
        ({"variants": {"kept": {"method": "fedex", "seed": 3}}}, "variant 'kept' sets seed"),
        ({"variants": {"kept": {"method": "fedex", "rounds": 3}}}, "variant 'kept' sets rounds"),
        ({"variants": {"kept": {"method": "fedex", "local.shedule": "run"}}}, "did you mean local.schedule"),
        ({"methods": [], "variants": {}}, "nothing to compare"),
        ({"tests": [{"better": "kept", "than": "fedex"}]}, "'fedex' is not among the variants compared: fedit, kept"),
        ({"tests": [{"better": "kept", "than": "kept"}]}, "on both sides"),
        ({"tests": [{"better": "kept", "than": "fedit", "round": 3}]}, "round 3 .* out of range"),
        ({"tests": [{"better": "kept", "than": "fedit", "mean_of": 3}]}, "mean of 3.* out of range"),
        ({"tests": [{"better": "kept", "than": "fedit"}] * 2}, "two tests are named"),
        ({"methods": ["fedit", "fedsa"], "tests": [{"better": "fedsa", "than": "fedit"}]}, "no global model"),
        ({"seeds": [0]}, "a test needs two seeds"),
        ({"at": [3]}, "round 3 is out of range"),
        ({"sedes": [0]}, "unknown key sedes: did you mean seeds"),
        ({"set": {"lora.rr": 1}}, "unknown key lora.rr"),
    ],
)
def test_protocols_that_cannot_be(changes, message, tmp_path):
    with pytest.raises(FedexLoraError, match=message) as caught:
        compare(CONFIG, parse_protocol({**TREE, **changes}), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=1", "--set rounds would change nothing, for [set] has it: change it there"),
        ("task.eval_rows=30", ""),
        ("training.learning_rate=1e-4", "--set training.learning_rate would change nothing, for the grid has it: change it there"),
        ("seed=7", "--set seed: every run sets it by itself"),
        ("method=ffa", "--set method: every run sets it by itself"),
    ],
)
def test_what_the_command_line_sets_is_not_lost(override, message, tmp_path):
    """Refused where the comparison sets it otherwise; what is the same, or only the file's, goes on: here to a seed that cannot be."""
    (tmp_path / "config.toml").write_text(write_config(CONFIG))
    protocol = {"methods": ["fedit"], "seeds": [-1], "grid": {"training": {"learning_rate": [1e-2]}}}
    (tmp_path / "protocol.toml").write_text(tomli_w.dumps({**protocol, "set": {"rounds": 2, "task": {"eval_rows": 30}}}))
    words = ["compare", "config.toml", "--protocol", "protocol.toml", "--out", "out"]
    words = [str(tmp_path / word) if "." in word or word == "out" else word for word in words]
    said = CliRunner().invoke(app, [*words, "--set", override]).stderr
    assert (message or "seed = -1") in said
    assert said.count("\n") == 1


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison by a file, from the command line."""
    folder = tmp_path_factory.mktemp("protocol")
    (folder / "run.toml").write_text(write_config(configuration(rounds=3)))
    tree = {**TREE, "set": {"rounds": 2}, "grid": {RATE: [5e-3, 1e-2]}, "variants": {"kept": {"method": "fedex", "local.schedule": "run"}}}
    tree["tests"] = [{"better": "kept", "than": "fedit", "primary": True, "mean_of": 2}, {"equivalent": ["kept", "fedit"], "bound": 0.5}]
    (folder / "ask.toml").write_text(tomli_w.dumps(tree))
    done = CliRunner().invoke(
        app, ["compare", f"{folder}/run.toml", "--protocol", f"{folder}/ask.toml", "--out", f"{folder}/out", "--json"]
    )
    assert done.exit_code == 0, done.stderr
    return folder


def test_a_result_names_its_protocol(compared):
    out = compared / "out"
    result, table = json.loads((out / "compare.json").read_text()), (out / "compare.md").read_text()
    assert result["protocol_sha256"] == hashlib.sha256((out / "protocol.toml").read_bytes()).hexdigest()
    assert f"protocol sha256 {result['protocol_sha256']}" in table
    assert (result["rounds"], result["tuning_seeds"], result["tuning_apart"]) == (2, [100, 101], True)
    assert "Settings were chosen on seeds 100, 101." in table
    fedit, kept = result["methods"]
    assert kept["overrides"] == {"local.schedule": "run"}
    assert [list(point["seeds"]) for point in fedit["tuning"]] == [["100", "101"]] * 2
    ends = {row["name"]: [sum(metric[-2:]) / 2 for metric in row["seeds"].values()] for row in (fedit, kept)}
    primary, equal = result["tests"]
    assert primary["differences"] == pytest.approx([a - b for a, b in zip(ends["kept"], ends["fedit"], strict=True)])
    assert primary["p_holm"] == primary["p"]
    assert equal["bound"] == 0.5
    assert [record["round"] for record in result["at"]] == [1]
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    seeds = {path.name for path in (out / "runs").glob("*/*/*")}
    assert seeds == {"seed-0", "seed-1", "seed-100", "seed-101"}


def test_its_own_protocol_asks_the_same_again(compared):
    """Nothing is run: the written protocol and configuration are this comparison, also those of an earlier version, with fewer keys.

    Another protocol is refused; so is a second process.
    """
    out = compared / "out"
    for path in (out / "config.toml", *(out / "runs").rglob("config.toml")):  # of a version that had not that key
        text = path.read_text()
        assert text.count("\nhead_rounds = 0\n") == 1
        path.write_text(text.replace("\nhead_rounds = 0\n", "\n"))
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    command = ["compare", str(out / "config.toml"), "--out", str(out)]
    again = CliRunner().invoke(app, [*command, "--protocol", str(out / "protocol.toml")])
    assert again.exit_code == 0, again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    other = CliRunner().invoke(app, [*command, "--methods", "fedit,fedex", "--seeds", "0,1"])
    assert "with another protocol" in other.stderr
    both = CliRunner().invoke(app, [*command, "--protocol", str(out / "protocol.toml"), "--seeds", "0,1"])
    assert "--seeds beside --protocol" in both.stderr
    with locked(out):
        busy = CliRunner().invoke(app, [*command, "--protocol", str(out / "protocol.toml")])
    assert "another process is at work" in busy.stderr


def _again(out):
    return CliRunner().invoke(app, ["compare", f"{out}/config.toml", "--protocol", f"{out}/protocol.toml", "--out", str(out)])


def test_a_configuration_that_was_edited_is_refused_and_no_run_is_lost(compared, tmp_path):
    """Also with a protocol that has no hash, and where the runs' configurations were edited alike."""
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    for path in out.rglob("config.toml"):
        text = path.read_text()
        assert text.count("\nalpha = ") == 1
        path.write_text(re.sub("\nalpha = .*", "\nalpha = 80.0", text))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    edited = _again(out)
    assert edited.exit_code == 2
    assert "for another configuration" in edited.stderr
    asked = ["compare", f"{out}/config.toml", "--protocol", f"{compared}/ask.toml", "--out", str(out)]
    assert "with another protocol" in CliRunner().invoke(app, asked).stderr
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text, other: other, "is of another run"),
        (lambda text, other: text.replace('"seed": 0', '"seed": 1', 1), "is of another run"),
        (lambda text, other: re.sub('"base_fingerprint": "[0-9a-f]*"', '"base_fingerprint": "00"', text), "are of two bases"),
    ],
    ids=["method", "seed", "base"],
)
def test_records_of_another_run_are_refused(change, message, compared, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    mine, other = (next((out / "runs" / name).rglob("seed-0/events.jsonl")) for name in ("kept", "fedit"))
    mine.write_text(change(mine.read_text(), other.read_text()))
    before = {path: path.read_bytes() for path in (out / "runs").rglob("*") if path.is_file()}
    done = _again(out)
    assert done.exit_code == 2
    assert message in done.stderr
    assert before == {path: path.read_bytes() for path in (out / "runs").rglob("*") if path.is_file()}


def test_a_copied_record_is_refused(compared, tmp_path):
    """Of an earlier version, whose events do not say their seed."""
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    first, second = sorted((out / "runs" / "kept").rglob("seed-[01]/events.jsonl"))
    for path in (first, second):
        path.write_text(re.sub('"seed": [01], ', "", first.read_text(), count=1))
    assert "are the same" in _again(out).stderr


def test_a_damaged_line_in_the_middle_is_not_passed_over(compared, tmp_path):
    """The run is made again, to the same numbers; to read it is an error."""
    out = tmp_path / "out"
    shutil.copytree(compared / "out", out)
    events = next((out / "runs" / "kept").rglob("seed-100/events.jsonl"))
    lines = events.read_text().splitlines(keepends=True)
    number = next(number for number, line in enumerate(lines) if '"event": "held_out"' in line)
    events.write_text("".join([*lines[:number], lines[number][:20] + "\n", *lines[number + 1 :]]))
    with pytest.raises(StorageError, match=f"line {number + 1} is damaged"):
        read_events(events)
    events.write_bytes("".join(lines[:number]).encode() + b"\xff\n" + "".join(lines[number + 1 :]).encode())
    with pytest.raises(StorageError, match=f"line {number + 1} is damaged"):
        read_events(events)
    table = (out / "compare.md").read_text()
    assert _again(out).exit_code == 0
    assert len(read_events(events)) == len(lines)
    assert (out / "compare.md").read_text() == table


JOB = configuration(rounds=3)


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A run that was stopped after its second round, and the curve of one that was not."""
    folder = tmp_path_factory.mktemp("half")

    def stop(event):
        if event.name == "round_done" and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(JOB, folder / "run", stop)
    (whole,) = outcomes([RunJob(JOB, folder / "whole" / "run")], 1)  # messages have the name of the folder
    return folder / "run", whole.curve


@pytest.mark.parametrize(
    ("broken", "goes_on_with"),
    [("", 3), ("config.toml", None), ("events.jsonl", None), ("rounds/0002/server.safetensors", 2), ("rounds/0002/manifest.json", 2)],
)
def test_a_half_done_run_goes_on_to_the_same_numbers(half_done, broken, goes_on_with, tmp_path):
    """From the last whole round; what is another run's or lacks its beginning is run again."""
    shutil.copytree(half_done[0], tmp_path / "run")
    if broken:
        path = tmp_path / "run" / broken
        text = path.read_bytes().replace(b"seed = 0", b"seed = 1").replace(b'"started"', b'"startled"')
        path.write_bytes(text[:-40] if "rounds/" in broken else text)
    (outcome,) = outcomes([RunJob(JOB, tmp_path / "run")], 1)
    assert [event["round"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "resumed"] == (
        [goes_on_with] if goes_on_with else []
    )
    whole = half_done[1]
    assert (outcome.curve.metric, outcome.curve.held_out) == (whole.metric, whole.held_out)
    assert outcome.curve.bytes_down == whole.bytes_down


def test_options_and_a_file_say_one_protocol():
    """Every option, under its own key."""
    options = {
        "methods": "fedex,fedit",
        "variant": ("kept: method=fedex local.schedule=run",),
        "seeds": "0,1,2",
        "tuning_seeds": "7,8",
        "at": "4,8",
        "reference": "fedit",
        "target": 0.7,
        "controls": False,
        "grid": ("lora.dropout=0,0.1",),
        "learning_rates": "1e-3,3e-3",
        "primary": ("fedex@4 > fedit@8",),
        "equivalent": ("fedex = kept: 0.01",),
    }
    text = """
methods = ["fedex", "fedit"]
seeds = [0, 1, 2]
tuning_seeds = [7, 8]
at = [4, 8]
reference = "fedit"
target = 0.7
controls = false
[variants.kept]
method = "fedex"
"local.schedule" = "run"
[grid]
"training.learning_rate" = [1e-3, 3e-3]
"lora.dropout" = [0, 0.1]
[[tests]]
better = "fedex"
than = "fedit"
round_better = 4
round_than = 8
primary = true
[[tests]]
equivalent = ["fedex", "kept"]
bound = 0.01
"""
    assert sorted(options) == sorted(OPTIONS)
    said, written = (parse_protocol(tree).model_dump() for tree in (_protocol(options), tomllib.loads(text)))
    for one in (said, written):
        for test in one["tests"]:
            test.pop("name", None)
    assert said == written
