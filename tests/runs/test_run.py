"""Whole runs in this process on the embedded base: exact every round, the same bits from the same seeds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from fedex_lora import METHODS, load_model
from fedex_lora.aggregation import get_method
from fedex_lora.client.training import evaluate
from fedex_lora.config import TaskSettings, base_folder, parse_config
from fedex_lora.errors import FedexLoraError, StorageError, TrainingError, UsageError
from fedex_lora.offline.verify import verify
from fedex_lora.runs.context import GlobalModel
from fedex_lora.runs.emit import log_to
from fedex_lora.runs.round_loop import run_rounds
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.storage.events import read_events
from fedex_lora.storage.files import checksum
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import run_rounds_of
from fedex_lora.storage.tensors import load_tensors, save_tensors
from fedex_lora.tasks import load_task


def configuration(**changes):
    tree = {
        "rounds": 2,
        "torch_threads": 1,
        "base": {"model": str(base_folder())},
        "task": {"name": "demo", "train_rows": 96, "eval_rows": 30},
        "lora": {"r": 2, "alpha": 8, "target_modules": "all-linear"},
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
    """Of the final model, and of the updates that its last round was made of."""
    rounds = run_rounds_of(folder)[:1]
    for path in sorted(file for part in (folder / "final", *(last / "updates" for last in rounds)) for file in part.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": tensor for name, tensor in load_tensors(path)[0].items()}
    return found


def assert_same_bits(left, right):
    left, right = tensors(left), tensors(right)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with nothing set, which nobody writes to."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(configuration(), folder, ignore)
    return folder


RUNS = [*METHODS, "fedit+balanced", "fedex-best+procrustes"]
HEADER = 10_000  # bytes of JSON in a message, at most


@pytest.mark.parametrize("method", RUNS)
def test_every_method_runs_and_is_what_it_says(method, tmp_path):
    """Exact methods below 1e-6 in every round, from the factors and within the floor from the weights; others miss it by what they report.

    And what travels is what the method's row promises, module by module.
    """
    row, lr = get_method(method), 1e-3 if method == "full-ft" else 5e-3
    run(configuration(method=method, training={"learning_rate": lr}), tmp_path / "run", ignore)
    done = events_of(tmp_path / "run", "round_done")
    assert [event["round"] for event in done] == [1, 2]
    if method == "full-ft":
        assert (tmp_path / "run" / "final" / "model.safetensors").exists()
        return
    adapter = read_result(tmp_path / "run" / "final").adapter
    clients = 1 if row.centralised else 3
    for event in done:
        promised = [
            row.message_size([2] * clients, 0, pair.shape, event["round"], truncated=2 if row.residual_policy == "truncate" else None)
            for pair in adapter.values()
        ]
        for way in ("down", "up"):
            tensors_alone = 4 * clients * sum(getattr(numbers, way) for numbers in promised)
            assert 0 <= event[f"bytes_{way}"] - tensors_alone < clients * HEADER * event["round"], (way, event["round"])
    if row.exactness == "personalised":
        with pytest.raises(StorageError, match="no global model"):
            verify(tmp_path / "run")
        assert not any("exactness_error" in event or event["metrics"] for event in done)
        return
    checked = verify(tmp_path / "run", str(base_folder()))
    assert [line["round"] for line in checked["rounds"]] == [1, 2]
    assert checked["final"] == str(tmp_path / "run" / "final")  # the last round's bits
    if row.exact:
        assert checked["max_relative_error"] < 1e-6
        assert all(event["exactness_error"] < 1e-6 and event["realised_error"] < 3 * event["floor"] for event in done)
    else:
        assert checked["max_relative_error"] > 1e-3
        assert all(event["exactness_error"] > 1e-3 for event in done)
    if row.exactness in ("rank-r-optimal", "truncated"):
        assert all(event["dropped"] == pytest.approx(event["exactness_error_total"], rel=1e-4) for event in done)


@pytest.mark.parametrize("method", ["fedex-best", "keep"])
def test_clients_of_different_ranks(method, tmp_path):
    """Ranks 1, 2 and 4, and not everyone every round: exact in the model's own weights too, and each client trains and sends what it has.

    Without a model: all methods in `test_without_a_model.py`.
    """
    tree = {"partition": "iid", "count": 3, "ranks": [1, 2, 4], "fraction": 0.6}
    run(configuration(method=method, rounds=3, lora={"r": 4}, clients=tree), tmp_path / "run", ignore)
    result = read_result(tmp_path / "run" / "rounds" / "0003")
    sent = {update.client_id: {pair.rank for pair in update.adapter.values()} for update in result.updates}
    assert sent.items() <= {"client-0": {1}, "client-1": {2}, "client-2": {4}}.items()
    assert sent
    assert {pair.rank for pair in result.adapter.values()} == {4}
    checked = verify(tmp_path / "run", str(base_folder()))
    assert checked["max_relative_error"] < 1e-6
    assert checked["realised_error"] < 3 * checked["floor"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "fedex", "clients": {"ranks": [1, 2, 2]}},
            "needs one rank for all clients: remove clients.ranks, or use one of fedex-best",
        ),
        ({"method": "reinit", "clients": {"ranks": [1, 2]}}, "2 ranks for 3 clients"),
        ({"method": "reinit", "clients": {"ranks": [1, 1, 1]}}, "the largest of clients.ranks is 1 and lora.r is 2"),
        ({"method": "fedit+balanced", "local": {"optimizer_state": "keep"}}, "optimizer_state = 'keep' does not go with fedit\\+balanced"),
        ({"method": "reinit", "local": {"optimizer_state": "keep"}}, "does not go with reinit"),
        ({"method": "rolora", "local": {"optimizer_state": "keep"}}, "which trains factors in turn"),
        ({"method": "flexlora+procrustes", "clients": {"ranks": [1, 2, 2]}}, "clients.ranks needs components in falling order"),
        ({"method": "fedex", "truncation": {"rank": 2}}, r"\[truncation\] is for fedex-svd"),
        ({"lora": {"r": 80}}, "rank 80 is above the size of module .*, 64 x 128: lower lora.r"),
        ({"method": "fedx"}, "unknown method 'fedx': did you mean 'fedex'"),
        ({"method": "fedex+balance"}, "unknown gauge 'balance': did you mean 'balanced'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(FedexLoraError, match=message) as caught:
        run(configuration(**changes), tmp_path / "run", ignore)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(configuration(seed=seed), tmp_path / name, ignore)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    left, right = tensors(tmp_path / "a"), tensors(tmp_path / "c")
    assert any(not torch.equal(left[name], right[name]) for name in left.keys() & right.keys())


def test_the_order_in_which_clients_train_does_not_matter(plain, tmp_path, monkeypatch):
    forward = LocalSimulation.exchange
    monkeypatch.setattr(
        LocalSimulation, "exchange", lambda self, messages, deadline=None: forward(self, dict(reversed(list(messages.items()))), deadline)
    )
    run(configuration(), tmp_path / "run", ignore)
    assert_same_bits(plain, tmp_path / "run")


def test_one_base_in_memory_however_many_clients(tmp_path):
    few, many = (LocalSimulation(configuration(clients={"partition": "iid", "count": count}), ignore) for count in (2, 12))
    assert sum(p.numel() for p in few.host.place.model.parameters()) == sum(p.numel() for p in many.host.place.model.parameters())
    assert len(many.pool.learner.rows) == 12


@pytest.mark.parametrize("schedule", ["round", "run"])
@pytest.mark.parametrize("state", ["reset", "keep"])
def test_schedules_and_optimiser_states(schedule, state, plain, tmp_path):
    config = configuration(local={"schedule": schedule, "optimizer_state": state})
    run(config, tmp_path / "a", ignore)
    run(config, tmp_path / "b", ignore)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    differs = any(not torch.equal(tensors(tmp_path / "a")[name], tensor) for name, tensor in tensors(plain).items())
    assert differs == ((schedule, state) != ("round", "reset"))


def test_the_run_folder(plain):
    for name in (
        "config.toml",
        "events.jsonl",
        "rounds/0001",
        "rounds/0002",
        "final/trainable/adapter_model.safetensors",
        "final/base_delta.safetensors",
    ):
        assert (plain / name).exists(), name
    manifest = json.loads((plain / "final" / "manifest.json").read_text())
    assert {"method", "round", "versions", "files", "base_model"} <= manifest.keys()
    assert {"inputs", "participants", "refused"} <= json.loads((plain / "rounds" / "0002" / "manifest.json").read_text()).keys()
    assert "base delta" in (plain / "final" / "trainable" / "README.md").read_text()
    done = events_of(plain, "run_done")[0]
    assert done["best_round"] in (1, 2)
    assert done["held_out"].keys() == {"0", "1", "2"}
    assert not [path for path in plain.parent.rglob("*") if path.name.startswith(".")]


def test_verify_notices_tampering(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    for path in (tmp_path / "run" / "rounds" / "0001" / "base_delta.safetensors", tmp_path / "run" / "final" / "base_delta.safetensors"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(StorageError, match="has changed"):
            verify(tmp_path / "run")
        path.write_bytes(whole)
    assert verify(tmp_path / "run")["max_relative_error"] < 1e-6


def test_a_round_folder_can_be_verified_alone(plain, tmp_path):
    shutil.copytree(plain / "rounds" / "0002", tmp_path / "alone")
    assert verify(tmp_path / "alone")["max_relative_error"] < 1e-6


def test_the_realised_error_is_the_model_s(tmp_path, monkeypatch):
    """Were the adapter never written into the model, the number would show it."""
    place = LocalSimulation(configuration(), ignore)
    load = GlobalModel.load

    def forgetful(self, state):
        load(self, state)
        for name, parameter in self.place.model.named_parameters():
            if ".lora_B" in name:
                parameter.data.mul_(1.01)
        return self.place.model

    monkeypatch.setattr(GlobalModel, "load", forgetful)
    run_rounds(configuration(), place.initial(), place.federation(), tmp_path / "run", log_to(tmp_path / "events.jsonl"))
    last = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "round_done"][-1]
    assert last["realised_error"] > 100 * last["floor"]
    assert last["exactness_error"] < 1e-6


def test_the_last_round_s_metrics_are_the_loaded_model_s(tmp_path):
    """A checkpoint without the pooler: it is random, so it is trained and travels; `load_model` gives the run's model under any seed."""
    torch.manual_seed(3)
    shape = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertModel(shape, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_folder()).save_pretrained(tmp_path / "base")
    rows = load_task(TaskSettings(name="demo", train_rows=60, eval_rows=30), 0)
    for name, frame in (("train", rows.train), ("eval", rows.eval)):
        frame.rename(columns={"prompt": "text", "completion": "label"}).to_json(tmp_path / f"{name}.jsonl", orient="records", lines=True)
    task = {"name": "custom", "data": str(tmp_path), "train": "train.jsonl", "eval": "eval.jsonl", "train_rows": None, "eval_rows": None}
    config = configuration(base={"model": str(tmp_path / "base")}, task=task, lora={"target_modules": ["query", "value"]})
    place = LocalSimulation(config, ignore)
    final = run(config, tmp_path / "run", ignore)
    assert "bert.pooler.dense.weight" in final.other
    want = place.host.evaluate(final)["loss"]
    assert want == pytest.approx(events_of(tmp_path / "run", "round_done")[-1]["metrics"]["loss"], rel=1e-5)
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = load_model(tmp_path / "run", tmp_path / "base")
        assert evaluate(model, place.host.eval, place.host.place.work)["loss"] == pytest.approx(want, rel=1e-5)


