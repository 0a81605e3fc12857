"""`fedex-lora check`: all that is wrong with rows, in one go."""

import json

from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import parse_config, write_config
from fedex_lora.runs.check import check

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
    assert [line.partition(":")[0] for line in said] == ["north", "south"]
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
