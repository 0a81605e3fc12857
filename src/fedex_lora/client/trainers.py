"""A trainer of the party's own in the place of ours: found by its name, called, held to what it may change."""

import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, Features, Json, concatenate_datasets
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fedex_lora.client.guard import Guard
from fedex_lora.config import Config, nearest, trainer_parts
from fedex_lora.errors import ConfigError, FedexLoraError, TrainingError, require_extra
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.protocol.failures import told_to_end
from fedex_lora.types import Adapter, Delta

TrainerFunction: TypeAlias = Callable[[nn.Module, Dataset, Any, Any], Trainer]
"""(model, rows, processor, arguments) -> a Trainer of this model."""
CODE = "trainer"  # of `protocol.failures.WORDS`
REFERENCE = "reference.safetensors"  # beside a client's memory
FORCED: Mapping[str, Any] = {
    "save_strategy": "no",
    "save_total_limit": None,
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "report_to": [],
    "logging_strategy": "no",
    "logging_nan_inf_filter": False,  # or a NaN would not show in the loss
    "eval_strategy": "no",
    "eval_on_start": False,
    "do_eval": False,
    "disable_tqdm": True,
    "resume_from_checkpoint": None,
}
REPLACED = ("label", "label_ids", "labels", "input_ids", "attention_mask")  # Trainer would take such columns for what it trains on


@dataclass(frozen=True, eq=False)
class Place:
    """Where a party trains.

    Attributes:
        base: under its model.
        file: in which its own reference is kept; None: nowhere.
        first, other, gained: the adapter, the other trained tensors and the base delta of the run's start, where it starts from a result.
        tell: (level of `logging`, words) what only the party itself may read of its training.
    """

    base: FrozenBase
    file: Path | None = None
    first: Adapter = field(default_factory=dict)
    other: Mapping[str, Tensor] = field(default_factory=dict)
    gained: Mapping[str, Delta] = field(default_factory=dict)
    tell: Callable[[int, str], None] = getLogger(__name__).log


@dataclass(frozen=True, eq=False)
class PartyTrainer:
    """What a party trains with.

    Attributes:
        name: as the configuration has it.
        make: the function.
        arguments: the class of what it is given as `arguments`; its fields are those of `[training]`.
        defaults: of `arguments`, where the configuration says nothing.
        refused: fields that would change rows, model or tokenizer -> why.
        check: says what is wrong with a client's rows, before anything is trained.
        finish: what the trainer needs of its place beside model and rows, before it trains.
    """

    name: str
    make: TrainerFunction
    arguments: type[TrainingArguments] = TrainingArguments
    defaults: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    refused: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Dataset], None] = lambda rows: None
    finish: Callable[[Trainer, Place | None], None] = lambda trainer, place: None


def find_trainer(name: str | None) -> PartyTrainer | None:
    """The trainer of `local.trainer`; None for ours.

    Args:
        name: `[FOLDER/]package.module:function`, or one of TRL's.

    Raises:
        ConfigError: there is no such module or function, or it is none that takes (model, rows, processor, arguments).
        UsageError: TRL is not installed.
    """
    if name is None:
        return None
    folder, module, function = trainer_parts(name)
    if (folder, module) == ("", "trl"):
        require_extra("trl", "trl", "trainers of TRL")
        from fedex_lora.client.trl_trainers import TRL

        return _named(TRL, function, name, "here trl has")
    found = _imported(folder, module, name)
    make = _named(vars(found), function, name, f"{module} has")
    try:
        inspect.signature(make).bind(None, None, None, None)
    except TypeError as error:
        raise ConfigError(f"local.trainer = {name!r}: {error}: it must take (model, rows, processor, arguments)", CODE) from None
    except ValueError:  # compiled: it is seen when it is called
        pass
    return PartyTrainer(name, make)


def _named(known: Mapping[str, Any], function: str, name: str, who: str) -> Any:
    functions = [key for key, value in known.items() if not key.startswith("_") and (callable(value) or isinstance(value, PartyTrainer))]
    if function not in known:
        near = nearest(function, functions)
        hint = f"did you mean {near}?" if near else f"{who} {', '.join(functions) or 'no functions'}"
        raise ConfigError(f"local.trainer = {name!r}: there is no {function}: {hint}", CODE)
    if function not in functions:
        raise ConfigError(f"local.trainer = {name!r}: {function} is a {type(known[function]).__name__}: name a function", CODE)
    return known[function]


