"""Data frames of runs, against numbers worked out in numpy from the stored updates, and against the events themselves."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from tests.conftest import make_updates
from tests.finished_runs import event, small_run, written

from fedex_lora.aggregation import aggregate
from fedex_lora.errors import StorageError, UsageError
from fedex_lora.exactness import algebra, measure
from fedex_lora.report import analysis
from fedex_lora.storage.events import RoundDone, of_kind, record
from fedex_lora.storage.files import read_manifest
from fedex_lora.storage.updates import load_update


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run of two rounds."""
    return analysis.read_run(small_run(tmp_path_factory.mktemp("analysis") / "fedit", method="fedit"))


def numpy_round(folder):
    """Module -> (M, s Bbar Abar), dense, from the files."""
    inputs = {entry["client"]: entry["weight"] for entry in read_manifest(folder)["inputs"]}
    updates = [load_update(path) for path in sorted((folder / "updates").glob("*"))]
    found = {}
    for module in updates[0].adapter:
        pairs = [(inputs[u.client_id], u.adapter[module].B.double().numpy(), u.adapter[module].A.double().numpy()) for u in updates]
        s = updates[0].adapter[module].scaling
        ideal = s * sum(p * B @ A for p, B, A in pairs)
        found[module] = ideal, s * sum(p * B for p, B, _ in pairs) @ sum(p * A for p, _, A in pairs)
    return found


def test_modules_are_the_paper_s_deviation(run):
    frame = analysis.modules(run)
    for number in (1, 2):
        for module, (ideal, averaged) in numpy_round(run.folder / "rounds" / f"{number:04d}").items():
            row = frame[(frame["round"] == number) & (frame["module"] == module)].iloc[0]
            lost = ideal - averaged
            assert row["deviation"] == pytest.approx(np.linalg.norm(lost), rel=1e-5)
            assert row["ideal"] == pytest.approx(np.linalg.norm(ideal), rel=1e-5)
            assert row["scaled"] == pytest.approx(np.sqrt(np.mean(lost**2)), rel=1e-5)
            assert row["relative"] == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(ideal), rel=1e-5)
            values = np.linalg.svd(lost, compute_uv=False) ** 2
            assert row["effective_rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)


def test_round_folders_give_what_the_events_say(run):
    without = [one.model_copy(update={"modules": None}) if isinstance(one, RoundDone) else one for one in run.events]
    again = analysis.modules(analysis.Run(run.folder, run.name, without, run.config))
    pd.testing.assert_frame_equal(again, analysis.modules(run))


def test_rounds_and_clients_are_the_events(run):
    rounds, done = analysis.rounds(run.events), of_kind(run.events, RoundDone)
    assert rounds["round"].tolist() == [0, 1, 2]
    assert rounds["accuracy"].tolist() == [run.started.metrics["accuracy"], *(one.metrics["accuracy"] for one in done)]
    assert rounds["bytes_total"].iloc[-1] == sum(one.bytes_down + one.bytes_up for one in done)
    assert rounds["accepted"].iloc[1:].tolist() == [3, 3]
    clients = analysis.clients(run.events)
    assert len(clients) == 6
    assert (clients.groupby("round")["bytes_up"].sum().to_numpy() == [one.bytes_up for one in done]).all()


def test_drift_is_the_distance_from_the_mean():
    """Also where ranks and scalings differ."""
    updates = make_updates(3, scalings=[2.0, 1.0, 3.0])
    weights = {"client-0": 0.2, "client-1": 0.3, "client-2": 0.5}
    means = [sum(weights[u.client_id] * u.adapter[m].delta().numpy() for u in updates) for m in updates[0].adapter]
    size = np.sqrt(sum((mean**2).sum() for mean in means))
    for update in updates:
        apart = np.sqrt(sum(((pair.delta().numpy() - mean) ** 2).sum() for pair, mean in zip(update.adapter.values(), means, strict=True)))
        assert measure.drift(updates, weights)[update.client_id] == pytest.approx(apart / size, rel=1e-5)
    assert measure.drift(updates[:1], {"client-0": 1.0})["client-0"] == pytest.approx(0, abs=1e-6)


def test_spectrum_is_numpy_s(run):
    frame = analysis.spectrum(run.folder)
    for module, (ideal, averaged) in numpy_round(run.folder / "rounds" / "0002").items():
        rows = frame[frame["module"] == module]
        want = np.linalg.svd(ideal - averaged, compute_uv=False)
        assert len(rows) <= 2 * 2  # (k - 1) r
        assert rows["value"].to_numpy() == pytest.approx(want[: len(rows)], rel=1e-5)
        assert rows["energy"].iloc[-1] == pytest.approx(1)


def test_spectrum_of_what_the_base_gained(tmp_path):
    run = small_run(tmp_path / "fedex", rounds=1)
    frame = analysis.spectrum(run, of="base delta")
    lost = {module: ideal - averaged for module, (ideal, averaged) in numpy_round(run / "rounds" / "0001").items()}
    for module, rows in frame.groupby("module"):
        assert rows["value"].iloc[0] == pytest.approx(np.linalg.norm(lost[module], 2), rel=1e-4)
    with pytest.raises(StorageError, match="keep_rounds"):
        analysis.spectrum(tmp_path)


def test_effective_rank_counts_directions():
    assert algebra.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert algebra.effective_rank(torch.ones(4, 3)) == pytest.approx(1)
    assert algebra.effective_rank(torch.zeros(4, 3)) == 0


@pytest.mark.parametrize(
    ("module", "layer", "projection"),
    [
        ("base.encoder.layer.11.attention.self.query", 11, "query"),
        ("transformer.h.0.attn.c_attn", 0, "c_attn"),
        ("base.encoder.layer.0.attention.output.dense", 0, "attention.output.dense"),
        ("base.encoder.layer.0.intermediate.dense", 0, "intermediate.dense"),
        ("classifier", -1, "classifier"),
    ],
)
def test_layer_and_projection(module, layer, projection):
    everything = [f"base.encoder.layer.{n}.{part}.dense" for n in (0, 11) for part in ("attention.output", "intermediate", "output")]
    assert analysis.parse_module_paths([*everything, module])[module] == (layer, projection)


def test_nested_stacks_are_counted_through():
    names = [f"stages.{stage}.blocks.{block}.qkv" for stage in (0, 1) for block in (0, 1, 10)]
    assert [analysis.parse_module_paths(names)[name][0] for name in names] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("model.encoder.layers.3.self_attn.q_proj", "model.decoder.layers.3.self_attn.q_proj", ("encoder.q_proj", "decoder.q_proj")),
        ("text_model.encoder.layers.3.q_proj", "vision_model.encoder.layers.3.q_proj", ("text_model.q_proj", "vision_model.q_proj")),
    ],
)
def test_stacks_with_the_same_names_are_told_apart(first, second, names):
    found = analysis.parse_module_paths([first, second, "classifier"])
    assert (found[first], found[second], found["classifier"]) == ((3, names[0]), (3, names[1]), (-1, "classifier"))


