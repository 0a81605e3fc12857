"""Whether a model, its rows and its settings go together, tried before anything is written."""

import math
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from fedex_lora.aggregation import get_method
from fedex_lora.client.arguments import TrainingContext
from fedex_lora.client.trainers import CODE
from fedex_lora.client.training import ClientData, _trainer, continued, is_out_of_memory
from fedex_lora.errors import ConfigError, ModelError, require_extra
from fedex_lora.models.lora import other_parameters
from fedex_lora.privacy.settings import require_private


def check_trainer(model: nn.Module, rows: Dataset, work: TrainingContext) -> None:
    """One batch through the model and back, before anything is written: what does not fit together is said now, in one line.

    The batch has the longest row and the one with the largest token, so that it is the hardest that these rows have.

    Where training is private, every trained tensor must have a sound gradient of each single row (`private_probe`).

    Raises:
        ConfigError: settings that the trainer refuses, or that do not go with privacy; rows longer than the model has positions for.
        ModelError: the model takes something else than the tokenizer or image processor gives, or its loss is not finite.
    """
    require_private(work.config)
    if work.config.local.head_rounds and not other_parameters(model):
        raise ConfigError(f"local.head_rounds is set, and {work.config.base.model} has no head that is trained: remove it")
    _require_readable(model, rows, work)
    if work.trainer is not None:
        _require_step(model, rows, work)
        return
    with _trainer(model, work, 0, rows, None) as trainer:
        try:
            trainer.create_optimizer_and_scheduler(num_training_steps=10)
            trainer.get_train_dataloader()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise ConfigError(f"[training] is refused by transformers: {str(error).splitlines()[0]}") from None
        training, name = model.training, work.config.base.model
        try:
            hardest = [rows[row] for row in _hardest_rows(rows)]
            batch = {key: value.to(trainer.args.device) for key, value in trainer.data_collator(hardest).items()}  # type: ignore[misc]
            with trainer.compute_loss_context_manager():
                loss: Tensor = trainer.compute_loss(model.train(), batch)  # type: ignore[assignment]
            loss.backward()  # type: ignore[no-untyped-call]
        except (ValueError, IndexError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                size = f"{max(map(len, rows['input_ids']))} tokens" if "input_ids" in rows.column_names else "images"
                raise ConfigError(
                    f"memory runs out in the first batch, of up to two rows ({size}): lower task.max_length, set "
                    "training.gradient_checkpointing = true, or load the base in 4 bits (base.quantization = 'nf4')",
                    "memory",
                ) from None
            part = "tokenizer" if work.task.reads_text else "image processor"
            mend = "are both of one model?" if work.task.reads_text else "correct preprocessor_config.json"
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"{name}: its {part} and its model do not fit together: {reason}: {mend}") from None
        finally:
            model.zero_grad()
            model.train(training)
        if work.config.privacy.is_on:
            _require_private_step(model, rows, work, trainer)
    if not math.isfinite(value := float(loss.detach())):
        raise ModelError(f"{name}: the loss of the untrained model is {value}: is the checkpoint whole? Or set base.dtype = 'float32'")


def _require_private_step(model: nn.Module, rows: Dataset, work: TrainingContext, trainer: Trainer) -> None:
    require_extra("opacus", "dp", "private runs")
    from fedex_lora.client.private_probe import require_sound

    def batch(few: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: value.to(trainer.args.device) for name, value in trainer.data_collator(few).items()}  # type: ignore[misc]

    lengths = list(map(len, rows["input_ids"])) if "input_ids" in rows.column_names else [0]
    few = list(dict.fromkeys([*_hardest_rows(rows), lengths.index(min(lengths)), *range(min(len(rows), 2))]))[:4]
    few = few if len(few) > 1 else 2 * few
    require_sound(model, [rows[row] for row in few], batch, work.task.kind, get_method(work.config.method).trained_schedule)