def _imported(folder: str, module: str, name: str) -> ModuleType:
    """The module, from its folder where it has one; folders are looked into last, so that none of their files hides a package."""
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        importlib.invalidate_caches()
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            where = f"in {folder}" if folder else "beside the configuration, in the working folder or installed"
            raise ConfigError(f"local.trainer = {name!r}: there is no module {module} {where}", CODE) from None
        raise ConfigError(f"local.trainer = {name!r}: {module} cannot be imported: {_told(error)}", CODE) from error
    origin = Path(found.__file__ or "").resolve()
    if folder and Path(folder).resolve() not in origin.parents:
        raise ConfigError(f"local.trainer = {name!r}: another module is called {module} ({origin}): rename yours", CODE)
    return found


def _told(error: BaseException) -> str:
    """An error of somebody else's code in one line, with the last place in that code."""
    lines, frames = str(error).strip().splitlines(), traceback.extract_tb(error.__traceback__)
    libraries = ("<frozen", *sysconfig.get_paths().values(), str(Path(__file__).parents[1]))
    last = next((frame for frame in reversed(frames) if not frame.filename.startswith(libraries)), frames[-1] if frames else None)
    where = f" ({Path(last.filename).name}, line {last.lineno})" if last else ""
    return f"{type(error).__name__}{': ' + lines[0][:200] if lines else ''}{where}"


@contextmanager
def trainer_of_party(
    own: PartyTrainer, model: nn.Module, rows: Dataset, processor: Any, arguments: TrainingArguments, place: Place | None
) -> Iterator[Trainer]:
    """The party's Trainer on the model, with what is ours set by us; when this ends the model is as it was, but for what is trained.

    Raises:
        ConfigError: the function raises, or gives no Trainer of this model.
        TrainingError: what it may not change has changed, or its training raised; then the model is not to be used again.
    """
    guard, kept = Guard(model), dict(vars(arguments))
    try:
        trainer = own.make(model, rows, deepcopy(processor), arguments)
    except FedexLoraError:
        raise
    except (Exception, SystemExit) as error:
        if told_to_end(error):
            raise
        raise ConfigError(f"local.trainer = {own.name!r} raised {_told(error)}", CODE) from error
    if not isinstance(trainer, Trainer):
        raise ConfigError(
            f"local.trainer = {own.name!r} returned a {type(trainer).__name__}: return a transformers.Trainer of its model",
            CODE,
        )
    if trainer.model is not model:
        raise ConfigError(f"local.trainer = {own.name!r} returned a Trainer of another model: give it the model that it is given", CODE)
    try:
        _force(trainer, kept)
        own.finish(trainer, place)
        _refuse(own, guard.begin())
        yield trainer
        _refuse(own, guard.end(trainer.model))
    except FedexLoraError:
        raise
    except (Exception, SystemExit) as error:
        if told_to_end(error):
            raise
        code = "memory" if isinstance(error, MemoryError | torch.OutOfMemoryError) else CODE
        raise TrainingError(f"local.trainer = {own.name!r} raised {_told(error)}", code) from error


def _refuse(own: PartyTrainer, changed: str) -> None:
    if changed:
        raise TrainingError(f"local.trainer = {own.name!r} {changed}: nothing is sent; train the adapter of this model only", CODE)


def _force(trainer: Trainer, given: Mapping[str, Any]) -> None:
    """Seeds, output, reporting and saving are ours, whatever arguments the function made of those that it was given."""
    for key in ("seed", "data_seed", "output_dir", "_n_gpu"):
        if key in given:
            setattr(trainer.args, key, given[key])
    for key, value in FORCED.items():
        setattr(trainer.args, key, value)
    for reporter in (ProgressCallback, *INTEGRATION_TO_CALLBACK.values()):
        trainer.remove_callback(reporter)


def with_columns(tokens: Dataset, rows: pd.DataFrame) -> Dataset:
    """Tokenised rows, and beside them the columns that they were made of.

    Nested objects (messages, tool calls) come back with the keys that each had, whatever others have; fractions in them with ten decimals.
    Columns of encoded images and sounds are left out: the processor has read the one that is trained on.
    """
    names = [name for name in map(str, rows.columns) if name not in (*tokens.column_names, *REPLACED)]
    beside = [tokens]
    for name in names:
        values = [_plain(value) for value in rows[name]]
        if any(map(_holds_bytes, values)):
            continue
        nested = any(isinstance(value, list | dict) for value in values)
        beside.append(Dataset.from_dict({name: values}, Features({name: Json()}) if nested else None, on_mixed_types="use_json"))
    return concatenate_datasets(beside, axis=1)


def _holds_bytes(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, bytes) or any(map(_holds_bytes, inner))


def _plain(value: Any) -> Any:
    """A cell without pandas' and NumPy's kinds (parquet gives arrays); None where it is empty."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or value is pd.NA or value != value:
        return None
    return value.item() if isinstance(value, np.generic) else value
