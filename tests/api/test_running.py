"""`fedex_lora.run`: rows, a model, metrics and a listener that are here already."""

import json
import shutil
import threading
from copy import copy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tomli_w
import torch
from datasets import Dataset
from tests.runs.test_run import assert_same_bits, ignore
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import fedex_lora
from fedex_lora.cli import app
from fedex_lora.config import Base, TaskSettings, base_folder
from fedex_lora.errors import ConfigError, DataError, FedexLoraError, ModelError, UsageError
from fedex_lora.offline.verify import verify
from fedex_lora.runs.simulation import _numbers
from fedex_lora.storage.events import RoundDone, RunDone, of_kind

NOTES = Path(__file__).parents[2] / "examples" / "notes"
TREE = {
    "rounds": 2,
    "torch_threads": 1,
    "base": {"model": str(base_folder())},
    "task": {"kind": "causal-lm", "prompt": "{note}", "completion": " {colour}", "max_length": 64},
    "lora": {"r": 2, "target_modules": "all-linear"},
    "training": {"learning_rate": 5e-3, "num_train_epochs": 1, "per_device_train_batch_size": 32},
}

TINY = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))


@pytest.fixture(scope="module")
def notes():
    """Client -> its rows, and the evaluation set."""
    rows = [json.loads(line) for line in (NOTES / "train.jsonl").read_text().splitlines()][::4]
    parts = {}
    for row in rows:
        parts.setdefault(row["hospital"], []).append(row)
    return parts, [json.loads(line) for line in (NOTES / "eval.jsonl").read_text().splitlines()][:30]


@pytest.fixture(scope="module")
def plain(notes, tmp_path_factory):
    parts, held = notes
    return fedex_lora.run(TREE, rows=parts, eval=held, on_event=ignore, out=tmp_path_factory.mktemp("plain") / "run")


def test_rows_in_memory_are_rows_in_files(notes, plain, tmp_path):
    """Lists, a data frame and a data set: the same bits as a file for each client, by the command's own path."""
    parts, held = notes
    (one, first), (two, second), (three, third) = sorted(parts.items())
    mixed = {three: third, one: Dataset.from_list(first), two: pd.DataFrame(second)}
    again = fedex_lora.run(TREE, rows=mixed, eval=Dataset.from_list(held), on_event=ignore)
    assert_same_bits(again.folder, plain.folder)
    for name, rows in {**parts, "held": held}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in parts}
    tree = {**TREE, "task": {**TREE["task"], "name": "custom", "eval": str(tmp_path / "held.jsonl")}, "clients": {"data": files}}
    read = fedex_lora.run(tree, on_event=ignore)
    assert_same_bits(read.folder, plain.folder)


def test_a_result_is_frames_a_model_and_a_folder(plain, tmp_path):
    assert list(plain.metrics["round"]) == [0, 1, 2]
    assert plain.metrics["exactness_error"].max() < 1e-6
    assert len(plain.clients) == 6
    assert repr(plain).startswith("<fedex: 2 rounds, loss ")
    assert len(repr(plain).partition("'")[0]) < 80
    assert plain.state.round == 2
    saved = plain.save(tmp_path / "to" / "be" / "saved")
    assert verify(saved)["max_relative_error"] < 1e-6
    with pytest.raises(UsageError, match="exists: give another folder"):
        plain.save(saved)
    (tmp_path / "full").mkdir()
    with pytest.MonkeyPatch.context() as here:
        here.setattr(shutil, "copytree", lambda *_, **__: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            plain.save(tmp_path / "full" / "saved")
    assert not list((tmp_path / "full").iterdir())
    ids = torch.arange(3, 27).reshape(2, 12)
    plain.export(tmp_path / "merged")
    assert plain.export(tmp_path / "half", dtype=torch.bfloat16, base=base_folder())["dtype"] == "bfloat16"
    for options, words in (({"shard": 100000}, "shard size 100000: write it as 2GB"), ({"form": "mergd"}, "no export as 'mergd'")):
        with pytest.raises(UsageError, match=words) as caught:
            plain.export(tmp_path / "no", **options)
        assert "--" not in str(caught.value)
    with pytest.raises(UsageError, match="give another out, remove it, or resume it"):
        fedex_lora.run({"base": {"model": "demo"}, "task": {"name": "demo"}}, on_event=ignore, out=plain.folder)
    with torch.no_grad():
        want, got = plain.model()(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_the_best_round_s_model_is_to_be_had_beside_the_last_one_s(notes, plain, tmp_path):
    """By its number and as the best: the weights are those of the round's folder; the last round's are others."""
    wanted = {number: fedex_lora.load_model(plain.folder / "rounds" / f"000{number}", base_folder()).state_dict() for number in (1, 2)}
    assert plain.best_round == of_kind(plain.events, RunDone)[0].best_round in wanted
    for asked, number in ((1, 1), ("best", plain.best_round), (None, 2)):
        got = plain.model(asked).state_dict()
        assert all(torch.equal(got[key], tensor) for key, tensor in wanted[number].items())
    assert any(not torch.equal(wanted[1][key], tensor) for key, tensor in wanted[2].items())
    assert plain.export(tmp_path / "first", "adapter", round=1)["round"] == 1
    for asked in (3, 0, "bets"):
        with pytest.raises(UsageError, match=f"has no folder of round {asked}: give best, or one of 1, 2"):
            plain.model(asked)
    lines = call("export", plain.folder, "--as", "adapter", "--round", "1", "-o", tmp_path / "again")
    assert "adapter of round 1 in" in lines
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, notes[1])))
    measured = json.loads(call("evaluate", plain.folder, "--round", 1, "--file", tmp_path / "held.jsonl", "--json"))
    assert measured["loss"] == pytest.approx(plain.metrics.set_index("round")["loss"][1], abs=1e-6)
    assert "is no run folder, so it has no rounds" in call("export", tmp_path / "first", "--as", "merged", "--round", "best", "-o", "x")


