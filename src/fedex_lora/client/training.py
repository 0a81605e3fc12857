"""One client's work: go on from a download, train on rows that stay here, answer with an update."""

import dataclasses
import gc
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler, logging, set_seed

from fedex_lora.aggregation import derive_seed, method_named
from fedex_lora.config import IMAGES, Config, is_ours, nearest
from fedex_lora.errors import ConfigError, ModelError, TrainingError
from fedex_lora.models.lora import read_model, read_other, set_trained
from fedex_lora.tasks import IGNORED, Task, collator
from fedex_lora.types import ClientUpdate

StepHook = Callable[[int, int], None]
"""(step, steps of this round)."""


@dataclass(frozen=True, eq=False)
class ClientData:
    """A client's rows, tokenised (images still encoded): to train on, and to measure on."""

    train: Dataset
    held_out: Dataset


@dataclass(frozen=True, eq=False)
class Work:
    """What every client of a run shares: settings, task, tokenizer or image processor."""

    config: Config
    task: Task
    processor: Any


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


def local_update(
    model: nn.Module,
    client_id: str,
    round: int,
    data: ClientData,
    work: Work,
    optimizer_state: Mapping[str, Any] | None = None,
    on_step: StepHook | None = None,
) -> tuple[ClientUpdate, Mapping[str, Any] | None]:
    """Train the model, as it stands, for one round.

    Args:
        model: with the global adapter and base in it; trained in place.
        client_id, round: with the run's seed they give the seed of dropout and of the order of rows.
        data: the client's rows.
        work: settings, task, tokenizer or image processor.
        optimizer_state: Adam's moments from the client's last round; None: start anew.
        on_step: told of every step.

    Returns:
        The update, and the optimiser's state after it where `local.optimizer_state` is "keep"; both on the CPU, wherever the model is.

    Raises:
        TrainingError: the loss is not finite, or memory ran out.
    """
    seed, started = derive_seed(work.config.seed, round, client_id), time.perf_counter()
    set_trained(model, method_named(work.config.method).trained(round))
    with _trainer(model, work, seed, data.train, on_step) as trainer:
        optimizer = trainer.create_optimizer()
        if optimizer_state is not None:
            optimizer.load_state_dict({**optimizer_state, "param_groups": _current_rates(optimizer_state, optimizer)})
        if work.config.local.schedule == "run":
            trainer.lr_scheduler = _run_schedule(trainer, optimizer, round, work.config.rounds)
        set_seed(seed)  # Trainer seeds in its constructor only, and building it draws numbers
        try:
            output = trainer.train()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "out of memory" in str(error) or "can't allocate memory" in str(error):
                size = trainer.args.per_device_train_batch_size
                raise TrainingError(
                    f"client {client_id} ran out of memory at batch size {size}: lower training.per_device_train_batch_size",
                    "memory",
                ) from None
            raise
        loss, steps = float(output.training_loss), float(output.global_step)
        state = _on_cpu(optimizer.state_dict()) if work.config.local.optimizer_state == "keep" else None
        del trainer, optimizer
    adapter, other = read_model(model), read_other(model)
    trained = [tensor for pair in adapter.values() for tensor in (pair.A, pair.B)] + list(other.values())
    if not math.isfinite(loss) or not all(bool(torch.isfinite(tensor).all()) for tensor in trained):
        raise TrainingError(
            f"client {client_id}: training diverged in round {round} (loss {loss:g}): lower training.learning_rate", "diverged"
        )
    metrics = {"train_loss": loss, "steps": steps, "seconds": time.perf_counter() - started}
    update = ClientUpdate(client_id=client_id, adapter=adapter, num_examples=len(data.train), other=other, metrics=metrics)
    return update, state


def evaluate(model: nn.Module, rows: Dataset, work: Work) -> dict[str, float]:
    """The task's metrics and the loss of the model on tokenised rows, with `rows` their number; nothing for no rows."""
    if not len(rows):
        return {}
    with _trainer(model, work, work.config.seed, None, None) as trainer:
        numbers = trainer.evaluate(rows)  # type: ignore[arg-type] # a datasets.Dataset is what Trainer works on
        del trainer
    known = {name.removeprefix("eval_"): float(value) for name, value in numbers.items() if isinstance(value, int | float | np.floating)}
    speed = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
    return {name: value for name, value in known.items() if name not in speed} | {"rows": float(len(rows))}


