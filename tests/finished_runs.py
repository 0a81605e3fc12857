"""Runs for tests of what people see: small real ones, and synthetic events."""

import json

import numpy as np

from fedex_lora.config import parse_config
from fedex_lora.runs.run import run


def small_run(folder, rounds=2, **settings):
    """A real run on the embedded base, of a few rows; returns its folder."""
    tree = {
        "method": "fedex",
        "rounds": rounds,
        "torch_threads": 1,
        "base": {"model": "demo"},
        "lora": {"r": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "task": {"name": "demo", "train_rows": 60, "eval_rows": 15},
        "clients": {"partition": "column", "column": "hospital"},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 5e-3},
    }
    run(parse_config(tree | settings), folder, lambda event: None)
    return folder


def event(name, **fields):
    return {"event": name, "time": 1.0, **fields}


def written(folder, events):
    """A run folder that holds events only."""
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    return folder


def synthetic(rounds, clients, layers=6, method="fedex", seed=0, names=("query", "value")):
    """Events as a run of that size leaves them: clients are sampled, some are refused."""
    rng = np.random.default_rng(seed)
    everyone = [f"site-{number:03d}" for number in range(clients)]
    modules = [f"bert.encoder.layer.{layer}.attention.self.{name}" for layer in range(layers) for name in names]
    metrics = {"accuracy": 0.3, "loss": 1.1}
    facts = {"task": "glue/mrpc", "base_model": "a/model", "headline": "accuracy", "greater_is_better": True, "base_bytes": 90_000_000}
    facts |= {
        "trainable_parameters": 1000,
        "total_parameters": 100_000,
        "versions": {"torch": "2"},
        "torch_threads": 1,
        "rounds": rounds,
        "disk_bytes": 1_000_000,
    }
    yield event("started", method=method, clients=everyone, metrics=metrics, **facts)
    for number in range(1, rounds + 1):
        asked = [client for client in everyone if rng.random() < 0.8] or everyone[:1]
        yield event("round_started", round=number, clients=asked)
        for client in asked:
            yield event(
                "client_done", round=number, client=client, num_examples=100, bytes_up=1000, train_loss=1 / number, steps=4, seconds=1.0
            )
            if rng.random() < 0.01:
                yield event("rejected", round=number, client=client, reason="its update is 12 times the round's median")
        yield event("held_out", round=number - 1, metrics=metrics, clients={client: metrics for client in asked})
        size = {key: (rng.random(len(modules)) / number).round(6).tolist() for key in ("deviation", "ideal", "scaled")}
        size |= {"module": modules, "effective_rank": (1 + rng.random(len(modules))).round(4).tolist()}
        numbers = {"exactness_error": 1e-7, "realised_error": 4e-7, "floor": 2e-6, "deviation": 0.3 / number, "modules": size}
        numbers |= {
            "bytes_down": 5000 * len(asked),
            "bytes_up": 1000 * len(asked),
            "seconds": 2.0,
            "drift": {client: rng.random() for client in asked},
        }
        yield event("round_done", round=number, metrics={"accuracy": 0.9 - 0.6 / number, "loss": 1 / number}, **numbers)
    yield event("run_done", rounds=rounds, best_round=rounds, held_out={})