def call(*arguments):
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, [str(argument) for argument in arguments])
    return done.stdout + done.stderr


def test_an_error_that_cannot_be_computed_is_said(plain):
    odd = copy(plain)
    last = of_kind(plain.events, RoundDone)[-1]
    odd.events = [*plain.events, last.model_copy(update={"not_finite": ["exactness_error"]})]
    assert "errors of round 2 not finite" in repr(odd)
    assert "not finite" not in repr(plain)


def test_a_listener_a_metric_and_a_model_of_the_users_own(notes, plain, tmp_path):
    parts, held = notes
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_folder()), AutoTokenizer.from_pretrained(base_folder())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer.chat_template = "mine"
    heard = []
    tree = {**TREE, "base": {}}
    result = fedex_lora.run(
        tree,
        rows=parts,
        eval=held,
        model=model,
        processor=tokenizer,
        metrics=lambda prediction: {"predicted": float(np.size(prediction.label_ids))},
        on_event=heard.append,
    )
    assert result.metrics["predicted"].min() > 0
    assert [event.round for event in of_kind(heard, RoundDone)] == [1, 2]
    assert_same_bits(result.folder, plain.folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    ids = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(result.model()(ids).logits, plain.model()(ids).logits)

    result.export(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "mine" != plain_template()


def plain_template():
    return AutoTokenizer.from_pretrained(base_folder()).chat_template


def test_a_classifier_in_memory(tmp_path):
    rows = [{"text": f"word {i} {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(16)]
    model = AutoModelForSequenceClassification.from_pretrained(base_folder(), num_labels=2)
    tree = {"rounds": 1, "base": {"model": str(base_folder())}, "task": {"labels": [0, 1]}, "training": {"num_train_epochs": 1}}
    here = {"rows": {"a": rows[:8], "b": rows[8:]}, "eval": rows, "model": model, "on_event": ignore}
    result = fedex_lora.run(tree, **here, out=tmp_path / "run")
    assert result.metrics["exactness_error"].max() < 1e-6
    more = fedex_lora.run({**tree, "rounds": 2}, **here, out=tmp_path / "run", resume=True)
    assert more.state.round == 2
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight += 0.1
    with pytest.raises(UsageError, match=r"was trained on another base than .* is now: give the one it began with, or another out"):
        fedex_lora.run({**tree, "rounds": 3}, **here, out=tmp_path / "run", resume=True)
    with pytest.raises(ModelError, match="tells 2 classes apart, and the task has 3"):
        fedex_lora.run({**tree, "task": {"labels": [0, 1, 2]}}, **here)


def test_a_model_with_batch_normalisation_is_refused_as_one_by_its_name_is(notes):
    parts, held = notes
    model = AutoModelForCausalLM.from_pretrained(base_folder())
    model.model.norm = torch.nn.BatchNorm1d(4)
    with pytest.raises(ModelError, match="the model has batch normalisation, whose running statistics are not averaged"):
        fedex_lora.run(TREE, rows=parts, eval=held, model=model, on_event=ignore)


def test_a_result_without_a_global_model_says_so(notes):
    parts, held = notes
    result = fedex_lora.run({**TREE, "rounds": 1, "method": "fedsa"}, rows=parts, eval=held, on_event=ignore)
    assert repr(result).startswith("<fedsa: 1 round, '")
    for get in (result.model, lambda: result.export("out")):
        with pytest.raises(ModelError, match="fedsa, which has no global model: load clients/CLIENT/adapter"):
            get()


class MineError(Exception):
    pass


@pytest.mark.parametrize("error", [MineError, KeyboardInterrupt])
def test_what_a_listener_raises_ends_the_run_which_goes_on_to_the_same_bits(error, notes, plain, tmp_path):
    parts, held = notes

    def stops(event):
        if event.name == "client_done" and event.round == 2:
            raise error

    with pytest.raises(error):
        fedex_lora.run(TREE, rows=parts, eval=held, on_event=stops, out=tmp_path / "run")
    result = fedex_lora.run(TREE, rows=parts, eval=held, on_event=ignore, out=tmp_path / "run", resume=True)
    assert_same_bits(result.folder, plain.folder)


def test_tables_may_be_records_already(notes, plain):
    parts, held = notes
    tables = {"task": TaskSettings(name="custom", **TREE["task"]), "base": Base(**TREE["base"])}
    result = fedex_lora.run({**TREE, **tables}, rows=parts, eval=held, on_event=ignore)
    assert_same_bits(result.folder, plain.folder)


def test_a_model_in_memory_is_the_base_in_its_own_precision(notes):
    parts, held = notes
    model, tree = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.bfloat16), {**TREE, "base": {}, "rounds": 1}
    result = fedex_lora.run(tree, rows=parts, eval=held, model=model, on_event=ignore)
    assert result.events[0].base_dtype == "bfloat16"
    assert result.events[0].base_delta["fold"] == 0  # as on such a base on disk: beside the weights
    named = fedex_lora.run({**tree, "base": {**TREE["base"], "dtype": "bfloat16"}}, rows=parts, eval=held, on_event=ignore)
    assert_same_bits(result.folder, named.folder)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"eval": None}, UsageError, "give rows and eval together"),
        ({"rows": {}}, UsageError, "give a table for each client"),
        ({"rows": [{}]}, UsageError, "a table for each client by its name"),
        ({"rows": {" ": [{}]}}, UsageError, "by its name, a text that is not empty"),
        ({"rows": {"a": pd.DataFrame([["x", "y"]], columns=["note"] * 2)}}, DataError, "a has several columns called note: rename or drop"),
        ({"rows": {1: [{}]}}, UsageError, "a table for each client by its name"),
        ({"rows": {"a": [], "b": "notes.csv"}}, DataError, "a table is empty, a: .*; rows: b is no table: .* list of dictionaries"),
        ({"rows": {"a": [{"note": "x"}, {"note": "x", "colour": "red"}]}}, DataError, r"1 row with nothing to say: .* \(line 1\)"),
        ({"config": None}, ConfigError, "of type NoneType: give a TOML file"),
        ({"model": torch.nn.Linear(2, 2)}, UsageError, "type Linear: give a transformers.PreTrainedModel"),
        ({"model": TINY, "config": {**TREE, "base": {}}}, UsageError, "give it by processor="),
        (
            {"model": TINY, "config": {**TREE, "base": {**TREE["base"], "dtype": "float16"}}},
            UsageError,
            "the model is in float32: remove",
        ),
        ({"metrics": lambda prediction: 3.0}, UsageError, "metrics gave a float: give a dictionary"),
        ({"metrics": lambda prediction: {"x": "good"}}, UsageError, "metrics gave 'x' = 'good', which is no number"),
        ({"metrics": lambda prediction: {"loss": 0.0}}, UsageError, "metrics gave 'loss', which the task has already"),
        ({"rows": {"a": [{"nota": "x", "colour": "red"}]}}, DataError, "a has no column 'note': did you mean 'nota'"),
        ({"on_event": 3}, UsageError, "on_event is of type int: give a function"),
        ({"metrics": 3}, UsageError, "metrics is of type int: give a function"),
        ({"resume": True}, UsageError, "give out, too"),
        ({"config": "nowhere.toml"}, FedexLoraError, "does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(notes, change, error, words):
    parts, held = notes
    with pytest.raises(error, match=words) as caught:
        fedex_lora.run(**{"config": TREE, "rows": parts, "eval": held, "on_event": ignore, **change})
    assert "\n" not in str(caught.value)


def test_a_metric_that_fails_at_once_leaves_the_folder_free(tmp_path):
    """Nothing happened that a run could go on from, so the next cell may write there."""
    tree = {"base": {"model": "demo"}, "task": {"name": "demo", "train_rows": 9, "eval_rows": 3}, "rounds": 1, "training": {"max_steps": 1}}
    with pytest.raises(UsageError, match="which the task has already"):
        fedex_lora.run(tree, metrics=lambda prediction: {"accuracy": 1.0}, out=tmp_path / "out", on_event=ignore)
    assert not (tmp_path / "out").exists()
    fedex_lora.run(tree, metrics=lambda prediction: {"own": 1.0}, out=tmp_path / "out", on_event=ignore)


def test_a_second_run_in_another_thread_is_refused_and_one_within_a_listener_changes_no_bit(notes, plain):
    parts, held = notes
    refused, within = [], []

    def elsewhere():
        with pytest.raises(UsageError, match="another run is at work in this process") as error:
            fedex_lora.run(TREE, rows=parts, eval=held, on_event=ignore)
        refused.append(error)

    def listener(event):
        if event.name == "client_done" and not within:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            within.append(fedex_lora.run(TREE, rows=parts, eval=held, on_event=ignore))

    outer = fedex_lora.run(TREE, rows=parts, eval=held, on_event=listener)
    assert len(refused) == 1
    for one in (outer, *within):
        assert_same_bits(one.folder, plain.folder)


def test_no_metric_of_the_users_own_has_the_name_of_a_column(plain):
    """Every column of the frame, what trainers take out, and the beginnings that are ours."""
    others = ["eval_x", "held_out_x", "runtime", "epoch", "not_finite", "bytes_total", "", "refused", "rows"]
    for name in [*plain.metrics.columns, *others]:
        known = [metric for metric in plain.events[0].metrics if metric not in ("loss", "rows")]
        with pytest.raises(UsageError, match="give it another name"):
            _numbers({"mine": 1.0, name: 1.0}, known)
    assert _numbers({"mine": 1, "evaluation": np.float32(2)}, ()) == {"mine": 1.0, "evaluation": 2.0}
    assert list(_numbers({"x" * 55: 1, "F1 +/- 1@k": 2}, ()))
    for name in ("F1 (macro)", "accuracy (%)", "précision", "x" * 56):  # clients could not report it after the first round
        with pytest.raises(UsageError, match="name it by at most 55 letters"):
            _numbers({name: 1.0}, ())


def test_rows_that_were_in_memory_are_not_asked_of_the_hub(plain, tmp_path):
    report = tmp_path / "report.html"
    call("report", plain.folder, "-o", report)
    assert "fedex-lora run run.toml" not in report.read_text()
    said = "memory:eval: its rows were in memory: go on from Python, or give --file"
    config = plain.folder / "config.toml"
    commands = [("evaluate", plain.folder), ("data", config), ("check", config), ("run", config, "--dry-run")]
    commands += [("run", config, "--out", plain.folder, "--resume", "--rounds", 3), ("run", config, "--out", tmp_path / "new")]
    for command in commands:
        assert said in call(*command)
    assert not (tmp_path / "new").exists()


def test_rows_that_are_given_are_dealt_already(notes, plain, tmp_path):
    """A file that deals its own rows out is a file of settings then: the same bits."""
    parts, held = notes
    clients = {"partition": "column", "column": "hospital", "count": 7, "dirichlet_alpha": 2.0}
    tree = {**TREE, "task": {**TREE["task"], "name": "custom", "train": "gone.csv", "eval": "gone.csv"}, "clients": clients}
    (tmp_path / "one.toml").write_text(tomli_w.dumps(tree))
    result = fedex_lora.run(tmp_path / "one.toml", rows=parts, eval=held, on_event=ignore)
    assert_same_bits(result.folder, plain.folder)
