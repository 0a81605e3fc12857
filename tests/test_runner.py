"""Whole runs in this process on the embedded base: exact every round, the same bits from the same seeds."""

import json
from pathlib import Path

import pytest
import torch

from fedex_lora import METHODS
from fedex_lora.config import base_folder, parse_config
from fedex_lora.errors import TrainingError, UsageError
from fedex_lora.peft_io import read_result
from fedex_lora.runner import InProcess, run
from fedex_lora.storage import load_tensors, read_events
from fedex_lora.verify import verify


def configuration(**changes):
    tree = {
        "rounds": 2,
        "torch_threads": 1,
        "base": {"model": str(base_folder())},
        "task": {"name": "demo", "train_rows": 96, "eval_rows": 30},
        "lora": {"r": 2, "target_modules": "all-linear"},
        "clients": {"partition": "column", "column": "hospital"},
        "training": {"learning_rate": 5e-3, "num_train_epochs": 1, "per_device_train_batch_size": 16},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and key in tree else value
    return parse_config(tree)


def ignore(event, **fields):
    pass


def events_of(folder, name):
    return [event for event in read_events(folder / "events.jsonl") if event["event"] == name]


def tensors(folder):
    found = {}
    for path in sorted((folder / "final").rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": tensor for name, tensor in load_tensors(path)[0].items()}
    return found


def assert_same_bits(left, right):
    left, right = tensors(left), tensors(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_runs_and_is_what_it_says(method, tmp_path):
    """Exact methods below 1e-6 in every round, from the factors and within the floor from the weights; fedit misses it."""
    lr = 1e-3 if method == "full-ft" else 5e-3
    run(configuration(method=method, training={"learning_rate": lr}), tmp_path / "run", ignore)
    rounds = events_of(tmp_path / "run", "round_done")
    assert [event["round"] for event in rounds] == [1, 2]
    assert all(event["bytes_up"] > 0 and event["bytes_down"] > 0 for event in rounds)
    if method == "full-ft":
        assert (tmp_path / "run" / "final" / "model.safetensors").exists()
        return
    checked = verify(tmp_path / "run", str(base_folder()))
    assert len(checked["rounds"]) == 2
    if METHODS[method].exact:
        assert checked["max_relative_error"] < 1e-6
        assert all(event["exactness_error"] < 1e-6 and event["realised_error"] < 3 * event["floor"] for event in rounds)
    else:
        assert checked["max_relative_error"] > 1e-3
        assert all(event["exactness_error"] > 1e-3 for event in rounds)


def test_bytes_are_what_the_method_promises(tmp_path):
    """Per module: fedit rN up and down; fedex k r N down once there is a residual; ffa r m (tensor bytes; headers come on top)."""
    sent = {}
    for method in ("fedex", "fedit", "ffa"):
        run(configuration(method=method, rounds=3), tmp_path / method, ignore)
        sent[method] = [(event["bytes_down"], event["bytes_up"]) for event in events_of(tmp_path / method, "round_done")]
    pairs = read_result(tmp_path / "fedex" / "final").adapter.values()
    a, b = (4 * sum(getattr(pair, part).numel() for pair in pairs) for part in "AB")
    header = 8000  # of JSON a message, at most
    for number in range(3):
        assert 0 <= sent["fedit"][number][0] - 3 * (a + b) < 3 * header
        assert 0 <= sent["fedex"][number][0] - 3 * (a + b) * (1 if number == 0 else 3) < 3 * 3 * header
        assert 0 <= sent["ffa"][number][0] - 3 * (b + (a if number == 0 else 0)) < 3 * header
        assert 0 <= sent["ffa"][number][1] - 3 * b < 3 * header


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(configuration(seed=seed), tmp_path / name, ignore)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    left, right = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    assert any(not torch.equal(left[name], right[name]) for name in left.keys() & right.keys())


def test_the_order_in_which_clients_train_does_not_matter(tmp_path, monkeypatch):
    run(configuration(), tmp_path / "a", ignore)
    forward = InProcess.exchange
    monkeypatch.setattr(
        InProcess, "exchange", lambda self, messages, deadline=None: forward(self, dict(reversed(messages.items())), deadline)
    )
    run(configuration(), tmp_path / "b", ignore)
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_a_fraction_of_the_clients(tmp_path):
    """Absent clients catch up: the factor log brings every participant to the round's base, and every round stays exact."""
    config = configuration(rounds=4, clients={"partition": "iid", "count": 5, "fraction": 0.4})
    run(config, tmp_path / "run", ignore)
    took_part = [event["clients"] for event in events_of(tmp_path / "run", "round_started")]
    assert all(len(clients) == 2 for clients in took_part)
    assert len({tuple(clients) for clients in took_part}) > 1
    assert verify(tmp_path / "run", str(base_folder()))["max_relative_error"] < 1e-6


def test_one_base_in_memory_however_many_clients(tmp_path):
    few, many = (InProcess(configuration(clients={"partition": "iid", "count": count}), ignore) for count in (2, 12))
    assert sum(p.numel() for p in few.model.parameters()) == sum(p.numel() for p in many.model.parameters())
    assert len(many._data) == 12


@pytest.mark.parametrize("schedule", ["round", "run"])
@pytest.mark.parametrize("state", ["reset", "keep"])
def test_schedules_and_optimiser_states(schedule, state, tmp_path):
    config = configuration(local={"schedule": schedule, "optimizer_state": state})
    run(config, tmp_path / "a", ignore)
    run(config, tmp_path / "b", ignore)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    run(configuration(), tmp_path / "c", ignore)
    differs = any(not torch.equal(tensors(tmp_path / "a")[name], tensor) for name, tensor in tensors(tmp_path / "c").items())
    assert differs == ((schedule, state) != ("round", "reset"))


def test_the_run_folder(tmp_path):
    run(configuration(), tmp_path / "run", ignore)
    for name in (
        "config.toml",
        "events.jsonl",
        "rounds/0001",
        "rounds/0002",
        "final/trainable/adapter_model.safetensors",
        "final/base_delta.safetensors",
    ):
        assert (tmp_path / "run" / name).exists(), name
    manifest = json.loads((tmp_path / "run" / "final" / "manifest.json").read_text())
    assert {"method", "round", "inputs", "versions", "files", "base_model"} <= manifest.keys()
    assert "base delta" in (tmp_path / "run" / "final" / "trainable" / "README.md").read_text()
    done = events_of(tmp_path / "run", "run_done")[0]
    assert done["best_round"] in (1, 2)
    assert done["held_out"].keys() == {"0", "1", "2"}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_verify_notices_tampering(tmp_path):
    from fedex_lora.errors import StorageError

    run(configuration(rounds=1), tmp_path / "run", ignore)
    path = tmp_path / "run" / "rounds" / "0001" / "base_delta.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(StorageError, match="has changed"):
        verify(tmp_path / "run")


def test_an_occupied_run_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run(configuration(), tmp_path, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_training_that_diverges_stops_with_one_line(tmp_path):
    with pytest.raises(TrainingError, match=r"client bone: training diverged in round 1 .* lower training\.learning_rate"):
        run(configuration(training={"learning_rate": 1e30}), tmp_path / "run", ignore)


def test_learning_needs_the_adapters(tmp_path):
    """Convergence: the frozen base is near chance, and centralised LoRA learns the rule."""
    from fedex_lora.demo import configuration as demo

    config = demo("centralised", rounds=3)
    run(config, tmp_path / "run", ignore)
    base = events_of(tmp_path / "run", "started")[0]["metrics"]["accuracy"]
    assert base < 0.5
    assert events_of(tmp_path / "run", "round_done")[-1]["metrics"]["accuracy"] > 0.75


def test_conv1d_layers(gpt2, tmp_path):
    """A GPT-2 stores its weights `in x out`; the residual is put in the right way round, in the weights too."""
    config = configuration(base={"model": str(gpt2)}, lora={"target_modules": ["c_attn", "c_proj", "c_fc"]})
    run(config, tmp_path / "run", ignore)
    checked = verify(tmp_path / "run", str(gpt2))
    assert checked["max_relative_error"] < 1e-6
    assert checked["realised_error"] < 3 * checked["floor"]
    losses = [event["metrics"]["loss"] for name in ("started", "round_done") for event in events_of(tmp_path / "run", name)]
    assert losses[-1] < losses[0]


def test_a_real_encoder_on_real_rows(minilm, data_folder, tmp_path):
    """MiniLM on MRPC: a classification head, base weights re-read from the checkpoint, exact."""
    tree = {
        "rounds": 2,
        "base": {"model": str(minilm)},
        "task": {"name": "glue/mrpc", "data": str(data_folder / "glue"), "train_rows": 96, "eval_rows": 64, "max_length": 64},
        "lora": {"r": 4, "target_modules": ["query", "value"]},
        "training": {"learning_rate": 3e-3, "per_device_train_batch_size": 16, "num_train_epochs": 1},
    }
    run(parse_config(tree), tmp_path / "run", ignore)
    checked = verify(tmp_path / "run", str(minilm))
    assert checked["max_relative_error"] < 1e-6
    assert checked["realised_error"] < 3 * checked["floor"]


def test_a_real_causal_lm_on_real_rows(stories, data_folder, tmp_path):
    """stories260K on E2E through `custom`, all linear layers (wide, tall and square): the loss falls, and every round is exact."""
    tree = {
        "rounds": 2,
        "base": {"model": str(stories)},
        "task": {
            "name": "custom", "kind": "causal-lm", "data": str(data_folder / "e2e"), "train": "trainset.csv", "eval": "devset.csv",
            "prompt": "{mr} ||", "completion": " {ref}", "max_length": 256, "train_rows": 150, "eval_rows": 40,
        },
        "lora": {"r": 4, "target_modules": "all-linear"},
        "training": {"learning_rate": 5e-3, "per_device_train_batch_size": 16, "num_train_epochs": 1},
    }  # fmt: skip
    run(parse_config(tree), tmp_path / "run", ignore)
    losses = [events_of(tmp_path / "run", "started")[0]["metrics"]["loss"]] + [
        e["metrics"]["loss"] for e in events_of(tmp_path / "run", "round_done")
    ]
    assert losses[0] > losses[1] > losses[2]
    assert verify(tmp_path / "run", str(stories))["max_relative_error"] < 1e-6


def test_the_base_is_never_written(tmp_path):
    before = {path: path.read_bytes() for path in Path(base_folder()).iterdir() if path.is_file()}
    run(configuration(rounds=1), tmp_path / "run", ignore)
    assert all(path.read_bytes() == content for path, content in before.items())
