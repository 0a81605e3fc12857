"""`fedex_lora.run`: a federation in this process, on rows, a model and metrics that are here already."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, TypeAlias

import pandas as pd
from datasets import Dataset
from torch import nn
from transformers import EvalPrediction, PreTrainedModel

from fedex_lora.config import Config, TaskSettings, parse_config, read_config
from fedex_lora.errors import ConfigError, UsageError, require_system
from fedex_lora.models import export as exporting
from fedex_lora.models.build import load_model
from fedex_lora.report.analysis import clients, read_run, rounds
from fedex_lora.runs import run as running
from fedex_lora.runs.emit import Emit, log_line
from fedex_lora.storage.events import Event, RoundDone, RunDone, of_kind
from fedex_lora.storage.run_folder import folder_after
from fedex_lora.tasks import Task, custom, load_task
from fedex_lora.tasks._files import Rows, as_text
from fedex_lora.types import ServerState

Table: TypeAlias = Dataset | pd.DataFrame | Sequence[Mapping[str, Any]]
EVAL = "eval"


class RunResult:
    """A run that is done.

    Attributes:
        folder: its run folder, for `fedex-lora verify`, `report` and `export`. Without `out` it goes when this object does: see `save`.
        state: of the server after the last round: the global adapter, the base delta, the other trained tensors.
        events: what happened.
        metrics: a row a round: metrics, errors, bytes, seconds.
        clients: a row a client and round.
        best_round: the one that did best on the clients' held-out rows; None where not every client measured every round.

    Example: see `fedex_lora.run`, which gives one.
    """

    def __init__(self, folder: Path, state: ServerState, model: PreTrainedModel | None, mine: TemporaryDirectory[str] | None) -> None:
        self.folder, self.state, self._model, self._mine = folder, state, model, mine
        self.events: Sequence[Event] = read_run(folder).events
        self.metrics: pd.DataFrame = rounds(self.events)
        self.clients: pd.DataFrame = clients(self.events)
        self.best_round: int | None = of_kind(self.events, RunDone)[-1].best_round

    def __repr__(self) -> str:
        last = self.metrics.iloc[-1]
        said = [f"{name} {last[name]:.3g}" for name in (self._headline, "exactness_error") if name in last and pd.notna(last[name])]
        odd = [str(event.round) for event in of_kind(self.events, RoundDone) if event.not_finite]
        said += [f"errors of round {', '.join(odd)} not finite"] if odd else []
        return f"<{self.state.method}: {self.state.round} rounds, {', '.join(said)}, {str(self.folder)!r}>"

    @property
    def _headline(self) -> str:
        return read_run(self.folder).started.headline

    def model(self, round: int | str | None = None) -> nn.Module:
        """The global model, a `PeftModel` in evaluation mode (of full fine-tuning the model itself).

        Args:
            round: after which round; "best" for `best_round`; by default the last.

        Raises:
            UsageError: that round's folder is not there.
        """
        return load_model(folder_after(self.folder, round), deepcopy(self._model) if self._model is not None else self._base)

    @property
    def _base(self) -> str:
        return str(read_run(self.folder).started.base_model)

    def save(self, out: str | Path) -> Path:
        """Copy the run folder.

        Args:
            out: must not exist.

        Raises:
            UsageError: it exists.
        """
        target = Path(out)
        if target.exists():
            raise UsageError(f"{target} exists: give another folder")
        aside = Path(mkdtemp(prefix=".fedex-lora-tmp.", dir=target.absolute().parent))
        shutil.copytree(self.folder, aside, dirs_exist_ok=True).rename(target)
        return target

    def export(self, out: str | Path, form: str = "merged", round: int | str | None = None, **options: Any) -> dict[str, Any]:
        """Write the model for others, and compare its logits with the run's.

        Args:
            out: must not exist, or be empty.
            form: "merged", "adapter" or "base+adapter"; see `fedex-lora export`.
            round: see `model`.
            options: `rank`, to cut the adapter; `dtype` and `shard`.

        Raises:
            UsageError, ModelError: see `fedex-lora export`; a base that was given in memory must be on disk, too.
        """
        if self._model is not None and not Path(self._base).exists():
            raise UsageError("an export reads the base from disk: save the model, with its tokenizer, and give its folder by base=")
        return exporting.export(folder_after(self.folder, round), form, Path(out), **options)


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
        eval: the rows that only measure, with `rows`.
        model: the base, with its head; it stays as it is. None: `base.model`.
        processor: the model's tokenizer or image processor; None: that of `base.model`.
        metrics: `EvalPrediction` -> name -> number, beside the task's own. A causal LM's predictions are token ids.
        on_event: told of everything that happens (`fedex_lora.storage.events`); None: a line a round on standard error.
        out: the run folder; None: a temporary one, see `RunResult.save`.
        resume: go on with what `out` holds.

    Raises:
        FedexLoraError: whatever is wrong with settings, rows or model, before anything is written; or training failed.

    Example:
        >>> result = run({"base": {"model": "demo"}, "task": {"name": "demo", "train_rows": 30, "eval_rows": 9}, "rounds": 1},
        ...              on_event=lambda event: None)
        >>> result.state.round, bool(result.metrics["exactness_error"].max() < 1e-6)
        (1, True)
    """
    require_system()
    if resume and out is None:
        raise UsageError("resume goes on with a run folder: give out, too")
    settings = _settings(config, rows, eval, model)
    tables = {} if rows is None else {name: _frame(table) for name, table in {**rows, EVAL: eval}.items()}
    load = partial(_task, tables) if tables else load_task
    given = running.Given(load, model, processor, metrics)
    mine = TemporaryDirectory(prefix="fedex-lora-") if out is None else None
    folder = Path(out) if out is not None else Path(mine.name if mine else "") / "run"
    state = running.run(settings, folder, on_event or _say, resume, lambda config, emit: running.LocalSimulation(config, emit, given))
    return RunResult(folder, state, model, mine)


