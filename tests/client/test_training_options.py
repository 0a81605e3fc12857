"""Options of `transformers.TrainingArguments` that make training faster or smaller: the run is the same one, to rounding."""

import pytest
from tests.finished_runs import small_run

from fedex_lora.storage.events import read_events
from fedex_lora.storage.result import read_result

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "use_cpu": True}


def adapters(out):
    return {f"{name}.{part}": getattr(pair, part).double() for name, pair in read_result(out / "final").adapter.items() for part in "AB"}


def distance(left, right):
    return max(float((left[name] - right[name]).norm() / right[name].norm()) for name in right)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("plain") / "run", training=TRAINING)


@pytest.mark.parametrize(
    ("options", "within"),
    [
        ({"gradient_checkpointing": True}, 1e-6),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 1e-4),
        ({"bf16": True}, 0.5),  # Adam feels the rounding of the autocast in every step
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_the_same_run(options, within, plain, tmp_path):
    out = small_run(tmp_path / "run", training=TRAINING | options)
    assert distance(adapters(out), adapters(plain)) <= within
    assert all(event["exactness_error"] < 1e-6 for event in read_events(out / "events.jsonl") if event["event"] == "round_done")


def test_rows_grouped_by_length_are_another_order(plain, tmp_path):
    out = small_run(tmp_path / "run", training=TRAINING | {"train_sampling_strategy": "group_by_length"})
    assert distance(adapters(out), adapters(plain)) > 0
