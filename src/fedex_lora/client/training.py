"""One client's work: go on from a download, train on rows that stay here, answer with an update."""

import gc
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset, disable_progress_bars
from huggingface_hub import constants
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler, logging, set_seed

from fedex_lora.aggregation import derive_seed, get_method
from fedex_lora.client.arguments import TrainingContext, training_arguments
from fedex_lora.client.metrics import argmax_and_loss, first_output, token_loss
from fedex_lora.client.trainers import CODE, Place, trainer_of_party
from fedex_lora.config import IMAGES, Config
from fedex_lora.errors import ConfigError, TrainingError, require_extra
from fedex_lora.models.lora import frozen, other_parameters, read_model, read_other, set_trained
from fedex_lora.privacy.accounting import PrivacyPlan, privacy_plan
from fedex_lora.privacy.settings import require_private
from fedex_lora.tasks import collator
from fedex_lora.types import ClientUpdate

BITSANDBYTES = "bitsandbytes.autograd._functions"  # the logger of its int8 layers
StepHook = Callable[[int, int], None]
"""(step, steps of this round)."""


@dataclass(frozen=True, eq=False)
class ClientData:
    """A client's rows, tokenised (images still encoded): to train on, and to measure on."""

    train: Dataset
    held_out: Dataset


def local_update(
    model: nn.Module,
    client_id: str,
    round: int,
    data: ClientData,
    work: TrainingContext,
    optimizer_state: Mapping[str, Any] | None = None,
    on_step: StepHook | None = None,
    place: Place | None = None,
) -> tuple[ClientUpdate, Mapping[str, Any] | None]:
    """Train the model, as it stands, for one round.

    Args:
        model: with the global adapter and base in it; trained in place.
        client_id, round: with the run's seed they give the seed of dropout and of the order of rows.
        data: the client's rows.
        work: settings, task, tokenizer or image processor.
        optimizer_state: Adam's moments from the client's last round; None: start anew.
        on_step: told of every step.
        place: what some trainers need beside model and rows.

    Returns:
        The update, and the optimiser's state after it where `local.optimizer_state` is "keep"; both on the CPU, wherever the model is.
        Of a private client the update says the stated number of rows, and no metrics.

    Raises:
        TrainingError: the loss is not finite, or memory ran out; or the party's own trainer failed, or changed what it may not: the model
            must be built anew then.
    """
    seed, started = derive_seed(work.config.seed, round, client_id), time.perf_counter()
    heads = round <= work.config.local.head_rounds
    set_trained(model, "" if heads else get_method(work.config.method).trained(round))
    still = other_parameters(model).values() if work.config.local.head_rounds and not heads else ()
    plan = privacy_plan(work.config, client_id) if work.config.privacy.is_on else None
    with frozen(still), _trainer(model, work, seed, data.train, on_step, place, plan) as trainer:
        optimizer = continued(trainer, work.config, round, optimizer_state)
        set_seed(seed)  # Trainer seeds in its constructor only, and building it draws numbers
        try:
            output = trainer.train()
        except RuntimeError as error:
            if is_out_of_memory(error):
                size = trainer.args.per_device_train_batch_size
                raise TrainingError(
                    f"client {client_id} ran out of memory at batch size {size}: lower training.per_device_train_batch_size",
                    "memory",
                ) from None
            raise
        loss, steps = float(output.training_loss), float(output.global_step)
        state = send_to_device(optimizer.state_dict(), "cpu") if work.config.local.optimizer_state == "keep" else None
        del trainer, optimizer
    if not steps and not plan:
        raise TrainingError(
            f"client {client_id} made no step of training: are its rows fewer than a batch, which training.dataloader_drop_last drops?"
        )
    adapter, other = read_model(model), read_other(model)
    trained = [tensor for pair in adapter.values() for tensor in (pair.A, pair.B)] + list(other.values())
    if not math.isfinite(loss) or not all(bool(torch.isfinite(tensor).all()) for tensor in trained):
        raise TrainingError(
            f"client {client_id}: training diverged in round {round} (loss {loss:g}): lower training.learning_rate", "diverged"
        )
    metrics = {} if plan else {"train_loss": loss, "steps": steps, "seconds": time.perf_counter() - started}
    rows = plan.rows if plan else len(data.train)
    update = ClientUpdate(client_id=client_id, adapter=adapter, num_examples=rows, other=other, metrics=metrics)
    return update, state


def is_out_of_memory(error: BaseException) -> bool:
    """Of a device, or of this machine."""
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