def test_no_observation_of_rounding_errors_or_nothing():
    """And those of the first round are of the first that there is."""
    rows = [(number, f"l.{layer}", layer, "query", (9.0 - layer) / number) for number in (3, 4, 5) for layer in range(4)]
    frame = pd.DataFrame(rows, columns=["round", "module", "layer", "projection", "relative"])
    found = analysis.observations(frame).set_index("observation")
    assert found.loc["falls with depth (query)", "number"] == pytest.approx(-1)
    assert found.loc["falls with the rounds", "of"].startswith("mean over modules, round 5 / round 3;")
    assert analysis.observations(frame.assign(relative=frame["relative"] * 1e-16)).empty
    assert analysis.observations(frame[:0]).empty
    assert list(analysis.observations(frame.assign(layer=-1))["observation"]) == [
        "falls with the rounds",
        "falls with the rounds, first layer",
    ]


def test_observations_tell_a_trend_from_its_opposite():
    def frame(sign, size=1.0, query=2.0):
        rows = [
            (number, f"l.{layer}.{name}", layer, name, size * (query if name == "query" else 1) * (10 - sign * layer) / number)
            for number in (1, 2, 3)
            for layer in range(4)
            for name in ("query", "value")
        ]
        return pd.DataFrame(rows, columns=["round", "module", "layer", "projection", "relative"])

    held = analysis.observations(frame(1), more_epochs=frame(1, size=3.0)).set_index("observation")
    assert held["holds"].all()
    assert held.loc["grows with local epochs", "number"] == pytest.approx(3)
    assert held.loc["query above value", "number"] == pytest.approx(2)
    fails = analysis.observations(frame(-1, query=0.5), more_epochs=frame(-1, size=0.1)).set_index("observation")
    assert not fails.drop(["falls with the rounds", "falls with the rounds, first layer"])["holds"].any()


def test_communication_is_relative_to_fedex(tmp_path):
    runs = {}
    for method, down in (("fedit", 100), ("fedex", 300)):
        runs[method] = [
            record("started", method=method, clients=["a", "b"], base_bytes=1000),
            record("round_done", round=1, bytes_down=down, bytes_up=100, metrics={}),
            record("evaluated", round=1, bytes_down=9000, bytes_up=9000),  # by a process that was killed before the end
            record("evaluated", round=1, bytes_down=down, bytes_up=20),
        ]
    assert analysis.sent(runs["fedex"]) == (600, 120)
    frame = analysis.communication(runs).set_index("run")
    assert frame.loc["fedex", "relative"] == 1
    assert frame.loc["fedit", "relative"] == 320 / 720
    assert frame.loc["fedit", "relative_with_base"] == 2320 / 2720


