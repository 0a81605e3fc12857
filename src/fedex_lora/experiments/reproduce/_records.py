"""A run's numbers as one small JSON file, which tables are made from; written when the run ends."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from pydantic import BaseModel, ValidationError

from fedex_lora.config import DEMO, Config, read_config, write_config
from fedex_lora.errors import StorageError, TrainingError
from fedex_lora.evaluation import Options, evaluate_source
from fedex_lora.exactness import measure
from fedex_lora.experiments.reproduce._recipe import Cell, identity
from fedex_lora.runs.run import run
from fedex_lora.storage.events import finite_json, read_events
from fedex_lora.storage.files import write_text
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import remove, run_rounds_of, strays
from fedex_lora.tasks import Task, load_task
from fedex_lora.types import Aggregate

RUNS, WORK = "runs", "work"
FACTS = (
    "task",
    "headline",
    "clients",
    "train_rows",
    "trainable_parameters",
    "total_parameters",
    "base_bytes",
    "base_fingerprint",
    "torch_threads",
    "versions",
)
SENT = ("bytes_down", "bytes_up")
ROUND = ("round", "metrics", "exactness_error", "realised_error", "floor", "deviation", *SENT, "seconds")


@dataclass(frozen=True)
class ModelContext:
    """Where things are on this machine.

    Attributes:
        out: records in `out/runs`; an unfinished run in `out/work`.
        data: the folder of all data; None: the hub.
        model: a local folder of the base that the recipe names, or of folders that are named like the bases; None: the hub.
    """

    out: Path
    data: Path | None = None
    model: Path | None = None

    def localised(self, cell: Cell) -> Config:
        """The run with this machine's folders."""
        task, base = cell.config.task, cell.config.base
        if self.data is not None and cell.folder:
            task = task.model_copy(update={"data": self.data / cell.folder})
        if self.model is not None and base.model != DEMO:
            one_of_many = self.model / base.model.rpartition("/")[2]
            base = base.model_copy(update={"model": str(one_of_many if one_of_many.is_dir() else self.model)})
        return cell.config.model_copy(update={"task": task, "base": base})


