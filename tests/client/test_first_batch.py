"""What does not fit together is one line before a run folder is written, and the same command with the mistake mended works."""

import json

import pytest
import torch
from datasets import Dataset
from tests.runs.test_run import ignore
from tests.tasks.test_rows import bytewise
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, RobertaConfig, RobertaForSequenceClassification

from fedex_lora.client.probe import fitting
from fedex_lora.client.training import ClientData, evaluate, local_update
from fedex_lora.config import parse_config
from fedex_lora.errors import ConfigError, FedexLoraError, ModelError, TrainingError
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    made = [{"prompt": f"say {number}", "completion": " word" * (number % 5 + 1)} for number in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return folder


def base(folder, tokenizer, vocabulary=259):
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, pad_token_id=None, **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def setting(model, rows, training=None, **task):
    settings = {"name": "custom", "kind": "causal-lm", "data": str(rows), "train": "rows.jsonl", "eval": "rows.jsonl", **task}
    tree = {"rounds": 1, "torch_threads": 1, "base": {"model": model}, "task": settings, "clients": {"count": 2, "holdout": 0.0}}
    training = {"per_device_train_batch_size": 4, **(training or {})}
    return parse_config(tree | {"lora": {"r": 2, "target_modules": ["q_proj"]}, "training": training})


def larger():
    tokenizer = bytewise()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


def endless():
    tokenizer = bytewise()
    tokenizer.pad_token = tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "task", "training", "message"),
    [
        (larger, {}, {}, "tokenizer gives token 259 and the model has embeddings for 259"),
        (
            bytewise,
            {"max_length": 100, "prompt": "{prompt}" * 12},
            {},
            "rows have up to [0-9]+ tokens .* has 64 positions: set task.max_length = 64",
        ),
        (endless, {}, {}, "no token to pad with and no end token"),
        (bytewise, {}, {"per_device_train_batch_size": 16, "dataloader_drop_last": True}, "has 12 rows, and training.dataloader_drop_last"),
    ],
    ids=["larger tokenizer", "too few positions", "no pad, no end", "fewer rows than a batch"],
)
def test_one_line_before_anything_is_written(tokenizer, task, training, message, rows, tmp_path):
    config = setting(base(tmp_path / "base", tokenizer()), rows, training, **task)
    with pytest.raises((ConfigError, ModelError), match=message) as caught:
        run(config, tmp_path / "run", ignore)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    mended = setting(base(tmp_path / "mended", bytewise()), rows)
    run(mended, tmp_path / "run", ignore)


@pytest.mark.parametrize(("prompt", "message"), [("word " * 40, "positions"), ("say [NEW]", "gives token 259")])
def test_every_row_is_looked_at(prompt, message, rows, tmp_path):
    """Also one that no client measures on."""
    tokenizer = bytewise()
    tokenizer.add_tokens(["[NEW]"])
    (tmp_path / "odd.jsonl").write_text((rows / "rows.jsonl").read_text() + json.dumps({"prompt": prompt, "completion": " word"}) + "\n")
    config = setting(base(tmp_path / "base", tokenizer), rows, train=str(tmp_path / "odd.jsonl"), max_length=300)
    with pytest.raises((ConfigError, ModelError), match=message):
        run(config, tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_ratio": 0.1}}, "'min_lr_ratio'"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'num_decay_steps'"),
    ],
)
def test_a_schedule_that_does_not_work_is_found_before_a_round(training, message, rows, tmp_path):
    with pytest.raises(ConfigError, match=f"refused by transformers: .*{message}") as caught:
        LocalSimulation(setting(base(tmp_path / "base", bytewise()), rows, training), ignore)
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_no_wrong_tokenizer(rows, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    config = setting(base(tmp_path / "base", bytewise()), rows)
    monkeypatch.setattr(LlamaModel, "forward", full)
    with pytest.raises(ConfigError, match=r"memory runs out in the first batch, .* \([0-9]+ tokens\): lower task.max_length"):
        run(config, tmp_path / "run", ignore)


def test_no_step_is_no_update(rows, tmp_path):
    """Over an engine a party may have fewer rows than a batch; its factors, which have not moved, are no answer."""
    training = {"dataloader_drop_last": True, "per_device_train_batch_size": 8, "max_steps": 2}
    place = LocalSimulation(setting(base(tmp_path / "base", bytewise()), rows, training), ignore).host.place
    few = place.work.tokens(place.work.task.train.iloc[:5].reset_index(drop=True))
    with pytest.raises(TrainingError, match="client a made no step of training"):
        local_update(place.model, "a", 1, ClientData(few, few), place.work)


def test_weights_that_give_no_number_are_found(rows, tmp_path):
    folder = base(tmp_path / "base", bytewise())
    model = LlamaForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[5] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(FedexLoraError, match="the loss of the untrained model is nan"):
        run(setting(folder, rows), tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()


def test_the_loss_of_texts_does_not_depend_on_the_batches(rows, tmp_path):
    folder = base(tmp_path / "base", bytewise())
    losses = []
    for size in (1, 5, 24):
        host = LocalSimulation(setting(folder, rows, {"per_device_eval_batch_size": size}), ignore).host
        losses.append(evaluate(host.place.model, host.eval, host.place.work)["loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_positions_are_counted_from_behind_the_padding():
    """RoBERTa's table has two more than tokens can have: a row of 33 in a table of 34 ends in an index that is out of range."""
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = RobertaForSequenceClassification(RobertaConfig(vocab_size=20, max_position_embeddings=34, pad_token_id=1, **shape))
    fits, more = (Dataset.from_dict({"input_ids": [[5] * size]}) for size in (32, 33))
    assert len(fitting(model, fits)) == 1
    assert len(fitting(model, more)) == 0
    model(torch.tensor(fits["input_ids"][:]))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.tensor(more["input_ids"][:]))