@torch.no_grad()
def _require_step(model: nn.Module, rows: Dataset, work: TrainingContext) -> None:
    """One step of a party's own trainer, on a batch with the hardest rows, after which the model is as it was."""
    name, kept = work.config.local.trainer, {key: one.clone() for key, one in model.named_parameters() if one.requires_grad}
    few = rows.select(sorted({*_hardest_rows(rows), *range(min(len(rows), 8))}))
    with torch.enable_grad(), _trainer(model, work, 0, few, None) as trainer:
        trainer.args.max_steps, trainer.args.dataloader_drop_last = 1, False
        optimizer = continued(trainer, work.config, 1, None)
        output = trainer.train()
        loss = getattr(output, "training_loss", None)
        if loss is None or trainer.state.global_step < 1:
            raise ConfigError(f"local.trainer = {name!r}: its train() made no step, or gives no TrainOutput", CODE)
        if not math.isfinite(loss):
            raise ConfigError(f"local.trainer = {name!r}: the loss of the untrained model is {loss}", CODE)
        if work.config.local.optimizer_state == "keep":
            _require_keepable(optimizer, name)
        del trainer, optimizer
    for key, one in model.named_parameters():
        if key in kept:
            one.copy_(kept[key])


def _require_keepable(optimizer: torch.optim.Optimizer, name: str | None) -> None:
    state = optimizer.state_dict()["state"]
    odd = [value for values in state.values() for value in values.values() if not isinstance(value, Tensor | int | float | str | None)]
    if odd or not state:
        raise ConfigError(f"local.trainer = {name!r} has an optimiser that cannot be kept: set local.optimizer_state = 'reset'", CODE)


def require_trainable(model: nn.Module, client: str, data: ClientData, work: TrainingContext) -> None:
    """A client has rows for a step, and the model and the party's trainer take all of them.

    Raises:
        ConfigError, ModelError: else.
    """
    batch, there = work.config.training.get("per_device_train_batch_size", 8), len(data.train)
    if work.config.training.get("dataloader_drop_last") and there < batch:
        raise ConfigError(
            f"client {client} has {there} rows, and training.dataloader_drop_last drops batches of less than {batch}: lower it"
        )
    for rows in (data.train, data.held_out):
        _require_readable(model, rows, work)


def _require_readable(model: nn.Module, rows: Dataset, work: TrainingContext) -> None:
    """The model has embeddings and positions for all tokens of the rows, and the party's trainer takes them.

    Raises:
        ConfigError, ModelError: else.
    """
    if work.task.reads_text and len(rows):
        require_fitting(model, rows, work)
    if work.trainer is not None:
        work.trainer.check(rows)


def require_fitting(model: nn.Module, rows: Dataset, work: TrainingContext) -> None:
    """The model has embeddings and positions for every token of the rows, and there is a token to pad with.

    Raises:
        ConfigError, ModelError: else.
    """
    name, processor = work.config.base.model, work.processor
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:
        raise ModelError(f"{name} does not say where its embeddings are: call the layer embed_tokens") from None
    if processor.pad_token_id is None:
        raise ModelError(f"{name} has no token to pad with and no end token: set tokenizer.pad_token, and save it with the model")
    lengths, tokens = [0], [processor.pad_token_id]
    for batch in rows.with_format("numpy", columns=["input_ids"]).iter(1000):
        lengths.append(max(map(len, batch["input_ids"])))
        tokens += [int(ids.max()) for ids in batch["input_ids"] if len(ids)]
    known, largest = len(table.weight), max(tokens)
    if largest >= known:
        raise ModelError(
            f"{name}: its tokenizer gives token {largest} and the model has embeddings for {known}: enlarge them by "
            "model.resize_token_embeddings(len(tokenizer)), and save both"
        )
    positions = positions_of(model)
    if positions is not None and (longest := max(lengths)) > positions:
        raise ConfigError(
            f"rows have up to {longest} tokens and {name} has {positions} positions: set task.max_length = {positions} or less"
        )


def positions_of(model: nn.Module) -> int | None:
    """How many tokens of a row the model has positions for; None: any number."""
    for name, one in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(one, nn.Embedding) and one.padding_idx is not None:
            return one.num_embeddings - one.padding_idx - 1  # as RoBERTa counts, from behind the padding
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    return found


def fitting(model: nn.Module, rows: Dataset) -> Dataset:
    """The rows for whose every token the model has embeddings and positions; each by itself."""
    known, positions = len(model.get_input_embeddings().weight), positions_of(model)  # type: ignore[operator]
    kept = [row for row, ids in enumerate(rows["input_ids"]) if ids and max(ids) < known and len(ids) <= (positions or len(ids))]
    return rows if len(kept) == len(rows) else rows.select(kept)


def _hardest_rows(rows: Dataset) -> list[int]:
    if "input_ids" not in rows.column_names:
        return [0]
    ids = rows["input_ids"]
    return sorted({max(range(len(ids)), key=lambda row: len(ids[row])), max(range(len(ids)), key=lambda row: max(ids[row]))})