def find_record(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The record of a cell's run, if it has ended.

    Raises:
        StorageError: the file is broken.
    """
    path = out / RUNS / f"{cell.name}.json"
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        raise StorageError(f"{path} is broken: remove it, and the run is done again") from None
    if not _is_record(found, cell.config):
        raise StorageError(f"{path} is no record of the run that its name says: remove it, and the run is done again")
    return found


Metrics: TypeAlias = dict[str, float | None]


class _Modules(BaseModel):
    module: list[str] = []
    deviation: list[float | None] = []  # null is a number that was not finite
    ideal: list[float | None] = []
    scaled: list[float | None] = []


class _Round(BaseModel):
    round: int
    metrics: Metrics
    bytes_down: int
    bytes_up: int
    seconds: float
    modules: _Modules


class _Final(BaseModel):
    bytes_down: int
    bytes_up: int


class _Facts(BaseModel):
    headline: str
    train_rows: dict[str, int]
    trainable_parameters: int
    base_bytes: int


class _Record(BaseModel):
    """What tables read of a run that ended well."""

    config: dict[str, Any]
    facts: _Facts
    rounds: list[_Round]
    final: _Final | None = None  # records of older versions have none
    held_out: dict[int, Metrics]
    tests: dict[str, Metrics] = {}


class _Failure(BaseModel):
    config: dict[str, Any]
    failed: str


def _is_record(found: Any, config: Config) -> bool:
    """Does it have what tables read, and the settings that its name stands for?"""
    failed = isinstance(found, dict) and "failed" in found
    try:
        record = (_Failure if failed else _Record).model_validate(found)
    except ValidationError:
        return False
    if record.config != identity(config):
        return False
    return isinstance(record, _Failure) or (
        [one.round for one in record.rounds] == list(range(1, config.rounds + 1))
        and all(record.facts.headline in one.metrics for one in record.rounds)
        and all(len({len(column) for column in one.modules.model_dump().values()}) == 1 for one in record.rounds)
    )


def make_record(place: ModelContext, cell: Cell, tests: Sequence[str] = (), generation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run a cell, or go on with it, and write its record. Training that fails is a result too.

    Args:
        place: where.
        cell: the run.
        tests: tasks whose test rows the final model answers in writing.
        generation: how, over the tasks' settings.

    Raises:
        FedexLoraError: whatever stops a run but training itself.
    """
    folder, config = place.out / WORK / cell.name, place.localised(cell)
    asked = {test: config.task.model_copy(update={"name": test, "train": ""}) for test in tests}  # no training rows are needed
    for settings in asked.values():
        if (generated := load_task(settings, cell.seed).generation) is not None:
            generated.require()
    _move(folder, config)
    _on_the_same_rows(folder, load_task(config.task, config.seed))
    try:
        run(config, folder, lambda event, **fields: None, resume=True)
    except TrainingError as error:
        record: dict[str, Any] = {"config": identity(cell.config), "failed": str(error)}
    else:
        options = Options(base=config.base.source, batch_size=config.training.get("per_device_eval_batch_size", 8), generation=generation)
        written = {test: _short(evaluate_source(str(folder), settings, options, cell.seed)) for test, settings in asked.items()}
        record = {"config": identity(cell.config), **recorded(read_events(folder / "events.jsonl"), folder), "tests": written}
    write_text(place.out / RUNS / f"{cell.name}.json", finite_json(record) + "\n")
    if folder.is_dir() and not strays(folder):
        remove(folder)
    folder.with_name(f"{folder.name}.rows").unlink(missing_ok=True)
    return record


def _move(folder: Path, config: Config) -> None:
    """Let an unfinished run go on where data and base may lie in another folder."""
    path = folder / "config.toml"
    if not path.is_file():
        return
    there = read_config(path)
    task = there.task.model_copy(update={"data": config.task.data})
    base = there.base.model_copy(update={"model": config.base.model})
    if there != config and there.model_copy(update={"task": task, "base": base}) == config:
        write_text(path, write_config(config))


def _on_the_same_rows(folder: Path, task: Task) -> None:
    """Begin a run anew that was begun on other rows."""
    note = folder.with_name(f"{folder.name}.rows")
    rows = hashlib.sha256()
    for frame in (task.train, task.eval):
        rows.update(pd.util.hash_pandas_object(frame.astype(str), index=False).to_numpy().tobytes())
    if folder.exists() and not (note.is_file() and note.read_text(encoding="utf-8") == rows.hexdigest()):
        remove(folder)
    write_text(note, rows.hexdigest())


def recorded(events: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """What a table can ask of a run: its facts, for every round metrics, errors, bytes, and the deviation of every module, and the bytes of
    the message that brings the final model to all clients.
    """
    started = next(event for event in events if event["event"] == "started")
    rounds = [event for event in events if event["event"] == "round_done"]
    final = [event for event in events if event["event"] == "evaluated"][-1]
    modules = {int(path.name): deviations(path) for path in run_rounds_of(folder)}
    return {
        "facts": {name: started[name] for name in FACTS},
        "before": _short(started["metrics"]),
        "rounds": [
            {name: _short(event[name]) for name in ROUND if name in event} | {"modules": modules.get(event["round"], {})}
            for event in rounds
        ],
        "final": {name: final[name] for name in SENT},
        "held_out": {str(event["round"]): _short(event["metrics"]) for event in events if event["event"] == "held_out"},
    }


def deviations(folder: Path) -> dict[str, list[Any]]:
    """A round's deviation of plain averaging from the ideal as columns, a row a module; nothing without adapters.

    Returns:
        `module`; `deviation` |s Bbar Abar - M| and `ideal` |M| (Frobenius); `scaled`, the deviation divided by sqrt(out in).
    """
    result = read_result(folder)
    if not result.updates or not result.adapter:
        return {}
    given = Aggregate(result.updates[0].adapter, {}, {}, result.weights, str(result.manifest["method"]))
    found = measure.deviation(given, result.updates)
    names = sorted(found.error)
    entries = {name: math.sqrt(math.prod(result.adapter[name].shape)) for name in names}
    return {
        "module": names,
        "deviation": [_short(found.error[name]) for name in names],
        "ideal": [_short(found.ideal[name]) for name in names],
        "scaled": [_short(found.error[name] / entries[name]) for name in names],
    }


def _short(value: Any) -> Any:
    """Six significant digits of every decimal."""
    if isinstance(value, Mapping):
        return {name: _short(one) for name, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value
