"""`fedex-lora check`: all that is wrong with rows, in one go."""

import json
from logging import getLogger

import pytest
from tests.runs.test_run import ignore
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import parse_config, write_config
from fedex_lora.engines.flower._node import _rows
from fedex_lora.errors import FedexLoraError
from fedex_lora.runs.check import check
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.tasks.dealt import dealt

ROWS = """text,label,site
printer is broken,Hardware ,north
printer is broken,hardware,south
mouse is dead,hardware,north
,network,south
no wifi,network,south
no wifi,network,south
slow page,netwrk,north
vpn fails,network,north
"""


def configuration(folder, **changes):
    (folder / "rows.csv").write_text(ROWS)
    (folder / "eval.csv").write_text("text,label\nno wifi,network\nno sound,hardware\n")
    task = {"name": "custom", "data": str(folder), "train": "rows.csv", "eval": "eval.csv", "labels": ["hardware", "network", "Hardware "]}
    clients = {"partition": "column", "column": "site", "holdout": 0.0}
    return parse_config({"base": {"model": "demo"}, "task": {**task, **changes}, "clients": clients})


def words(config, stops):
    return [finding.words for finding in check(config) if finding.stops == stops]


def test_every_kind_of_problem_is_found_in_one_go(tmp_path):
    config = configuration(tmp_path, max_length=2)
    assert words(config, stops=True) == [
        "rows.csv: 1 row with no 'text' (line 5)",
        "rows.csv: 1 row with a label outside ['hardware', 'network', 'Hardware '] ('netwrk', did you mean 'network'?) (line 8)",
    ]
    said = words(config, stops=False)
    for expected in (
        "rows.csv: 2 rows repeat the input of another (line 3, 7)",
        "rows.csv: 1 input with different labels (line 2, 3)",
        "eval.csv: 1 input of rows.csv, too (line 2): what is measured on them was trained on",
        "classes 'hardware' and 'Hardware ' are two classes: if they are meant to be one, mend the rows",
        "south: no row of class Hardware ",
    ):
        assert expected in said
    assert any(
        line.startswith("north: 3 of 3 rows are cut at task.max_length = 2 (the longest has ") and "more than half" in line for line in said
    )
    assert words(configuration(tmp_path, on_bad_row="drop"), stops=True) == []


def test_rows_of_nobody_are_named_and_the_check_goes_on(tmp_path):
    config = configuration(tmp_path, on_bad_row="drop")
    (tmp_path / "rows.csv").write_text(ROWS.replace("mouse is dead,hardware,north", "mouse is dead,hardware, "))
    assert words(config, stops=True) == ["clients.column = 'site' is empty in 1 training row (line 4): fill it in or leave such rows out"]
    (tmp_path / "rows.csv").write_text(ROWS.replace("vpn fails,network,north", "vpn fails,network,"))  # two bad rows stand above it
    assert words(config, stops=True) == ["clients.column = 'site' is empty in 1 training row (line 9): fill it in or leave such rows out"]
    assert any(line.startswith("all clients: 57% of the tokens") for line in words(config, stops=False))


def test_a_tokenizer_that_does_not_know_the_words_is_told(tmp_path):
    said = [line for line in words(configuration(tmp_path), stops=False) if "unknown to this tokenizer" in line]
    assert [line.partition(":")[0] for line in said] == ["north", "south", "the rows to measure on"]
    # 'printer is broken', 'mouse is dead', 'vpn fails': 6 of 11 tokens; each row begins with <s>, and 'is' is the demo's
    assert said[0].startswith("north: 55% of the tokens in these rows are unknown to this tokenizer"), said
    demo = parse_config({"base": {"model": "demo"}, "task": {"name": "demo"}})
    assert not any("unknown" in line for line in words(demo, stops=False))


def test_what_stops_a_check_is_its_last_finding(tmp_path):
    said = "; ".join(f"{file}.csv has no column 'txt': did you mean 'text'?" for file in ("rows", "eval"))
    assert words(configuration(tmp_path, text=["txt"]), stops=True) == [said]
    long = configuration(tmp_path, kind="causal-lm", labels=None, prompt="{text}", completion="{label}", max_length=2, on_bad_row="drop")
    assert any("no row is left" in line or "nothing is left to learn" in line for line in words(long, stops=True))