def continued(trainer: Trainer, config: Config, round: int, optimizer_state: Mapping[str, Any] | None) -> Any:
    """The trainer's optimiser and schedule, as `[local]` has them go on from the last round.

    Raises:
        ConfigError: a trainer that is not ours has an optimiser or a schedule that cannot.
    """
    name, local = config.local.trainer, config.local
    if local.schedule == "run" and trainer.lr_scheduler is not None:
        raise ConfigError(f"local.trainer = {name!r} brings its own schedule, and local.schedule = 'run' sets ours: leave out one", CODE)
    made: Any = trainer.create_optimizer()
    optimizer: Any = trainer.optimizer if made is None else made  # those of subclasses may only set it
    key = "optimizer_state = 'keep'"
    try:
        if optimizer_state is not None:
            kept = deepcopy(dict(optimizer_state))  # Adam changes moments in place, and training may fail half-way
            optimizer.load_state_dict({**kept, "param_groups": _current_rates(kept, optimizer)})
        if local.schedule == "run":
            key = "schedule = 'run'"
            trainer.lr_scheduler = _run_schedule(trainer, optimizer, round, config.rounds)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if name is None:
            raise
        raise ConfigError(f"local.trainer = {name!r} does not go with local.{key} ({type(error).__name__}): remove it", CODE) from error
    return optimizer


SPEED = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")  # what trainers add to metrics


def evaluate(model: nn.Module, rows: Dataset, work: TrainingContext) -> dict[str, float]:
    """The task's metrics and the loss of the model on tokenised rows, with `rows` their number; nothing for no rows."""
    if not len(rows):
        return {}
    with _trainer(model, work, work.config.seed, None, None) as trainer:
        numbers = trainer.evaluate(rows)  # type: ignore[arg-type] # a datasets.Dataset is what Trainer works on
        del trainer
    known = {name.removeprefix("eval_"): float(value) for name, value in numbers.items() if isinstance(value, int | float | np.floating)}
    return {name: value for name, value in known.items() if name not in SPEED} | {"rows": float(len(rows))}


@contextmanager
def _trainer(
    model: nn.Module,
    work: TrainingContext,
    seed: int,
    rows: Dataset | None,
    on_step: StepHook | None,
    place: Place | None = None,
    plan: PrivacyPlan | None = None,
) -> Iterator[Trainer]:
    """A Trainer for one call, in a temporary folder that stays empty: the party's for its rows; ours to measure, and by default."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fedex-lora-"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_old_objects_left_alone())
        if plan is not None:
            trainer = stack.enter_context(_private(model, work, training_arguments(work.config, folder, seed), rows, plan, place))
        elif rows is None or work.trainer is None:
            trainer = _ours(model, work, training_arguments(work.config, folder, seed), rows)
        else:
            arguments = training_arguments(work.config, folder, seed, work.trainer)
            trainer = stack.enter_context(trainer_of_party(work.trainer, model, rows, work.processor, arguments, place))
        if on_step:
            trainer.add_callback(_Steps(on_step))
        trainer.remove_callback(PrinterCallback)
        yield trainer
        del trainer


def _ours(model: nn.Module, work: TrainingContext, arguments: TrainingArguments, rows: Dataset | None) -> Trainer:
    if work.task.kind != IMAGES:
        arguments.remove_unused_columns = True  # what stands beside the tokens is for others
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=collator(work.task.kind, work.processor),
        compute_metrics=lambda prediction: {**work.task.metrics(first_output(prediction)), **token_loss(prediction, work.task.kind)},
        preprocess_logits_for_metrics=argmax_and_loss if work.task.kind == "causal-lm" else None,  # type: ignore[arg-type]
    )


def _private(
    model: nn.Module, work: TrainingContext, arguments: TrainingArguments, rows: Dataset | None, plan: PrivacyPlan, place: Place | None
) -> AbstractContextManager[Trainer]:
    require_private(work.config)
    require_extra("opacus", "dp", "private runs")
    from fedex_lora.client.private import private_trainer

    arguments.remove_unused_columns = work.task.kind != IMAGES  # as in `_ours`
    given = {"model": model, "train_dataset": rows, "data_collator": collator(work.task.kind, work.processor)}
    return private_trainer(plan, work.task.kind, arguments, **given, **({"tell": place.tell} if place else {}))


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


def silence_libraries() -> None:
    """No progress bars, telemetry or tokenizer threads of the libraries: ours are enough."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1") == "1":
        constants.HF_HUB_DISABLE_TELEMETRY = True  # read once, when the library is imported; TRL's trainers would tell the hub of each
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT sets it right by itself
    getLogger(BITSANDBYTES).setLevel("ERROR")  # int8 layers say at every call that they compute in float16
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