def test_verify_checks_the_head_and_the_final_folder(tmp_path):
    test_the_last_round_s_metrics_are_the_loaded_model_s(tmp_path)
    folder = tmp_path / "run" / "final"
    path = folder / "trainable" / "adapter_model.safetensors"
    tensors, metadata = load_tensors(path)
    save_tensors(path, {name: -5 * tensor if "classifier" in name else tensor for name, tensor in tensors.items()}, metadata)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainable/adapter_model.safetensors"] = checksum(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"final/trainable/adapter_model\.safetensors is not what the last round left in .*0002"):
        verify(tmp_path / "run")


def test_an_occupied_run_folder_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        run(configuration(), tmp_path, ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_training_that_diverges_stops_with_one_line(tmp_path):
    said = []
    with pytest.raises(TrainingError, match=r"client bone: it failed: training diverged: lower training\.learning_rate"):
        run(configuration(training={"learning_rate": 1e30}), tmp_path / "run", said.append)
    assert any("training diverged in round 1 (loss" in str(getattr(event, "message", "")) for event in said)


def test_learning_needs_the_adapters(tmp_path):
    """Convergence: the frozen base is near chance, and centralised LoRA learns the rule."""
    from fedex_lora.cli.demo import configuration as demo

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
        "task": {"name": "glue/mrpc", "data": str(data_folder / "glue"), "train_rows": 48, "eval_rows": 32, "max_length": 48},
        "lora": {"r": 4, "alpha": 8, "target_modules": ["query", "value"]},
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
        "lora": {"r": 4, "alpha": 8, "target_modules": "all-linear"},
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
