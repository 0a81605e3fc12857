"""Configurations: what is said of a mistake, and that a resolved configuration is the configuration."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedex_lora.client.arguments import training_arguments
from fedex_lora.config import parse_config, read_config, write_config
from fedex_lora.errors import ConfigError, UsageError
from fedex_lora.runs.run import run

MINIMAL = {"base": {"model": "m"}, "task": {"name": "demo"}}


def test_round_trip():
    config = parse_config(
        {**MINIMAL, "method": "ffa", "lora": {"r": 2, "target_modules": "all-linear"}, "training": {"learning_rate": 1e-3}}
    )
    assert parse_config(tomllib.loads(write_config(config))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 4}}, r"unknown key lora.rank"),
        ({"lora": {"alhpa": 4}}, r"unknown key lora.alhpa: did you mean lora.alpha\?"),
        ({"round": 4}, r"unknown key round: did you mean rounds\?"),
        ({"lora": {"r": "four"}}, "lora.r = 'four': give a whole number"),
        ({"lora": {"r": 0}}, "lora.r = 0"),
        ({"rounds": True}, "^rounds = True: give a number, not true or false$"),
        ({"clients": {"deadline": True, "ranks": [2, True]}}, r"^clients.ranks = \[2, True\]: give a number.*; clients.deadline = True"),
        ({"lora": {"rank_pattern": {"v": True}}}, "^lora.rank_pattern = {'v': True}: give a number"),
        ({"task": {"name": "custom", "labels": [0.5, 1.5]}}, "^task.labels: put 0.5 in quotes, as it is written in the rows$"),
        ({"rounds": 0}, "rounds = 0"),
        ({"clients": {"fraction": 0}}, "clients.fraction = 0"),
        ({"clients": {"partition": "column"}}, "needs clients.column"),
        ({"clients": {"column": "ward"}}, "^clients.column is set, and clients.partition is not: set it to"),
        ({"clients": {"ranks": 4}}, "^clients.ranks = 4: input should be a valid list"),
        ({"task": {"name": "custom", "labels": ["1", "2", 1]}}, "task.labels names a class twice: name each once"),
        ({"base": {}}, "base.model is missing"),
        ({"training": {"seed": 3}}, "seed is set by fedex-lora"),
        ({"training": {"save_steps": 3}}, "save_steps is set by fedex-lora"),
        ({"training": {"report_to": "wandb"}}, "report_to"),
        ({"training": {"bf16_full_eval": True}}, "bf16_full_eval is set by fedex-lora"),
        ({"training": {"fp16_full_eval": True}}, "fp16_full_eval is set by fedex-lora"),
        ({"training": {"skip_memory_metrics": False}}, "skip_memory_metrics is set by fedex-lora"),
        ({"weights": "majority"}, "weights = 'majority'"),
        (
            {"messages": {"per_client": True}},
            r"^messages.per_client was removed: delete the line \(each client is sent the residual of the",
        ),
        ({"base": {"model": "m", "compact_rank": 3}}, r"^base.compact_rank was removed: delete the line \(a side path keeps the whole"),
        ({"base": {"model": "m", "compact_tolerance": 0.1}}, r"^base.compact_tolerance was removed: delete the line"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config({**MINIMAL, **changes})
    assert "\n" not in str(caught.value)


def test_the_default_of_a_key_that_is_gone_says_nothing():
    """Run folders of older versions have it in their configuration."""
    old = parse_config({**MINIMAL, "messages": {"per_client": False, "catch_up": "log"}})
    assert old == parse_config({**MINIMAL, "messages": {"catch_up": "log"}})


def test_training_fields_are_those_of_transformers():
    with pytest.raises(ConfigError, match=r"training.learning_rat: did you mean training.learning_rate"):
        training_arguments(parse_config({**MINIMAL, "training": {"learning_rat": 1e-3}}))
    with pytest.raises(ConfigError, match=r"training.device: see transformers.TrainingArguments"):  # no field of ours is meant
        training_arguments(parse_config({**MINIMAL, "training": {"device": "cpu"}}))
    with pytest.raises(ConfigError, match="refused by transformers"):
        training_arguments(parse_config({**MINIMAL, "training": {"lr_scheduler_type": "stairs"}}))
    for key, value in (("max_steps", 1.5), ("gradient_accumulation_steps", 2.5), ("per_device_train_batch_size", 8.0)):
        with pytest.raises(ConfigError, match=f"training.{key} = {value}: give a whole number"):
            training_arguments(parse_config({**MINIMAL, "training": {key: value}}))
    training_arguments(parse_config({**MINIMAL, "training": {"num_train_epochs": 0.5, "warmup_steps": 0.1, "max_steps": 2}}))
    arguments = training_arguments(parse_config({**MINIMAL, "training": {"learning_rate": 1e-3, "adam_beta2": 0.95, "max_grad_norm": 0.5}}))
    assert (arguments.learning_rate, arguments.adam_beta2, arguments.max_grad_norm) == (1e-3, 0.95, 0.5)


def test_overrides(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('[base]\nmodel = "m"\n[task]\nname = "demo"\n')
    config = read_config(
        path, ["rounds=3", "lora.target_modules=['q']", "base.model=/some/where", "training.learning_rate=1e-3", "method=fedit"]
    )
    assert (config.rounds, config.lora.target_modules, config.base.model, config.method) == (3, ["q"], "/some/where", "fedit")
    for wrong, message in (("rounds", "table.key=value"), ("method.x=1", "is a value"), ("base.modle=x", "did you mean base.model")):
        with pytest.raises(ConfigError, match=message):
            read_config(path, ["method=fedex", wrong])


def test_paths_are_relative_to_the_file_that_names_them_and_to_the_command_that_gives_them(tmp_path, monkeypatch):
    (tmp_path / "at" / "model").mkdir(parents=True)
    (tmp_path / "here" / "other").mkdir(parents=True)
    (tmp_path / "at" / "rows.csv").touch()
    (tmp_path / "here" / "rows.csv").touch()
    path = tmp_path / "at" / "c.toml"
    path.write_text('[base]\nmodel = "model"\n[task]\nname = "custom"\ntrain = "rows.csv"\neval = "name/of-the-hub:test"\n')
    monkeypatch.chdir(tmp_path / "here")
    config = read_config(Path("../at/c.toml"))
    assert Path(config.base.model) == tmp_path / "at" / "model"
    assert (Path(config.task.train), config.task.eval) == (tmp_path / "at" / "rows.csv", "name/of-the-hub:test")
    given = read_config(path, ["base.model=other", "task.train=rows.csv"])
    assert (Path(given.base.model), Path(given.task.train)) == (tmp_path / "here" / "other", tmp_path / "here" / "rows.csv")
    folder = read_config(path, ["task.data=data"]).task
    assert (folder.data, folder.train) == (tmp_path / "here" / "data", "rows.csv")
    (tmp_path / "at" / "demo").mkdir()
    assert read_config(path, ["base.model=demo"]).base.model == "demo"


def test_a_file_may_begin_with_a_byte_order_mark_and_labels_be_true_and_false(tmp_path):
    path = tmp_path / "c.toml"
    text = '[base]\nmodel = "m"\nrandom_weights = true\n[task]\nname = "custom"\nlabels = [true, false]\n'
    path.write_text(text, encoding="utf-8-sig")
    assert read_config(path).task.labels == ["true", "false"]  # as in rows of JSON


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("rounds = ", "not TOML")])
def test_unreadable_files(text, message, tmp_path):
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_defaults_that_suit_lora_and_the_kind_of_task():
    def made(**tables):
        return parse_config({"base": {"model": "m"}, "task": {"name": "custom"}, **tables})

    plain, written = made(), made(task={"name": "custom", "kind": "causal-lm"})
    assert (plain.lora.r, plain.lora.alpha, plain.training["learning_rate"], plain.task.length) == (8, 16, 1e-3, 256)
    assert (written.lora.r, written.lora.alpha, written.training["learning_rate"], written.task.length) == (16, 32, 3e-4, 1024)
    assert (made(lora={"r": 4}).lora.alpha, made(lora={"alpha": 3}).lora.alpha) == (8, 3)
    assert [made(lora={"r": rank}).lora.alpha for rank in ("4", 4.0, np.int64(4), " 4 ")] == [8] * 4  # what pydantic takes as 4
    assert made(clients={"ranks": [2, 4, 2]}).lora.r == made(clients={"ranks": (2, 4, 2)}).lora.r == 4
    assert made(training={"learning_rate": 0.5}).training["learning_rate"] == 0.5
    assert "learning_rate" not in made(method="full-ft").training
    assert (made(method="fedavg").method, made(method="fedavg+balanced").method) == ("fedit", "fedit+balanced")


@pytest.mark.parametrize(("table", "key", "meant"), [("lora", "rank", "lora.r"), ("lora", "lora_alpha", "lora.alpha")])
def test_what_others_call_a_key_names_ours(table, key, meant):
    with pytest.raises(ConfigError, match=f"unknown key {table}.{key}: did you mean {meant}"):
        parse_config({**MINIMAL, table: {key: 8}})


def test_a_run_that_goes_on_keeps_what_its_file_does_not_say(tmp_path):
    path, begun = tmp_path / "c.toml", tmp_path / "run"
    path.write_text('rounds = 3\n[base]\nmodel = "m"\n[task]\nname = "custom"\n[lora]\ntarget_modules = "all-linear"\n')
    begun.mkdir()
    old = parse_config(
        {**MINIMAL, "task": {"name": "custom"}, "lora": {"r": 4, "alpha": 8}, "training": {"learning_rate": 5e-5}, "rounds": 2}
    )
    (begun / "config.toml").write_text(write_config(old))
    config = read_config(path, ["seed=7"], begun=begun)
    assert (config.lora.r, config.lora.alpha, config.training["learning_rate"]) == (4, 8, 5e-5)
    assert (config.rounds, config.seed, config.lora.target_modules) == (3, 7, "all-linear")


def test_what_is_taken_out_of_a_table_of_the_user_s_own_keys_is_out_when_the_run_goes_on(tmp_path):
    """A client that gave its rows back is trained on no more: the configuration is another one then, which `run` refuses."""
    head = '[base]\nmodel = "m"\n[task]\nname = "custom"\nlabels = ["a", "b"]\neval = "e.csv"\n[training]\nmax_steps = 3\n'
    tables = '[clients.data]\nnorth = "n.csv"\n{}[lora.rank_pattern]\nv_proj = 2\n{}[privacy.rows]\nnorth = 3\n{}'
    path, begun = tmp_path / "c.toml", tmp_path / "run"
    begun.mkdir()
    path.write_text(head + tables.format('south = "s.csv"\n', "q_proj = 4\n", "south = 3\n"))
    (begun / "config.toml").write_text(write_config(read_config(path)))
    assert write_config(read_config(path, begun=begun)) == (begun / "config.toml").read_text()
    path.write_text(head + tables.format("", "", ""))
    config = read_config(path, ["training.weight_decay=0.5"], begun=begun)
    assert (set(config.clients.data), config.lora.rank_pattern, config.privacy.rows) == ({"north"}, {"v_proj": 2}, {"north": 3})
    assert config.training == {"learning_rate": 1e-3, "max_steps": 3, "weight_decay": 0.5}
    with pytest.raises(UsageError, match=r"is a run with another configuration \(clients.data.south"):
        run(read_config(path, begun=begun), begun, print, resume=True)
