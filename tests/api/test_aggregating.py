"""`fedex_lora.aggregate` on folders: what the command does, from Python."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from tests.conftest import make_updates
from tests.offline.test_streaming import SHAPES, write_adapter

from fedex_lora import AggregatedFolders, aggregate, load_model, run
from fedex_lora.config import base_folder
from fedex_lora.errors import FedexLoraError, UsageError
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.verify import verify
from fedex_lora.storage.adapter_folder import read_adapter_folder
from fedex_lora.storage.files import read_manifest


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    root = tmp_path_factory.mktemp("sites")
    return [str(write_adapter(root / name, seed)) for seed, name in enumerate(("north", "south"))]


def test_folders_are_aggregated_saved_and_verified(sites, tmp_path):
    result = aggregate(sites, weights={"south": 80, "north": 120})
    assert isinstance(result, AggregatedFolders)
    assert repr(result).startswith("<fedex of 2 adapters: 6 modules, rank 4 + 4, error ")
    assert len(repr(result)) < 100
    assert result.numbers["weights"] == {"north": 0.6, "south": 0.4}
    assert result.save(tmp_path / "out", for_parties=tmp_path / "send") is result
    assert verify(tmp_path / "out")["max_relative_error"] < 1e-6
    whole = read_adapter_folder(tmp_path / "out" / "adapter").adapter
    inputs = [read_adapter_folder(tmp_path / site).adapter for site in sites]
    for module in SHAPES:
        want = sum(
            p * one[module].scaling * one[module].B.double() @ one[module].A.double() for p, one in zip((0.6, 0.4), inputs, strict=True)
        )
        assert (whole[module].delta() - want).norm() <= 1e-6 * want.norm()
    assert not (tmp_path / "send" / "updates").exists()
    assert (tmp_path / "send" / "trainable").is_dir()


def test_a_second_round_stands_on_the_first(sites, tmp_path):
    aggregate(sites).save(tmp_path / "out")
    again = aggregate(sites, state=tmp_path / "out").save(tmp_path / "second")
    assert again.numbers["max_relative_error"] < 1e-6
    with pytest.raises(UsageError, match="is not empty"):
        again.save(tmp_path / "second")
    with pytest.raises(UsageError, match="lies in one of the folders"):
        again.save(tmp_path / "out" / "next")
    assert verify(tmp_path / "out")["max_relative_error"] < 1e-6


def test_the_next_round_by_hand_is_on_the_model_of_the_run(tmp_path):
    """A base in 16 bits, and classes by their names: what parties load after it is what they loaded before."""
    rows = [{"text": word, "label": label} for word, label in (("limp", "yellow"), ("burn", "red"))] * 6
    tree = {
        "base": {"model": "demo", "dtype": "bfloat16"},
        "rounds": 1,
        "lora": {"target_modules": ["q_proj"], "r": 2},
        "training": {"max_steps": 1},
        "task": {"text": ["text"], "label": "label", "labels": ["red", "yellow"]},
    }
    run(tree, rows={"a": rows, "b": rows}, eval=rows, out=tmp_path / "run", on_event=lambda event: None)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = load_model(tmp_path / "run", base_folder())
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter) if parameter.requires_grad else 0
        model.save_pretrained(tmp_path / name)
    aggregate([tmp_path / "a", tmp_path / "b"], state=tmp_path / "run").save(tmp_path / "next", for_parties=tmp_path / "send")
    for folder in (tmp_path / "next", tmp_path / "send"):
        model = load_model(folder, base_folder())
        assert (model.dtype, model.config.id2label) == (torch.bfloat16, {0: "red", 1: "yellow"})
        assert read_manifest(folder)["base_fingerprint"] == read_manifest(tmp_path / "run" / "final")["base_fingerprint"]
    assert verify(tmp_path / "next", str(base_folder()))["base_checked"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "num_examples"}, "give one number a folder"),
        ({"weights": {"north": 1}}, "weights name north, and the folders are north, south"),
        ({"weights": [1.0]}, "weight"),
        ({"weights": 5}, "weights = 5: give one number a folder"),
        ({"weights": {"north": "x", "south": 1}}, "'x'.*: give one number a folder"),
        ({"weights": [1e308, 1e308]}, "sum to infinity"),
        ({"weights": pd.Series([1, 2])}, "weights = 0 1 1 2 dtype: int64: give one number a folder"),
        ({"method": "fedx"}, "fedex"),
    ],
)
def test_what_cannot_be_is_refused(sites, options, words):
    with pytest.raises(FedexLoraError, match=words):
        aggregate(sites, **options)


def test_updates_are_aggregated_as_before(sites):
    updates = make_updates(2)
    with pytest.raises(UsageError, match="base= is for adapter folders"):
        aggregate(updates, base="x")
    for odd in ([torch.zeros(1)], [sites[0], updates[0]]):
        with pytest.raises(UsageError, match="all of one kind"):
            aggregate(odd)
    assert aggregate(updates).weights.keys() == {"client-0", "client-1"}
    assert len(aggregate(sites[0]).folders) == 1
    assert aggregate(sites, base=Path("elsewhere")).numbers["base_model"] == "elsewhere"


def test_updates_are_weighted_by_the_clients_ids():
    """Of whatever kind the ids are, and in whatever order."""
    updates = [replace(update, client_id=str(number)) for number, update in enumerate(make_updates(3), 1)]
    by_name, in_order = aggregate(updates, weights={"3": 1, "1": 2, "2": 5}), aggregate(updates, weights=[2, 5, 1])
    assert by_name.weights == in_order.weights == {"1": 0.25, "2": 0.625, "3": 0.125}
    assert all(torch.equal(pair.B, in_order.adapter[module].B) for module, pair in by_name.adapter.items())
    for wrong, words in (({"1": 1, "2": 1}, "weights name 1, 2, and the updates are 1, 2, 3: name"), ({"1": "x"}, "give one number a")):
        with pytest.raises(UsageError, match=words):
            aggregate(updates, weights=wrong)


def test_what_was_aggregated_is_saved_also_when_the_adapters_are_gone(sites, tmp_path):
    """File by file what the command writes of the adapters as they were."""
    copies = [shutil.copytree(site, tmp_path / Path(site).name) for site in sites]
    aggregate_folders(copies, tmp_path / "linked", parties=tmp_path / "for-want")
    shutil.copytree(tmp_path / "linked", tmp_path / "want")
    result = aggregate(copies)
    shutil.copyfile(copies[0] / "adapter_model.safetensors", copies[1] / "adapter_model.safetensors")
    shutil.rmtree(copies[0])
    result.save(tmp_path / "got", for_parties=tmp_path / "for-got")
    for got, want in (("got", "want"), ("for-got", "for-want")):
        files = {str(file.relative_to(tmp_path / want)) for file in (tmp_path / want).rglob("*") if file.is_file()}
        assert files == {str(file.relative_to(tmp_path / got)) for file in (tmp_path / got).rglob("*") if file.is_file()}
        assert all((tmp_path / got / file).read_bytes() == (tmp_path / want / file).read_bytes() for file in files)
    with pytest.raises(UsageError, match="one party's adapter as it is"):
        aggregate(sites, weights=[1, 0]).save(tmp_path / "one", for_parties=tmp_path / "for-one")
    assert not (tmp_path / "one").exists()
    assert repr(aggregate(sites[:1])).startswith("<fedex of 1 adapter: ")
