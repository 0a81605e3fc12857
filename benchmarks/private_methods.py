"""What privacy costs in accuracy: methods by epsilon, on the demo's notes and on SST-2. It goes on where it was.

    python benchmarks/private_methods.py notes --out private/notes
    python benchmarks/private_methods.py more-notes --out private/more-notes
    python benchmarks/private_methods.py sst2 --data FOLDER --model FOLDER --out private/sst2
    python benchmarks/private_methods.py notes --out private/notes --table

Each cell has a learning rate of its own, the best of a grid on the tuning seed, which is none of the tests'. The choice is free of charge
here, because these rows are public; on private rows it would have to be paid for. Every run has a ledger of its own.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedex_lora.client.training import silence_libraries
from fedex_lora.config import parse_config
from fedex_lora.privacy.ledger import begin_ledger
from fedex_lora.runs.run import run
from fedex_lora.storage.events import RoundDone, of_kind, read_events
from fedex_lora.tasks import demo

LAST = 2  # rounds whose mean is compared


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        methods, epsilons, rates: of the table and its grid.
        seeds, tuning_seed: of the runs.
        tables: of the configuration.
        plain: of `[training]`, without privacy: what is faster there.
        headline: the metric.
        delta: less than one over the rows.
    """

    methods: tuple[str, ...]
    epsilons: tuple[float | None, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    tables: dict[str, Any]
    plain: Mapping[str, str] = field(default_factory=dict)
    headline: str = "accuracy"
    delta: float = 1e-4


def notes() -> Study:
    """The demo's notes: three hospitals, each with words of its own, 400 rows a hospital, steps of 50."""
    tables = {
        "rounds": 8,
        "base": {"model": "demo"},
        "task": {"name": "demo"},
        "lora": {"r": 4, "alpha": 8, "target_modules": "all-linear"},
        "clients": {"partition": "column", "column": "hospital", "holdout": 0},
        "privacy": {"rows": 400},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 50, "per_device_eval_batch_size": 200},
    }
    methods = ("ffa", "fedsvd", "rolora", "fed-sb", "fedex", "fedit", "reinit")
    return Study(methods, (None, 8.0, 3.0, 1.0), (2.5e-3, 1e-2, 4e-2), (0, 1, 2, 3, 4), 100, tables)


def more_notes() -> Study:
    """The same with 10,000 rows a hospital, which the same code writes, and steps of 256."""
    demo.TRAIN_NOTES = 10_000
    study = notes()
    training = {"max_steps": 8, "per_device_train_batch_size": 256, "per_device_eval_batch_size": 200}
    tables = {**study.tables, "privacy": {"rows": 10_000}, "training": training}
    return replace(study, tables=tables, rates=(1e-2, 3e-2, 1e-1), delta=1e-5)


def sst2(data: Path, model: Path) -> Study:
    """SST-2 by MiniLM: three clients with rows at random, 22,000 rows a client, 16 steps of 128 a round."""
    tables = {
        "rounds": 4,
        "base": {"model": str(model)},
        "task": {"name": "glue/sst2", "data": str(data), "train_rows": 66_000, "eval_rows": 872, "max_length": 64},
        "lora": {"r": 2, "alpha": 4, "target_modules": ["query", "value"]},
        "clients": {"count": 3, "holdout": 0},
        "privacy": {"rows": 22_000},
        "training": {
            "max_steps": 16,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 8,
            "per_device_eval_batch_size": 128,
        },
    }
    plain = {"train_sampling_strategy": "group_by_length"}
    return Study(("ffa", "fedex"), (None, 8.0, 1.0), (6e-3, 2e-2, 6e-2), (0, 1, 2), 100, tables, plain, delta=1e-5)


def accuracy(study: Study, method: str, epsilon: float | None, rate: float, seed: int) -> float:
    """The mean accuracy of the global model after the last rounds of a run."""
    tables = {**study.tables, "method": method, "seed": seed, "torch_threads": 1, "keep_rounds": 2}
    tables["training"] = {**tables["training"], "learning_rate": rate, **({} if epsilon else study.plain)}
    with tempfile.TemporaryDirectory(prefix="fedex-lora-private-") as folder:
        ledger = Path(folder) / "ledger.jsonl"
        begin_ledger(ledger)
        private = {"epsilon": epsilon, "delta": study.delta, "ledger": str(ledger)} if epsilon else {}
        tables["privacy"] = {**tables["privacy"], **private} if epsilon else {}
        run(parse_config(tables), Path(folder) / "run", lambda event: None)
        done = of_kind(read_events(Path(folder) / "run" / "events.jsonl"), RoundDone)
    return float(np.mean([event.metrics[study.headline] for event in done[-LAST:]]))


def cells(study: Study) -> Iterator[tuple[str, float | None]]:
    """All of the table."""
    return ((method, epsilon) for epsilon in study.epsilons for method in study.methods)


class Records:
    """A line a run, appended as it ends."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found = {self.key(line): line["accuracy"] for line in map(json.loads, lines)}

    @staticmethod
    def key(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["method"], line["epsilon"], line["rate"], line["seed"]

    def of(self, study: Study, method: str, epsilon: float | None, rate: float, seed: int) -> float:
        """As it was, or run now."""
        line: dict[str, Any] = {"method": method, "epsilon": epsilon, "rate": rate, "seed": seed}
        if self.key(line) not in self.found:
            line["accuracy"] = self.found[self.key(line)] = accuracy(study, method, epsilon, rate, seed)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        return self.found[self.key(line)]


def table(study: Study, records: Records) -> str:
    """Mean and standard deviation over seeds, and the rate; those at an end of the grid are marked."""
    lines = ["| epsilon | " + " | ".join(study.methods) + " |", "|---|" + "---|" * len(study.methods)]
    for epsilon in study.epsilons:
        row = []
        for method in study.methods:
            rate = best_rate(study, records, method, epsilon)
            values = [records.of(study, method, epsilon, rate, seed) for seed in study.seeds]
            edge = " (edge)" if rate in (study.rates[0], study.rates[-1]) else ""
            row.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} at {rate:g}{edge}")
        lines.append(f"| {'none' if epsilon is None else f'{epsilon:g}'} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def best_rate(study: Study, records: Records, method: str, epsilon: float | None) -> float:
    """Of the grid, on the tuning seed."""
    return max(study.rates, key=lambda rate: records.of(study, method, epsilon, rate, study.tuning_seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["notes", "more-notes", "sst2"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="sst2: the folder of GLUE's files")
    parser.add_argument("--model", type=Path, help="sst2: the folder of MiniLM")
    parser.add_argument("--table", action="store_true", help="print the table at the end; runs that are not there yet are made")
    given = parser.parse_args()
    silence_libraries()
    own = {"notes": notes, "more-notes": more_notes}
    study = own[given.study]() if given.study in own else sst2(given.data, given.model)
    records = Records(given.out / "records.jsonl")
    for method, epsilon in cells(study):
        rate = best_rate(study, records, method, epsilon)
        for seed in study.seeds:
            records.of(study, method, epsilon, rate, seed)
    if given.table:
        print(table(study, records))


if __name__ == "__main__":
    main()
