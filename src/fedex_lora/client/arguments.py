"""Trainer arguments, and what is refused of them; whether a model and its rows fit."""

import dataclasses
import math
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainingArguments

from fedex_lora.client.training import Work, _trainer
from fedex_lora.config import IMAGES, Config, is_ours, nearest
from fedex_lora.errors import ConfigError, ModelError


def training_arguments(config: Config, output: str = "unused", seed: int = 0) -> TrainingArguments:
    """`transformers.TrainingArguments` from `[training]`, with what is ours set by us, for one device (see `spare_devices`).

    Raises:
        ConfigError: an unknown field (the nearest is named), or a value that transformers refuses.
    """
    fields = [field.name for field in dataclasses.fields(TrainingArguments)]
    for key in config.training:
        if key not in fields:
            near = nearest(key, [field for field in fields if not is_ours(field)])
            raise ConfigError(
                f"unknown key training.{key}" + (f": did you mean training.{near}?" if near else ": see transformers.TrainingArguments")
            )
    for key, value in config.training.items():
        _require_sensible(key, value)
    ours: dict[str, Any] = {
        "output_dir": output,
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # or a NaN would not show in the loss
        "eval_strategy": "no",
        "disable_tqdm": True,
    }
    defaults = {"dataloader_pin_memory": torch.cuda.is_available()}
    if config.task.kind == IMAGES:
        ours["remove_unused_columns"] = False  # the model does not know the column `image`; the collator does
    try:
        arguments = TrainingArguments(**{**defaults, **config.training, **ours})
    except (ValueError, TypeError, ImportError) as error:
        hint = " (on a CPU also set training.use_cpu = true)" if "use_cpu" in str(error) else ""
        raise ConfigError(f"[training] is refused by transformers: {str(error).splitlines()[0]}{hint}") from None
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or Trainer would wrap the model in DataParallel, whose batches are so many times as large
    return arguments


def spare_devices(config: Config) -> str:
    """What to say where this process sees GPUs that it does not use; "" where there is none."""
    count = 0 if training_arguments(config).device.type == "cpu" else torch.cuda.device_count()
    if count < 2:
        return ""
    return f"one of {count} GPUs is used, for a batch shared among them would be another batch: choose it by CUDA_VISIBLE_DEVICES"


def _require_sensible(key: str, value: Any) -> None:
    """The right kind of value, finite, and positive where it must be: transformers would say so in the middle of a round only."""
    default = next(field.default for field in dataclasses.fields(TrainingArguments) if field.name == key)
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if number and (not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value)):
        raise ConfigError(f"training.{key} = {value!r}: give a finite number")
    positive = key in ("learning_rate", "num_train_epochs", "gradient_accumulation_steps") or "batch_size" in key
    if number and positive and value <= 0:
        raise ConfigError(f"training.{key} = {value!r}: it must be greater than zero")


def probe(model: nn.Module, rows: Dataset, work: Work) -> None:
    """One batch through the model and back, before anything is written: what does not fit together is said now, in one line.

    The batch has the longest row and the one with the largest token, so that it is the hardest that these rows have.

    Raises:
        ConfigError: settings that the trainer refuses, rows longer than the model has positions for.
        ModelError: the model takes something else than the tokenizer or image processor gives, or its loss is not finite.
    """
    if work.task.kind != IMAGES:
        require_fitting(model, rows, work)
    with _trainer(model, work, 0, rows, None) as trainer:
        try:
            trainer.create_optimizer()
            trainer.get_train_dataloader()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise ConfigError(f"[training] is refused by transformers: {str(error).splitlines()[0]}") from None
        training, name = model.training, work.config.base.model
        try:
            batch = {key: value.to(trainer.args.device) for key, value in trainer.data_collator(_hardest(rows)).items()}  # type: ignore[misc]
            with trainer.compute_loss_context_manager():
                loss: Tensor = trainer.compute_loss(model.train(), batch)  # type: ignore[assignment]
            loss.backward()  # type: ignore[no-untyped-call]
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            part = "image processor" if work.task.kind == IMAGES else "tokenizer"
            mend = "correct preprocessor_config.json" if work.task.kind == IMAGES else "are both of one model?"
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"{name}: its {part} and its model do not fit together: {reason}: {mend}") from None
        finally:
            model.zero_grad()
            model.train(training)
    if not math.isfinite(value := float(loss.detach())):
        raise ModelError(f"{name}: the loss of the untrained model is {value}: is the checkpoint whole? Or set base.dtype = 'float32'")


def require_fitting(model: nn.Module, rows: Dataset, work: Work) -> None:
    """The model has embeddings and positions for every token of the rows, and there is a token to pad with.

    Raises:
        ConfigError, ModelError: else.
    """
    name, processor = work.config.base.model, work.processor
    table = model.get_input_embeddings()  # type: ignore[operator]
    if processor.pad_token_id is None:
        raise ModelError(f"{name} has no token to pad with and no end token: set tokenizer.pad_token, and save it with the model")
    known, largest = len(table.weight), max(max(map(max, rows["input_ids"]), default=0), processor.pad_token_id)
    if largest >= known:
        raise ModelError(
            f"{name}: its tokenizer gives token {largest} and the model has embeddings for {known}: enlarge them by "
            "model.resize_token_embeddings(len(tokenizer)), and save both"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    if positions is not None and (longest := max(map(len, rows["input_ids"]))) > positions:
        raise ConfigError(
            f"rows have up to {longest} tokens and {name} has {positions} positions: set task.max_length = {positions} or less"
        )


def _hardest(rows: Dataset) -> list[dict[str, Any]]:
    if "input_ids" not in rows.column_names:
        return [rows[0]]
    ids = rows["input_ids"]
    picked = {max(range(len(ids)), key=lambda row: len(ids[row])), max(range(len(ids)), key=lambda row: max(ids[row]))}
    return [rows[row] for row in sorted(picked)]
