"""Runs for tests of what people see: small real ones, and synthetic events."""

import json

from fedex_lora.config import parse_config
from fedex_lora.runner import run


def small_run(folder, rounds=2, **settings):
    """A real run on the embedded base, of a few rows; returns its folder."""
    tree = {
        "method": "fedex",
        "rounds": rounds,
        "torch_threads": 1,
        "base": {"model": "demo"},
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "task": {"name": "demo", "train_rows": 60, "eval_rows": 15},
        "clients": {"partition": "column", "column": "hospital"},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 5e-3},
    }
    run(parse_config(tree | settings), folder, lambda event, **fields: None)
    return folder


def event(name, **fields):
    return {"event": name, "time": 1.0, **fields}


def written(folder, events):
    """A run folder that holds events only."""
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    return folder
