"""`fedex_lora.run`: a federation in this process, on rows, a model and metrics that are here already."""

import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import pandas as pd
import torch
from datasets import Dataset
from pydantic import BaseModel
from torch import nn
from transformers import EvalPrediction, PreTrainedModel

from fedex_lora.config import MEMORY, Config, TaskSettings, parse_config, read_config
from fedex_lora.errors import ConfigError, DataError, UsageError, counted, require_system, require_versions
from fedex_lora.models import export as exporting
from fedex_lora.models.build import load_model
from fedex_lora.models.pristine import cached_folder
from fedex_lora.report.analysis import clients, read_run, rounds
from fedex_lora.runs import run as running
from fedex_lora.runs import simulation
from fedex_lora.runs.emit import Emit, log_line
from fedex_lora.storage.events import Event, RoundDone, RunDone, of_kind
from fedex_lora.storage.files import copy_whole
from fedex_lora.storage.run_folder import folder_after
from fedex_lora.tasks import Task, custom, load_task
from fedex_lora.tasks._files import Rows, as_text
from fedex_lora.tasks._rows import each
from fedex_lora.types import ServerState

Table: TypeAlias = Dataset | pd.DataFrame | Sequence[Mapping[str, Any]]
EVAL = "eval"
DEALT = {"task": ("train",), "clients": ("partition", "column", "count", "data", "dirichlet_alpha")}
"""Keys of the tables that say whose rows are which: with rows that are given by client they say nothing."""


class RunResult:
    """A run that is done.

    Attributes:
        folder: its run folder, for `fedex-lora verify`, `report` and `export`. Without `out` it goes when this object does: see `save`.
        state: of the server after the last round: the global adapter, the base delta, the other trained tensors.
        events: what happened.
        metrics: a row a round: metrics, errors, bytes, seconds.
        clients: a row a client and round.
        best_round: the best on the clients' held-out rows; None where not every client measured every round, or no number is finite.

    Example: see `fedex_lora.run`, which gives one.
    """

    def __init__(self, folder: Path, state: ServerState, given: simulation.Given, mine: TemporaryDirectory[str] | None) -> None:
        self.folder, self.state, self._model, self._processor, self._mine = folder, state, given.model, given.processor, mine
        read = read_run(folder)
        self.events: Sequence[Event] = read.events
        self._headline, self._base = read.started.headline, str(read.started.base_model)
        self.metrics: pd.DataFrame = rounds(self.events)
        self.clients: pd.DataFrame = clients(self.events)
        self.best_round: int | None = of_kind(self.events, RunDone)[-1].best_round

    def __repr__(self) -> str:
        last = self.metrics.iloc[-1]
        said = [f"{name} {last[name]:.3g}" for name in (self._headline, "exactness_error") if name in last and pd.notna(last[name])]
        odd = [str(event.round) for event in of_kind(self.events, RoundDone) if event.not_finite]
        said += [f"errors of round {', '.join(odd)} not finite"] if odd else []
        return f"<{self.state.method}: {', '.join([counted(self.state.round, 'round'), *said, repr(str(self.folder))])}>"

    def model(self, round: int | str | None = None) -> nn.Module:
        """The global model, a `PeftModel` in evaluation mode (of full fine-tuning the model itself).

        Args:
            round: after which round; "best" for `best_round`; by default the last.

        Raises:
            UsageError: no folder of that round, or no best one. ModelError: the method has no global model (fedsa).
        """
        return load_model(folder_after(self.folder, round), deepcopy(self._model) if self._model is not None else self._base)

    def save(self, out: str | Path) -> Path:
        """Copy the run folder.

        Args:
            out: must not exist; folders above it are made.

        Raises:
            UsageError: it exists.
        """
        target = Path(out)
        if target.exists():
            raise UsageError(f"{target} exists: give another folder")
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        copy_whole(self.folder, target.absolute())
        return target

    def export(self, out: str | Path, form: str = "merged", round: int | str | None = None, **options: Any) -> dict[str, Any]:
        """Write the model for others, with the tokenizer or image processor of the run, and compare its logits with the run's.

        Args:
            out: must not exist, or be empty.
            form: "merged", "adapter" or "base+adapter"; see `fedex-lora export`.
            round: see `model`.
            options: `rank`, to cut the adapter; `dtype` and `shard`, of what is written; `base`, where the base is now.

        Raises:
            UsageError, ModelError: see `fedex-lora export`; a base that was given in memory must be on disk, too.
        """
        if self._model is not None and "base" not in options and cached_folder(self._base) is None:
            raise UsageError("an export reads the base from disk: save the model, with its tokenizer, and give its folder by base=")
        if isinstance(dtype := options.get("dtype"), torch.dtype):
            options["dtype"] = str(dtype).removeprefix("torch.")
        return exporting.export(folder_after(self.folder, round), form, Path(out), processor=self._processor, **options)