def _settings(config: Config | Mapping[str, Any] | str | Path, rows: Any, held: Any, model: PreTrainedModel | None) -> Config:
    if isinstance(config, str | Path):
        config = read_config(Path(config))
    tree: dict[str, Any] = dict(config.model_dump(exclude_unset=True)) if isinstance(config, Config) else dict(config)
    if model is not None:
        tree["base"] = {"model": model.config._name_or_path or type(model).__name__, **tree.get("base", {})}
    if (rows is None) is not (held is None):
        raise UsageError("give rows and eval together: rows to learn from, a table for each client, and rows that only measure")
    if rows is not None:
        if EVAL in rows or not rows:
            raise UsageError(f"rows: give a table for each client, and call none {EVAL!r}")
        tree["task"] = {"name": "custom", **tree.get("task", {}), "eval": EVAL}
        tree["clients"] = {**tree.get("clients", {}), "data": {name: name for name in rows}}
    return parse_config(tree)


def _frame(table: Any) -> Rows:
    """Rows as a file would have them."""
    if isinstance(table, Dataset):
        table = table.to_list()
    if isinstance(table, pd.DataFrame):
        table = table.to_dict(orient="records")
    if not isinstance(table, Sequence) or not all(isinstance(row, Mapping) for row in table):
        raise ConfigError("rows: give a datasets.Dataset, a data frame or a list of dictionaries for each client")
    if not table:
        raise UsageError("rows: a table is empty: give every client some, and eval, too")
    made = as_text(pd.DataFrame({name: [row.get(name) for row in table] for name in table[0]}, dtype=object))
    return made.set_axis(range(1, len(made) + 1))


def _task(tables: Mapping[str, Rows], settings: TaskSettings, seed: int) -> Task:
    """Of the tables that the settings name."""
    return custom.load(settings, lambda source, _: tables[source]).limited(settings.train_rows, settings.eval_rows, seed)


def _say(event: Event) -> None:
    if line := log_line(event):
        print(line[1], file=sys.stderr)
