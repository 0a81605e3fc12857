"""Configurations: what is said of a mistake, and that a resolved configuration is the configuration."""

import tomllib
from pathlib import Path

import pytest

from fedex_lora.client import training_arguments
from fedex_lora.config import parse_config, read_config, write_config
from fedex_lora.errors import ConfigError

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
        ({"lora": {"r": "four"}}, "lora.r = 'four': input should be a valid integer"),
        ({"lora": {"r": 0}}, "lora.r = 0"),
        ({"rounds": 0}, "rounds = 0"),
        ({"clients": {"fraction": 0}}, "clients.fraction = 0"),
        ({"clients": {"partition": "column"}}, "needs clients.column"),
        ({"base": {}}, "base.model is missing"),
        ({"training": {"seed": 3}}, "seed is set by fedex-lora"),
        ({"training": {"save_steps": 3}}, "save_steps is set by fedex-lora"),
        ({"training": {"report_to": "wandb"}}, "report_to"),
        ({"weights": "majority"}, "weights = 'majority'"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config({**MINIMAL, **changes})
    assert "\n" not in str(caught.value)


def test_training_fields_are_those_of_transformers():
    with pytest.raises(ConfigError, match=r"training.learning_rat: did you mean training.learning_rate"):
        training_arguments(parse_config({**MINIMAL, "training": {"learning_rat": 1e-3}}))
    with pytest.raises(ConfigError, match="refused by transformers"):
        training_arguments(parse_config({**MINIMAL, "training": {"lr_scheduler_type": "stairs"}}))
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


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("rounds = ", "not TOML")])
def test_unreadable_files(text, message, tmp_path):
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)