def run(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    rows: Mapping[str, Table] | None = None,
    eval: Table | None = None,
    model: PreTrainedModel | None = None,
    processor: Any = None,
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    on_event: Emit | None = None,
    out: str | Path | None = None,
    resume: bool = False,
) -> RunResult:
    """Run a federation in this process; the same as `fedex-lora run`, to the bit.

    Args:
        config: a TOML file, or its tables as a dictionary.
        rows: client -> its training rows: a `datasets.Dataset`, a data frame or a list of dictionaries, with the columns of `[task]`.
            Then `task.name` is "custom", and `[clients]` deals nothing.
        eval: the evaluation set, with `rows`.
        model: the base, with its head: a `PreTrainedModel`, of a class of your own, too; it stays as it is. None: `base.model`.
        processor: the model's tokenizer or image processor; None: that of `base.model`.
        metrics: `EvalPrediction` -> name -> number, beside the task's own, under other names. A causal LM's predictions are token ids.
        on_event: told of everything that happens (`fedex_lora.storage.events`); None: lines on standard error. What it raises
            ends the run, and so does Ctrl-C: with `out`, what was done is kept.
        out: the run folder; None: a temporary one, see `RunResult.save`.
        resume: resume the run in `out` from its last whole round; begin it where there is none.

    Raises:
        FedexLoraError: whatever is wrong with settings, rows or model, before anything is written; or training failed.

    Example:
        >>> result = run({"base": {"model": "demo"}, "task": {"name": "demo", "train_rows": 30, "eval_rows": 9}, "rounds": 1},
        ...              on_event=lambda event: None)
        >>> result.state.round, bool(result.metrics["exactness_error"].max() < 1e-6)
        (1, True)
    """
    require_system()
    require_versions()
    if resume and out is None:
        raise UsageError("resume goes on with a run folder: give out, too")
    for name, given in (("metrics", metrics), ("on_event", on_event)):
        if given is not None and not callable(given):
            raise UsageError(f"{name} is of type {type(given).__name__}: give a function")
    settings = _settings(config, rows, eval, model, processor)
    tables = {} if rows is None else _tables({**rows, EVAL: eval})
    load = partial(_task, tables) if tables else load_task
    here = simulation.Given(load, model, processor, metrics)
    mine = TemporaryDirectory(prefix="fedex-lora-") if out is None else None
    folder = Path(out) if out is not None else Path(mine.name if mine else "") / "run"
    state = running.run(settings, folder, on_event or _say, resume, lambda config, emit: simulation.LocalSimulation(config, emit, here))
    return RunResult(folder, state, here, mine)


def _settings(config: Config | Mapping[str, Any] | str | Path, rows: Any, held: Any, model: Any, processor: Any) -> Config:
    if isinstance(config, str | Path):
        config = read_config(Path(config))
    if not isinstance(config, Config | Mapping):
        raise ConfigError(f"config is of type {type(config).__name__}: give a TOML file, or its tables as a dictionary")
    given = config.model_dump(exclude_unset=True) if isinstance(config, Config) else config
    tree = {key: table.model_dump(exclude_unset=True) if isinstance(table, BaseModel) else table for key, table in given.items()}
    if model is not None:
        tree["base"] = _base_of(model, processor, tree.get("base", {}))
    if (rows is None) is not (held is None):
        raise UsageError("give rows and eval together: rows to learn from, a table for each client, and an evaluation set")
    if rows is not None:
        if not isinstance(rows, Mapping) or not rows or EVAL in rows or not all(isinstance(name, str) and name.strip() for name in rows):
            raise UsageError(f"rows: give a table for each client by its name, a text that is not empty, and call none {EVAL!r}")
        task, clients = ({key: value for key, value in tree.get(table, {}).items() if key not in DEALT[table]} for table in DEALT)
        tree["task"] = {"name": "custom", **task, "eval": MEMORY + EVAL}
        tree["clients"] = {**clients, "data": {name: MEMORY + name for name in rows}}
    return parse_config(tree)


def _base_of(model: Any, processor: Any, base: Mapping[str, Any]) -> dict[str, Any]:
    """The table `[base]` of a model that is here: its name, and the precision that it has."""
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"model is of type {type(model).__name__}: give a transformers.PreTrainedModel (a class of your own may derive from it: "
            "docs/reference.md), or name it in base.model"
        )
    if not (name := base.get("model") or model.config._name_or_path) and processor is None:
        raise UsageError("the model does not say where its tokenizer is: give it by processor=, or its folder by base.model")
    dtype = str(model.dtype).removeprefix("torch.")
    if base.get("dtype", dtype) != dtype:
        raise UsageError(f"base.dtype = {base['dtype']!r}, and the model is in {dtype}: remove the key")
    return {**base, "model": name or type(model).__name__, "dtype": dtype}


def _tables(rows: Mapping[str, Any]) -> dict[str, Rows]:
    """Rows by the name of their table, as files would have them; what is wrong with each is said at once."""
    return dict(zip((MEMORY + name for name in rows), each(partial(_frame, name, table) for name, table in rows.items()), strict=True))


def _frame(name: str, table: Any) -> Rows:
    if isinstance(table, Dataset):
        table = table.to_list()
    if isinstance(table, pd.DataFrame):
        if twice := table.columns[table.columns.duplicated()].unique().tolist():
            raise DataError(f"rows: {name} has several columns called {', '.join(map(str, twice))}: rename or drop all but one", "table")
        table = table.to_dict(orient="records")
    if isinstance(table, str) or not isinstance(table, Sequence) or not all(isinstance(row, Mapping) for row in table):
        raise DataError(f"rows: {name} is no table: give a datasets.Dataset, a data frame or a list of dictionaries", "table")
    if not table:
        raise DataError(f"rows: a table is empty, {name}: give every client some, and eval, too", "no-rows")
    columns = dict.fromkeys(column for row in table for column in row)
    made = as_text(pd.DataFrame({column: [row.get(column) for row in table] for column in columns}, dtype=object))
    return made.set_axis(range(1, len(made) + 1))


def _task(tables: Mapping[str, Rows], settings: TaskSettings, seed: int) -> Task:
    """Of the tables that the settings name."""
    return custom.load(settings, lambda source, _: tables[source]).limited(settings.train_rows, settings.eval_rows, seed)


def _say(event: Event) -> None:
    if line := log_line(event):
        print(line[1], file=sys.stderr)
