"""Trainer arguments, and what is refused of them; whether a model and its rows fit."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments

from fedex_lora.client.trainers import FORCED, PartyTrainer, with_columns
from fedex_lora.config import IMAGES, Config, is_ours, nearest
from fedex_lora.errors import ConfigError
from fedex_lora.tasks import Task
from fedex_lora.tasks._files import Rows


def without_trainer(config: Config) -> Config:
    """The same for our own trainer: without `local.trainer` and what only its arguments know."""
    if config.local.trainer is None:
        return config
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    training = {key: value for key, value in config.training.items() if key in known}
    return config.model_copy(update={"local": config.local.model_copy(update={"trainer": None}), "training": training})


def training_arguments(config: Config, output: str = "unused", seed: int = 0, own: PartyTrainer | None = None) -> TrainingArguments:
    """`transformers.TrainingArguments` from `[training]`, with what is ours set by us, for one device (see `spare_devices`).

    Args:
        config: the run.
        output: a folder for whatever is written.
        seed: of dropout and of the order of rows.
        own: the party's trainer, which may have arguments of its own kind; None: those of ours, and what only others know is left out.

    Raises:
        ConfigError: an unknown field (the nearest is named), or a value that transformers refuses.
    """
    kind, config = own.arguments if own else TrainingArguments, config if own else without_trainer(config)
    fields = [field.name for field in dataclasses.fields(kind)]
    for key, value in config.training.items():
        if key not in fields:
            near = nearest(key, [field for field in fields if not is_ours(field)])
            known = "transformers.TrainingArguments" if kind is TrainingArguments else f"trl.{kind.__name__}"
            raise ConfigError(f"unknown key training.{key}" + (f": did you mean training.{near}?" if near else f": see {known}"))
        if own and key in own.refused:
            raise ConfigError(f"training.{key} is not for {own.name}, for {own.refused[key]}: remove it")
        _require_sensible(key, value, kind)
    length = config.training.get("max_length") if own else None
    if length is not None and length < config.task.length and config.training.get("packing_strategy") != "wrapped":
        raise ConfigError(
            f"training.max_length = {length} would cut or drop rows that count in the mean, and say nothing: set task.max_length = {length}"
        )
    ours: dict[str, Any] = {**FORCED, "output_dir": output, "seed": seed}
    defaults = {"dataloader_pin_memory": torch.cuda.is_available(), "use_cpu": torch.backends.mps.is_available()}
    defaults |= own.defaults(config) if own else {}
    if config.task.kind == IMAGES:
        ours["remove_unused_columns"] = False  # the model does not know the column `image`; the collator does
    try:
        arguments = kind(**{**defaults, **config.training, **ours})
    except (ValueError, TypeError, ImportError) as error:
        hint = " (on a CPU also set training.use_cpu = true)" if "use_cpu" in str(error) else ""
        raise ConfigError(f"[training] is refused by transformers: {str(error).splitlines()[0]}{hint}") from None
    require_device(arguments.device.type)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or Trainer would wrap the model in DataParallel, whose batches are so many times as large
    return arguments


def require_device(device: str) -> None:
    """No Apple GPU, which has no fp64 and on which nothing was ever measured: where there is one, the CPU is used unless it is asked for.

    Raises:
        ConfigError: the device is one of them.
    """
    if device == "mps":
        raise ConfigError("an Apple GPU (mps) has no fp64, and nothing was measured on one: set training.use_cpu = true")


def spare_devices(config: Config) -> str:
    """What to say where this process sees GPUs that it does not use; "" where there is none."""
    count = 0 if training_arguments(config).device.type == "cpu" else torch.cuda.device_count()
    if count < 2:
        return ""
    return f"one of {count} GPUs is used, for a batch shared among them would be another batch: choose it by CUDA_VISIBLE_DEVICES"


def _require_sensible(key: str, value: Any, kind: type[TrainingArguments]) -> None:
    """The right kind of value, finite, and positive where it must be: transformers would say so in the middle of a round only."""
    field = next(field for field in dataclasses.fields(kind) if field.name == key)
    number, whole = isinstance(field.default, int | float) and not isinstance(field.default, bool), field.type in (int, "int")
    if number and (not isinstance(value, int if whole else int | float) or isinstance(value, bool) or not math.isfinite(value)):
        raise ConfigError(f"training.{key} = {value!r}: give a {'whole' if whole else 'finite'} number")
    positive = key in ("learning_rate", "num_train_epochs", "gradient_accumulation_steps") or "batch_size" in key
    if number and ((positive and value <= 0) or (key == "max_steps" and value == 0)):  # -1 is transformers' word for unset
        raise ConfigError(f"training.{key} = {value!r}: it must be greater than zero")


@dataclass(frozen=True, eq=False)
class TrainingContext:
    """What every client of a run shares: settings, task, tokenizer or image processor, and a trainer that is not ours."""

    config: Config
    task: Task
    processor: Any
    trainer: PartyTrainer | None = None

    def tokens(self, rows: Rows) -> Dataset:
        """Rows tokenised; for a trainer that is not ours with their own columns beside."""
        made = self.task.tokenize(self.processor, rows)
        return with_columns(made, rows) if self.trainer else made