def weighted_mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    """Metrics over several clients, weighted by their rows; `rows` is the sum."""
    measured = [one for one in metrics if one.get("rows")]
    total = math.fsum(one["rows"] for one in measured)
    names = set.intersection(*(set(one) for one in measured)) - {"rows"} if measured else set()
    return {name: math.fsum(one[name] * one["rows"] for one in measured) / total for name in sorted(names)} | (
        {"rows": total} if measured else {}
    )


@contextmanager
def _trainer(model: nn.Module, work: Work, seed: int, rows: Dataset | None, on_step: StepHook | None) -> Iterator[Trainer]:
    """A Trainer for one call, in a temporary folder that stays empty."""
    with tempfile.TemporaryDirectory(prefix="fedex-lora-") as folder, warnings.catch_warnings(), _old_objects_left_alone():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            model=model,
            args=training_arguments(work.config, folder, seed),
            train_dataset=rows,  # type: ignore[arg-type]
            data_collator=collator(work.task.kind, work.processor),
            compute_metrics=lambda prediction: {**work.task.metrics(_first_output(prediction)), **_token_loss(prediction, work.task.kind)},
            preprocess_logits_for_metrics=_argmax_and_loss if work.task.kind == "causal-lm" else None,  # type: ignore[arg-type]
            callbacks=[_Steps(on_step)] if on_step else None,
        )
        trainer.remove_callback(PrinterCallback)
        yield trainer
        del trainer


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Garbage collection looks at new objects only: Trainer collects in every `train()`, 0.3 s and more for all that the libraries made."""
    if gc.get_freeze_count():  # somebody else's decision
        yield
        return
    gc.freeze()
    try:
        yield
        gc.collect()  # the trainer and the optimiser's state, before they count as old
    finally:
        gc.unfreeze()


class _Steps(TrainerCallback):
    """Tells a function of every training step."""

    def __init__(self, hook: StepHook) -> None:
        self._hook = hook

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._hook(state.global_step, state.max_steps)


def _first_output(prediction: EvalPrediction) -> EvalPrediction:
    """Some models return more than logits; they come first."""
    predictions = prediction.predictions
    return EvalPrediction(predictions=predictions[0] if isinstance(predictions, tuple) else predictions, label_ids=prediction.label_ids)


def _argmax_and_loss(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids instead of logits, a vocabulary's worth less memory; and of each row the sum of its tokens' losses, and their number."""
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    ahead = labels[:, 1:].to(first.device)
    losses = nn.functional.cross_entropy(first[:, :-1].float().transpose(1, 2), ahead, ignore_index=IGNORED, reduction="none")
    return first.argmax(dim=-1), losses.sum(dim=1, keepdim=True), (ahead != IGNORED).sum(dim=1, keepdim=True)


def _token_loss(prediction: EvalPrediction, kind: str) -> dict[str, float]:
    """The mean over all tokens: the mean of batches' means, which Trainer takes, depends on the batches."""
    if kind != "causal-lm":
        return {}
    _, losses, tokens = prediction.predictions  # type: ignore[misc]
    return {"loss": float(np.sum(losses, dtype=np.float64) / np.sum(tokens))}


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state with its tensors on the CPU."""
    moments = {
        index: {name: value.cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": moments}


def _current_rates(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The saved parameter groups with the fresh optimiser's settings: the moments continue, learning rates start as scheduled."""
    return [
        {**group, "params": saved["params"]}
        for saved, group in zip(state["param_groups"], optimizer.state_dict()["param_groups"], strict=True)
    ]


def _run_schedule(trainer: Trainer, optimizer: torch.optim.Optimizer, round: int, rounds: int) -> Any:
    """The learning-rate schedule over the whole run, advanced to the first step of this round."""
    args = trainer.args
    batches = len(trainer.get_train_dataloader())
    updates = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    total = rounds * steps
    kwargs: Any = args.lr_scheduler_kwargs
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(total), total, scheduler_specific_kwargs=kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step the optimizer first": it was, in earlier rounds
        for _ in range((round - 1) * steps):
            scheduler.step()
    return scheduler


def quiet() -> None:
    """No progress bars, telemetry or tokenizer threads of the libraries: ours are enough."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT sets it right by itself
    getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")  # int8 layers say at every call that they compute in float16
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
