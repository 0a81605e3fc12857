"""Trainers of TRL by name: on our tokens and our defaults, and DPO against the model at the run's start."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from fedex_lora.aggregation.flatten import flatten_adapter
from fedex_lora.client.trainers import CODE, PartyTrainer, Place
from fedex_lora.errors import ConfigError, StorageError
from fedex_lora.models.lora import write_model
from fedex_lora.protocol.dumps import pack, tensors_digest, unpack
from fedex_lora.storage.files import write_bytes

_RUNS = "model, tokenizer and rows are the run's"
_TOKENS = "the rows are tokens already, with the loss where the task says"
_MINE = "the reference is the model at the run's start, computed once"


def _sft(model: Any, rows: Dataset, processor: Any, arguments: Any) -> Trainer:
    if not isinstance(rows[0].get("labels"), list):
        raise ConfigError("trl:SFTTrainer trains models that write: set task.kind = 'causal-lm', or leave out local.trainer", CODE)
    _fit(arguments, processor)
    return SFTTrainer(model=model, args=arguments, train_dataset=rows.select_columns(["input_ids", "labels"]), processing_class=processor)


def _fit(arguments: Any, processor: Any) -> None:
    """No row is longer than the tokenizer's model has positions for."""
    arguments.max_length = arguments.max_length and min(arguments.max_length, processor.model_max_length)


PREFERENCE = ["prompt", "chosen", "rejected"]


def _require_preferences(rows: Dataset) -> None:
    if missing := [name for name in PREFERENCE if name not in rows.column_names]:
        raise ConfigError(
            f"trl:DPOTrainer needs preference rows, with columns prompt, chosen and rejected: {', '.join(missing)} not there", CODE
        )
    if empty := sum(not (row["chosen"] and row["rejected"]) for row in rows.select_columns(PREFERENCE)):
        raise ConfigError(f"trl:DPOTrainer: {empty} of {len(rows)} rows have no chosen or no rejected answer: leave them out", CODE)


def _dpo(model: Any, rows: Dataset, processor: Any, arguments: Any) -> Trainer:
    if not isinstance(model, PeftModel):
        raise ConfigError("trl:DPOTrainer needs adapters: choose another method than full-ft", CODE)
    _fit(arguments, processor)
    tools = ["tools"] if "tools" in rows.column_names else []
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=rows.select_columns(PREFERENCE + tools), processing_class=processor)
    model.delete_adapter("ref")  # a copy of the round's start, which is not the reference
    return trainer


def _with_reference(trainer: Any, place: Place | None) -> None:
    """Give each row the log-probabilities of its answers under the model at the run's start, from the party's file if it is there.

    At its start adapters add nothing, so its model is the base as it was, without adapters; unless it starts from a result.
    """
    rows, file = trainer.train_dataset, place.file if place else None
    if not len(rows):
        raise ConfigError("trl:DPOTrainer: no row has a prompt that leaves room for an answer: raise training.max_length", CODE)
    args = trainer.args
    said = [list(rows[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    base = place.base.fingerprint() + (tensors_digest(flatten_adapter("first", place.first)) if place.first else "") if place else ""
    key = tensors_digest({}, json.dumps([said, args.max_length, args.truncation_mode, args.ld_alpha, base]))
    found = _read(file, key)
    if found is None:
        found = _computed(trainer, place)
        if file is not None:
            write_bytes(file, pack("reference", found, {"key": key}))
    columns = {f"ref_{name}_logps": values.tolist() for name, values in found.items()}
    trainer.train_dataset = concatenate_datasets([rows, Dataset.from_dict(columns)], axis=1)
    trainer.precompute_ref_logps = True


def _read(file: Path | None, key: str) -> dict[str, Tensor] | None:
    try:
        found, about = unpack("reference", file.read_bytes()) if file else ({}, {})
    except (OSError, StorageError):  # not there, or broken: it is worked out again
        return None
    return found if about.get("key") == key else None


def _computed(trainer: Any, place: Place | None) -> dict[str, Tensor]:
    """By TRL's own code, batch by batch."""
    size = trainer.args.precompute_ref_batch_size or trainer.args.per_device_train_batch_size
    parts = list[tuple[Tensor, Tensor]]()
    trainer.model.eval()
    with _at_start(trainer.model, place) if place else nullcontext():
        for batch in DataLoader(trainer.train_dataset, batch_size=size, collate_fn=trainer.data_collator):
            there = {name: value.to(trainer.args.device) for name, value in batch.items()}
            parts.append(trainer.compute_ref_log_probs(trainer.model, there))
    chosen, rejected = (torch.cat(list(column)).float().cpu() for column in zip(*parts, strict=True))
    return {"chosen": chosen, "rejected": rejected}


@contextmanager
def _at_start(model: PeftModel, place: Place) -> Iterator[None]:
    """What TRL takes for the reference is the model at the run's start: the base without adapters, or with the start's, called `ref`."""
    with place.base.holding(place.gained):
        if not place.first:
            yield
            return
        mine = {name: parameter for name, parameter in model.named_parameters() if ".default." in name}
        now = {name: parameter.detach().clone() for name, parameter in mine.items()}
        write_model(model, place.first, place.other)
        model.add_adapter("ref", model.peft_config["default"])
        with torch.no_grad():
            for name, parameter in mine.items():
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
                parameter.copy_(now[name])
        try:
            yield
        finally:
            model.delete_adapter("ref")


def _plain(kind: type[TrainingArguments]) -> dict[str, Any]:
    """`transformers`' own defaults, where TRL has others (checkpointing, bf16), so that another trainer is no other training."""
    theirs = {one.name: one.default for one in dataclasses.fields(kind)}
    ours = [one for one in dataclasses.fields(TrainingArguments) if one.init and one.default is not dataclasses.MISSING]
    return {one.name: one.default for one in ours if theirs[one.name] != one.default}


SHARED = {key: _RUNS for key in ("model_init_kwargs", "trust_remote_code", "pad_token")}
TRL = {
    "SFTTrainer": PartyTrainer(
        "trl:SFTTrainer",
        _sft,
        SFTConfig,
        lambda config: _plain(SFTConfig) | {"max_length": config.task.length if config.training.get("packing") else None},
        SHARED
        | {key: _RUNS for key in ("eos_token", "chat_template_path")}
        | {key: _TOKENS for key in ("assistant_only_loss", "completion_only_loss", "dataset_text_field", "dataset_kwargs", "eval_packing")},
    ),
    "DPOTrainer": PartyTrainer(
        "trl:DPOTrainer",
        _dpo,
        DPOConfig,
        lambda config: _plain(DPOConfig) | {"max_length": config.task.length},
        SHARED | {key: _MINE for key in ("precompute_ref_log_probs", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")},
        _require_preferences,
        _with_reference,
    ),
}