def test_the_command_s_status_says_whether_a_run_would_begin(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(write_config(configuration(tmp_path)))
    done = CliRunner().invoke(app, ["check", str(path)])
    assert (done.exit_code, "2 of " in done.stderr) == (1, True), done.output
    done = CliRunner().invoke(app, ["check", str(path), "--set", "task.on_bad_row=drop", "--json"])
    assert (done.exit_code, json.loads(done.stdout)["stops"]) == (0, 0), done.output


def test_rows_that_are_given_twice_are_named(tmp_path):
    config = configuration(tmp_path, labels=None)
    (tmp_path / "b.csv").write_text("text,label\nno sound,hardware\nno wifi,network\n")  # the rows of eval.csv
    (tmp_path / "c.csv").write_text("text,label\nno light,hardware\nno heat,network\n")

    def twice(**data):
        found = config.model_copy(update={"clients": config.clients.model_copy(update={"data": data, "partition": "iid", "column": None})})
        return [line for line in words(found, stops=False) if "the same rows are" in line]

    assert twice(n="c.csv", s="c.csv") == ["c.csv: the same rows are clients.data.n and clients.data.s: give each its own"]
    assert twice(n="c.csv", s="eval.csv") == ["eval.csv: the same rows are clients.data.s and task.eval: give each its own"]
    assert twice(n="b.csv", s="c.csv") == ["b.csv and eval.csv: the same rows are clients.data.n and task.eval: give each its own"]
    same = configuration(tmp_path, eval="rows.csv")
    assert "rows.csv: the same rows are task.train and task.eval: give each its own" in words(same, stops=False)


LONG, SHORT = "bed " * 70, "bed 4 : the woman has wheeze"


def texts(folder, train, held, **tables):
    """Of one client, whose tenth row is held out."""
    for name, notes in (("train", train), ("eval", held)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"note": note, "colour": " red"}) + "\n" for note in notes))
    task = {"name": "custom", "kind": "causal-lm", "data": str(folder), "train": "train.jsonl", "eval": "eval.jsonl"}
    task |= {"prompt": "{note}", "completion": "{colour}", **tables.pop("task", {})}
    tree = {"base": {"model": "demo"}, "lora": {"target_modules": "all-linear"}, "clients": {"count": 1}, "task": task}
    return parse_config({**tree, **tables})


def held_back(folder):
    """Ten rows, of which the one that is held out is too long."""
    _, parts = dealt(texts(folder, [SHORT] * 10, [SHORT]))
    (row,) = parts["client-0"][1]
    return [LONG if place == row else SHORT for place in range(10)]


def refusal(config):
    """Why a run does not begin; "" where it does."""
    try:
        LocalSimulation(config, ignore)
    except FedexLoraError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("held", "tables", "said"),
    [
        ([SHORT, LONG], {}, "the rows to measure on: 1 of 2 rows have a prompt that fills"),
        ([LONG], {"task": {"on_bad_row": "drop"}}, "nothing is left to learn: raise it"),
        ([SHORT], {"method": "nope"}, "nope"),
        ([SHORT], {"training": {"learning_rte": 1}}, "unknown key training.learning_rte"),
        ([SHORT], {"method": "fedex-best", "clients": {"count": 3, "ranks": [1, 2]}}, "2 ranks for 3 clients"),
        ([SHORT], {}, ""),
    ],
)
def test_a_run_refuses_what_a_check_refuses(held, tables, said, tmp_path):
    """Evaluation rows, and settings."""
    config = texts(tmp_path, [SHORT] * 10, held, **tables)
    found = words(config, stops=True)
    assert (said in "".join(found), said in refusal(config), bool(found)) == (True, True, bool(said))
    assert "drop" not in refusal(config) or "task" not in tables  # what is set already is not advised


def test_a_client_may_lose_the_row_that_it_held_out(tmp_path):
    """Where rows are dropped; else a run is refused, and a check says so."""
    rows = held_back(tmp_path)
    strict, lenient = (texts(tmp_path, rows, [SHORT], task={"on_bad_row": word}) for word in ("refuse", "drop"))
    said = "1 of 1 rows have a prompt that fills"
    assert said in words(strict, stops=True)[0]
    assert said in refusal(strict)
    assert words(lenient, stops=True) == []
    here = LocalSimulation(lenient, ignore)
    at_a_node, _ = _rows(here.host.place, "client-0", dealt(lenient)[1], getLogger("party"))
    for data in (here.pool.learner.data, at_a_node):
        assert (len(data["client-0"].train), len(data["client-0"].held_out)) == (9, 0)
