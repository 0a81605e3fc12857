"""Whether a model, its rows and its settings go together, tried before anything is written."""

import math
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from fedex_lora.client.arguments import TrainingContext
from fedex_lora.client.training import _trainer
from fedex_lora.errors import ConfigError, ModelError


def check_trainer(model: nn.Module, rows: Dataset, work: TrainingContext) -> None:
    """One batch through the model and back, before anything is written: what does not fit together is said now, in one line.

    The batch has the longest row and the one with the largest token, so that it is the hardest that these rows have.

    Raises:
        ConfigError: settings that the trainer refuses, rows longer than the model has positions for.
        ModelError: the model takes something else than the tokenizer or image processor gives, or its loss is not finite.
    """
    if work.task.reads_text:
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
            part = "tokenizer" if work.task.reads_text else "image processor"
            mend = "are both of one model?" if work.task.reads_text else "correct preprocessor_config.json"
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ModelError(f"{name}: its {part} and its model do not fit together: {reason}: {mend}") from None
        finally:
            model.zero_grad()
            model.train(training)
    if not math.isfinite(value := float(loss.detach())):
        raise ModelError(f"{name}: the loss of the untrained model is {value}: is the checkpoint whole? Or set base.dtype = 'float32'")


def require_fitting(model: nn.Module, rows: Dataset, work: TrainingContext) -> None:
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