def test_refusals_of_a_round_and_of_the_final_measurement(tmp_path):
    events = [
        record("started", method="fedex", clients=["a", "b", "c"], metrics={"accuracy": 0.1}, headline="accuracy"),
        record("round_started", round=1, clients=["a", "b"]),
        record("refused", round=1, client="b", reason="too large"),
        record("round_done", round=1, bytes_down=1, bytes_up=1, metrics={"accuracy": 0.2}),
        record("refused", round=1, client="a", reason="gone"),
    ]
    assert analysis.refusals(events)["when"].tolist() == ["round", "final measurement"]
    frame = analysis.participation(events).set_index("client")
    assert frame["outcome"].to_dict() == {"a": "accepted", "b": "refused", "c": "not asked"}
    assert analysis.rounds(events)["refused"].iloc[-1] == 1
    mean = events[3]
    events[3] = mean.model_copy(update={"accepted": ["a", "b"]})  # b was asked again, and answered well
    assert analysis.participation(events)["outcome"].tolist() == ["accepted", "accepted", "not asked"]
    assert analysis.rounds(events)[["accepted", "refused"]].iloc[-1].tolist() == [2, 0]
    events[3] = mean.model_copy(update={"skipped": "1 of 2 answered"})
    frame = analysis.participation(events).set_index("client")
    assert frame.loc["a", ["outcome", "reason"]].tolist() == ["skipped", "1 of 2 answered"]
    assert analysis.rounds(events)["accepted"].iloc[-1] == 0


def test_a_round_that_was_begun_again_counts_once(tmp_path):
    first = [
        event("started", method="fedex", clients=["a"], metrics={}),
        event("round_started", round=1, clients=["a"]),
        event("client_done", round=1, client="a", bytes_up=5),
    ]
    again = [*first[1:], event("round_done", round=1, bytes_down=1, bytes_up=5, metrics={})]
    folder = written(tmp_path / "run", [*first, event("resumed", round=1, rounds=1), *again])
    assert len(analysis.clients(analysis.read_run(folder).events)) == 1


def test_labels_say_what_differs(tmp_path):
    def run(seed, **config):
        return analysis.Run(tmp_path, "", [], {"seed": seed, **config})

    runs = [run(seed, method="fedex", training={"num_train_epochs": epochs}) for epochs in (1, 3) for seed in (0, 1)]
    assert analysis.labels(runs) == ["fedex, num_train_epochs 1"] * 2 + ["fedex, num_train_epochs 3"] * 2


def test_runs_on_different_data_are_no_seeds_of_one(tmp_path):
    """Nor are two runs of which nothing is known but their folders; one folder given twice is one run."""

    def run(folder, seed, data):
        return analysis.Run(tmp_path / folder, "", [], {"seed": seed, "method": "fedex", "task": {"data": data}})

    assert analysis.labels([run("a", 0, "/x/east/rows"), run("b", 1, "/x/west/rows")]) == ["fedex, data east/rows", "fedex, data west/rows"]
    assert analysis.labels([run("a", 0, "/x/rows"), run("b", 0, "/x/rows"), run("c", 1, "/x/rows")]) == ["fedex, a", "fedex, b", "fedex"]
    once = written(tmp_path / "once", [event("started", method="fedex", clients=["a"])])
    assert len(analysis.find_runs([once, tmp_path, tmp_path / "once" / ".." / "once"])) == 1


def test_what_is_no_run(tmp_path):
    with pytest.raises(UsageError, match=r"no events\.jsonl"):
        analysis.read_run(tmp_path)
    with pytest.raises(UsageError, match="holds no run"):
        analysis.find_runs([tmp_path])
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "other"}) + "\n")
    with pytest.raises(StorageError, match="has not begun"):
        analysis.read_run(tmp_path)
    lacking = written(tmp_path / "lacking", [event("started", method="fedex", clients=["a"]), event("round_done", round=1, metrics={})])
    with pytest.raises(StorageError, match="`round_done` event without bytes_down, bytes_up"):
        analysis.read_run(lacking)


def test_aggregates_of_any_method_have_the_same_deviation():
    updates = make_updates(3)
    numbers = [measure.deviation(aggregate(updates, method=method), updates) for method in ("fedex", "fedit", "fedex-best")]
    for one in numbers[1:]:
        assert one.error == pytest.approx(numbers[0].error)
