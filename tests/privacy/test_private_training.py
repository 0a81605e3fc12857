"""Private training against autograd one row at a time, and against the plain Trainer; what is left of it, and what it refuses."""

import io
import json
import logging
import math
import re
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, concatenate_datasets
from opacus.grad_sample import GradSampleModule
from PIL import Image
from tests.runs.test_run import configuration
from tests.tasks.test_rows import bytewise
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoTokenizer,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from fedex_lora.aggregation import METHODS
from fedex_lora.client.example_gradients import LEFT, losses_of, per_example_gradients
from fedex_lora.client.private import PrivateOptimizer, _in_parts, private_trainer
from fedex_lora.client.private_probe import require_sound
from fedex_lora.client.probe import check_trainer
from fedex_lora.client.training import ClientData, _trainer, continued, evaluate, local_update
from fedex_lora.config import base_folder
from fedex_lora.errors import ConfigError, ModelError, TrainingError
from fedex_lora.models.lora import lora_layers, set_trained
from fedex_lora.models.processor import ImageProcessor
from fedex_lora.privacy.accounting import Mechanism, PrivacyPlan
from fedex_lora.privacy.settings import FREE, REFUSED, require_private
from fedex_lora.protocol.failures import WORDS, Failure
from fedex_lora.runs.context import ModelContext
from fedex_lora.tasks import collator, load_task

ROWS, HUGE = 12, 1e6
SGD = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "num_train_epochs": 1, "per_device_train_batch_size": 8}
PRIVATE = {"epsilon": 8.0, "delta": 1e-3, "rows": 40, "accountant": "rdp"}
CLASSES = {"kind": "classification", "train": "notes.jsonl", "eval": "notes.jsonl", "labels": ["calm", "urgent", "odd"]}
SCORES = {"kind": "regression", "train": "scores.jsonl", "eval": "scores.jsonl"}
IMAGES = {"kind": "image-classification", "train": "images.jsonl", "eval": "images.jsonl", "labels": ["red", "blue"]}


@dataclass
class Setting:
    """A model, its rows, and what trains."""

    place: ModelContext
    rows: Dataset

    @property
    def model(self):
        return self.place.model

    def batch(self, numbers):
        made = collator(self.place.work.task.kind, self.place.work.processor)([self.rows[number] for number in numbers])
        return {name: value for name, value in made.items() if name != "token_type_ids"}

    def trained(self):
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def alone(self):
        """Each row's gradient, as transformers and autograd have it for a batch of that row alone."""
        found = []
        for number in range(len(self.rows)):
            loss = self.model.eval()(**self.batch([number])).loss
            found.append(torch.autograd.grad(loss, list(self.trained().values())))
        return [dict(zip(self.trained(), gradients, strict=True)) for gradients in found]

    def private(self, plan, rows=None, seed=0, optimizer=False):
        """What each step's optimiser was given, as {name: gradient}."""
        told = Gradients(self.model)
        with _trainer(self.model, self.place.work, seed, self.rows if rows is None else rows, None, None, plan) as trainer:
            trainer.add_callback(told)
            if optimizer:
                continued(trainer, self.place.config, 1, None)
            trainer.train()
        return told.seen


class Gradients(TrainerCallback):
    def __init__(self, model):
        self.model, self.seen = model, []

    def on_optimizer_step(self, args, state, control, **more):
        self.seen.append({name: one.grad.clone() for name, one in self.model.named_parameters() if one.requires_grad})


def plan(sigma=0.0, rate=1.0, steps=1, batch=ROWS, clip=HUGE, rows=ROWS):
    return PrivacyPlan(Mechanism(sigma, rate, steps), rounds=1, batch=batch, clip_norm=clip, rows=rows, epsilon=math.inf, delta=1e-5)


def norm(gradient):
    return math.sqrt(sum(float(one.double().square().sum()) for one in gradient.values()))


def stacked(few):
    return {name: torch.stack([row[name] for row in few]) for name in few[0]}


def difference(left, right):
    return norm({name: left[name].double() - right[name].double() for name in left})


def clipped_sum(gradients, clip):
    scaled = [{name: one.double() * min(1.0, clip / norm(row)) for name, one in row.items()} for row in gradients]
    return {name: sum(row[name] for row in scaled) for name in gradients[0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("private")
    torch.manual_seed(5)
    vit = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8)
    ViTForImageClassification(vit).save_pretrained(root / "vit")
    shape = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    AlbertForSequenceClassification(AlbertConfig(vocab_size=259, num_labels=3, classifier_dropout_prob=0.0, **shape)).save_pretrained(
        root / "albert"
    )
    bytewise().save_pretrained(root / "albert")
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=64, **sizes, **experts)).save_pretrained(root / "moe")
    AutoTokenizer.from_pretrained(base_folder()).save_pretrained(root / "moe")
    drawn = np.random.default_rng(0)
    for index in range(ROWS):
        noise = drawn.normal(0, 30, (16, 16, 3)) + np.array([(200, 60, 60), (60, 60, 200)][index % 2])
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / f"{index}.png")
    words = [f"a cough {'and ' * (index % 4)}{'abcd'[index % 4]} pain" for index in range(ROWS)]
    made = {
        "notes": [{"text": text, "label": CLASSES["labels"][index % 3]} for index, text in enumerate(words)],
        "scores": [{"text": text, "label": index / 3} for index, text in enumerate(words)],
        "images": [{"image": f"{index}.png", "label": IMAGES["labels"][index % 2]} for index in range(ROWS)],
    }
    for name, rows in made.items():
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


def build(folder, task=None, model=None, **changes) -> Setting:
    own = {"task": {"name": "custom", "data": str(folder), "train_rows": None, "eval_rows": None, **task}} if task else {}
    base = {"model": str(folder / model)} if model else {}
    tables: dict[str, Any] = {"clients": {"partition": "iid", "count": 1, "column": None}, "training": SGD} | own | changes
    tables["base"] = base | changes.get("base", {})
    config = configuration(**tables)
    loaded = load_task(config.task, config.seed)
    place = ModelContext(config, loaded)
    setting = Setting(place, place.work.tokens(loaded.train).select(range(ROWS)))
    torch.manual_seed(3)
    with torch.no_grad():  # no factor is zero, so that each has a gradient
        for layer in lora_layers(place.model).values():
            layer.parameter("B").normal_(std=0.1)
    return setting


ADAPTED = {"lora": {"r": 2, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}}
KINDS = {
    "lora": lambda folder: build(folder),
    "both": lambda folder: build(folder, CLASSES, **ADAPTED),
    "score": lambda folder: build(folder, SCORES, **ADAPTED),
    "image": lambda folder: build(folder, IMAGES, "vit", **ADAPTED),
    "bfloat16": lambda folder: build(folder, base={"dtype": "bfloat16"}),
    "nf4": lambda folder: build(folder, base={"quantization": "nf4"}),
    "shared": lambda folder: build(folder, CLASSES, "albert", lora={"r": 2, "alpha": 8, "target_modules": ["query", "value", "ffn"]}),
}


@pytest.fixture(scope="module")
def settings(folder):
    made: dict[str, Setting] = {}

    def of(kind):
        if kind not in made:
            made[kind] = KINDS[kind](folder)
        return made[kind]

    return of


@pytest.mark.parametrize("kind", ["head", *KINDS])
def test_rows_are_clipped_one_by_one(settings, kind):
    """Norms and clipped sum against autograd on each row alone; rows differ in length, and the bound is below their median."""
    setting = settings("both" if kind == "head" else kind)
    set_trained(setting.model, "" if kind == "head" else "AB")
    alone = setting.alone()
    norms, tolerance = [norm(row) for row in alone], 3e-2 if kind in ("bfloat16", "nf4") else 1e-4
    with per_example_gradients(setting.model):
        setting.model.train()
        losses_of(setting.model, setting.batch(range(ROWS)), setting.place.work.task.kind).sum().backward()
        samples = {name: one.grad_sample.float() for name, one in setting.trained().items()}
    for number, row in enumerate(alone):
        assert difference({name: sample[number] for name, sample in samples.items()}, row) < tolerance * norms[number]
    clip = 0.7 * float(np.median(norms))
    (seen,) = setting.private(plan(clip=clip))
    expected = clipped_sum(alone, clip)
    assert difference({name: ROWS * one for name, one in seen.items()}, expected) < tolerance * clip * ROWS
    assert difference({name: ROWS * one for name, one in seen.items()}, clipped_sum(alone, HUGE)) > 0.05 * norm(expected)
    set_trained(setting.model, "AB")


@pytest.mark.parametrize("kind", ["both", "score", "image"])
def test_without_noise_and_clipping_it_is_the_plain_trainer(settings, kind):
    """Three steps of all rows, with Adam, its weight decay and a warm-up: the same model, but for rounding."""
    setting = settings(kind)
    start = {name: one.detach().clone() for name, one in setting.trained().items()}
    ends = []
    for private in (True, False):
        load(setting, start)
        with _trainer(setting.model, setting.place.work, 0, setting.rows, None, None, plan(steps=3) if private else None) as trainer:
            adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_steps": 2, "adam_epsilon": 1e-3}
            for key, value in (adam | {"weight_decay": 0.1, "max_grad_norm": 0.0}).items():
                setattr(trainer.args, key, value)
            if not private:
                trainer.args.max_steps, trainer._train_batch_size = 3, ROWS
            trainer.train()
        ends.append({name: one.detach().clone() for name, one in setting.trained().items()})
    load(setting, start)
    assert difference(*ends) < 1e-3 * difference(ends[0], start)
    assert difference(ends[0], start) > 0


@torch.no_grad()
def load(setting, tensors):
    for name, one in setting.model.named_parameters():
        if name in tensors:
            one.copy_(tensors[name])


@pytest.fixture
def both(settings):
    """The classifier, its numbers given back."""
    setting = settings("both")
    start = {name: one.detach().clone() for name, one in setting.trained().items()}
    yield setting
    load(setting, start)


def gradient_of(setting, rows, **settings):
    """The first step's, times what it was divided by; the model as before."""
    start = {name: one.detach().clone() for name, one in setting.trained().items()}
    first = setting.private(plan(**settings), rows)[0]
    load(setting, start)
    return {name: settings.get("batch", ROWS) * one for name, one in first.items()}


def test_one_record_moves_the_sum_by_the_bound(both):
    """Added, at most C; changed, at most 2 C. Without clipping it moves by more."""
    clip = 0.5 * min(norm(row) for row in both.alone())
    fewer, changed = both.rows.select(range(ROWS - 1)), both.rows.select([*range(ROWS - 1), 0])
    whole, without, other = (gradient_of(both, rows, clip=clip) for rows in (both.rows, fewer, changed))
    assert 0.9 * clip < difference(whole, without) < clip * 1.0001
    assert difference(whole, other) < 2 * clip * 1.0001
    assert difference(gradient_of(both, both.rows), gradient_of(both, fewer)) > 1.5 * clip


def test_the_sum_is_divided_by_the_expected_batch(both):
    whole = gradient_of(both, both.rows)
    assert difference(gradient_of(both, both.rows, batch=5), whole) < 1e-5 * norm(whole)


def test_parts_of_a_batch_make_no_difference(both):
    sums = []
    for size in (2, 8):
        both.place.config.training["per_device_train_batch_size"] = size
        sums.append(gradient_of(both, both.rows, clip=1.0))
    assert difference(*sums) < 1e-5 * norm(sums[0])


def test_a_batch_of_no_rows_is_a_step_of_noise(both):
    """Its standard deviation is sigma C / b."""
    seen = both.private(plan(sigma=2.0, rate=1e-12, steps=3, batch=4, clip=0.5))
    assert len(seen) == 3
    for name in both.trained():
        assert all(float(step[name].abs().min()) > 0 for step in seen)
    numbers = torch.cat([one.flatten() for step in seen for one in step.values()])
    assert abs(float(numbers.std()) / 0.25 - 1) < 5 / math.sqrt(2 * len(numbers))
    assert abs(float(numbers.mean())) < 5 * 0.25 / math.sqrt(len(numbers))
    assert len(numbers) > 3000


def test_nobody_can_repeat_the_noise_and_all_else_is_repeated(both):
    """Two runs of one seed differ in noise and in rows, and without both agree to the bit."""
    one, two = (both.private(plan(sigma=1.0, rate=1e-12), seed=4)[0] for _ in range(2))
    assert all(not torch.equal(one[name], two[name]) for name in one)
    left, right = (gradient_of(both, both.rows, clip=1.0) for _ in range(2))
    assert all(torch.equal(left[name], right[name]) for name in left)
    with _trainer(both.model, both.place.work, 4, both.rows, None, None, plan(rate=0.5, steps=40)) as trainer:
        assert list(trainer.get_train_dataloader().batch_sampler) != list(trainer.get_train_dataloader().batch_sampler)


@pytest.mark.parametrize("kind", ["dropout of the adapter", "dropout of the model"])
def test_one_record_moves_the_sum_by_the_bound_whatever_the_dropout(folder, kind):
    """A longer row in front would shift and reshape the masks of all others, if there were any."""
    changes = {"lora": {**ADAPTED["lora"], "dropout": 0.5}} if kind == "dropout of the adapter" else ADAPTED
    setting = build(folder, CLASSES, **changes)
    if kind == "dropout of the model":
        for layer in setting.model.get_base_model().model.layers:
            layer.self_attn.attention_dropout = 0.5
    longer = setting.rows[3]
    longer = {name: longer[name] * 3 if name in ("input_ids", "attention_mask") else longer[name] for name in setting.rows.column_names}
    more = concatenate_datasets([Dataset.from_list([longer], features=setting.rows.features), setting.rows])
    clip = 0.05
    without, with_it = (gradient_of(setting, rows, batch=1, clip=clip) for rows in (setting.rows, more))
    assert difference(with_it, without) <= clip * (1 + 1e-3)
    assert difference(with_it, without) > 0.5 * clip


def test_noise_of_tensors_and_of_steps_is_not_the_same(both):
    """A tensor whose gradient a server has made zero shows its noise, which must say nothing of any other."""
    steps = both.private(plan(sigma=2.0, rate=1e-12, steps=4, batch=4, clip=0.5))
    flat = [one.flatten()[:64].double() for step in steps for one in step.values()]
    alike = np.corrcoef(torch.stack([one for one in flat if len(one) == 64]).numpy())
    assert len(alike) >= 8
    assert np.abs(alike - np.eye(len(alike))).max() < 0.7  # of 64 numbers: 5.6 standard deviations


def test_a_row_that_the_model_cannot_compute_counts_as_zero(settings, caplog):
    """A token that it has no embedding for: whether it was drawn must not end the round. Others of its part are as they were."""
    setting = settings("both")
    odd = setting.rows.map(lambda row, number: {"input_ids": [10**6] if number == 5 else row["input_ids"]}, with_indices=True)
    rest = setting.rows.select([number for number in range(ROWS) if number != 5])
    spoilt, expected = gradient_of(setting, odd, clip=1.0), gradient_of(setting, rest, clip=1.0)
    assert difference(spoilt, expected) < 1e-5 * norm(expected)
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("of 12 rows that were drawn, 11 were used; 1 could not be computed, the last for IndexError: ")
    assert caplog.messages[0].endswith(": they count as zero")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory for a row's gradient"), BaseException("a panic")])
def test_a_row_whose_gradient_fails_counts_as_zero(error, folder, monkeypatch):
    """Whatever the failed pass left in the hooks, the others of its part are as they were."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model.forward = lambda x: SimpleNamespace(logits=nn.Sequential.forward(model, x))
    rows = [{"x": torch.randn(3), "labels": torch.tensor(number % 2)} for number in range(12)]
    odd = {"x": torch.full((3,), 77.0), "labels": torch.tensor(0)}
    samplers = GradSampleModule.GRAD_SAMPLERS
    plain = samplers[nn.Linear]

    def failing(layer, activations, gradients):
        if (activations[0] == 77).any():
            raise error
        return plain(layer, activations, gradients)

    monkeypatch.setitem(samplers, nn.Linear, failing)

    def gradient(some):
        arguments = TrainingArguments(str(folder / "t"), use_cpu=True, remove_unused_columns=False, per_device_train_batch_size=16)
        given = {"model": model, "train_dataset": some, "data_collator": stacked}
        with private_trainer(plan(batch=12), "classification", arguments, **given) as trainer:
            trainer.create_optimizer()
            for part in next(iter(trainer.get_train_dataloader()))["parts"]:
                trainer._add(model, part)
            return {name: one.summed_grad.clone() for name, one in model.named_parameters()}

    assert difference(gradient([*rows, odd]), expected := gradient(rows)) < 1e-6 * norm(expected)


def test_rows_of_one_shape_are_together_and_those_that_fail_are_told():
    rows = [{"x": torch.zeros(3)}, {"x": torch.zeros(3)}, {"x": torch.zeros(2)}, {"x": "no tensor"}, {"x": torch.zeros(3)}]
    made = _in_parts(rows, stacked, 2)
    assert [tuple(part["x"].shape) for part in made["parts"]] == [(2, 3), (1, 3), (1, 2)]
    assert (made["drawn"], [reason.partition(":")[0] for reason in made["failed"]]) == (5, ["TypeError"])


@pytest.mark.parametrize("kind", ["causal-lm", "image-classification"])
def test_no_row_changes_what_another_is(kind):
    """Padded on the left, positions count from the longest row; a processor that pads makes images as large as the largest."""
    if kind == "causal-lm":
        processor = bytewise()
        processor.padding_side = "left"
        rows = [{name: [1] * length for name in ("input_ids", "attention_mask", "labels")} for length in (3, 7, 3, 5, 3)]
    else:
        halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        processor, rows = ImageProcessor(ViTImageProcessorPil(do_resize=False, do_pad=True, **halves), "RGB"), []
        for number, size in enumerate([(32, 32), (64, 48), (32, 32), (48, 48), (32, 32)]):
            Image.new("RGB", size).save(file := io.BytesIO(), "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "labels": number})
    collate = collator(kind, processor)
    padded = {name: tuple(one.shape) for name, one in collate(rows).items()}
    for some in (rows, rows[2:], rows[::2]):
        parts = _in_parts(some, collate, 2)["parts"]
        made = [{name: one[row : row + 1] for name, one in part.items()} for part in parts for row in range(len(part["labels"]))]
        alone = sorted((collate([row]) for row in some), key=str)
        assert all(len(part["labels"]) <= 2 for part in parts)
        for mine, its in zip(sorted(made, key=str), alone, strict=True):
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[name], its[name]) for name in its)
    assert any(shape[1:] != its[name].shape[1:] for name, shape in padded.items()), "the collator pads"


def test_a_factor_that_no_float32_has_is_zero():
    """Rounded up it would be twice the bound."""
    one = torch.nn.Parameter(torch.zeros(4))
    optimizer = PrivateOptimizer(torch.optim.SGD([one]), noise_multiplier=0.0, max_grad_norm=7.2e-8, expected_batch_size=1)
    for size in (1e38, 1e30, 1e20, 1e10):
        one.grad_sample, one.summed_grad = torch.tensor([[size, 0.0, 0.0, 0.0]]), None
        optimizer.clip_and_accumulate()
        assert float(one.summed_grad.norm()) <= 7.2e-8 * (1 + 1e-6)


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_model_that_is_random_by_itself_is_refused(share):
    class Dropping(nn.Linear):
        """An owner of what is trained has its own dropout, which hooks need in training."""

        def forward(self, x):
            return SimpleNamespace(logits=torch.nn.functional.dropout(super().forward(x), share, self.training))

    rows = [{"x": torch.randn(64), "labels": torch.tensor(number)} for number in range(3)]
    with pytest.raises(ModelError, match="it is random, even without dropout"):
        require_sound(Dropping(64, 200), rows, stacked, "classification", ("AB",))


@pytest.mark.parametrize("size", [1000, 2**20])
def test_a_norm_is_that_of_float64(size):
    one = torch.nn.Parameter(torch.zeros(size))
    optimizer = PrivateOptimizer(torch.optim.SGD([one]), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)
    one.grad_sample = torch.full((1, size), 0.37)
    optimizer.clip_and_accumulate()
    assert abs(float(one.summed_grad.double().norm()) - 1) < 2e-6


def test_a_row_without_a_finite_gradient_counts_as_zero(settings, caplog):
    """And where there is no other, the party's log has an error."""
    setting = settings("score")
    odd = setting.rows.map(lambda row, number: {"labels": math.inf if number == 5 else row["labels"]}, with_indices=True)
    rest = setting.rows.select([number for number in range(ROWS) if number != 5])
    spoilt, expected = gradient_of(setting, odd, clip=1.0), gradient_of(setting, rest, clip=1.0)
    assert difference(spoilt, expected) < 1e-5 * norm(expected)
    assert norm(expected) > 0.5
    assert caplog.messages == ["of 12 rows that were drawn, 11 were used; 1 had no finite gradient: they count as zero"]
    assert not norm(gradient_of(setting, odd.select([5]), clip=1.0))
    assert caplog.records[-1].levelno == logging.ERROR
    assert "0 were used" in caplog.messages[-1]


def test_under_bfloat16_autocast_the_bound_holds_to_float32(folder, monkeypatch):
    """A row's gradient is in 16 bits there; what is added of it has norm C to six digits, which a norm in 16 bits would miss."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # given back afterwards
    setting = build(folder, CLASSES, **ADAPTED, training=SGD | {"bf16": True, "use_cpu": True})
    samples = []
    for row in range(3):
        found = gradient_of(setting, setting.rows.select([row]), clip=0.01)
        assert abs(norm(found) / 0.01 - 1) < 3e-4
        samples.append(found)
    assert difference(samples[0], samples[1]) > 1e-3
    assert "autocast" in repr(setting.model.forward).lower() or hasattr(setting.model, "_original_forward")
    AcceleratorState._reset_state(True)


def marks(model):
    """What hooks and gradients there are."""
    on_parameters = [name for name, one in model.named_parameters() if set(LEFT) & set(vars(one)) or one.grad is not None]
    on_modules = [
        (
            name,
            len(one._forward_hooks),
            len(one._backward_hooks),
            {"activations", "max_batch_len", "ft_compute_sample_grad"} & set(vars(one)),
        )
        for name, one in model.named_modules()
    ]
    return on_parameters + on_modules + [name for name in vars(model) if "grad_sample" in name]


def test_nothing_is_left_of_the_hooks(both):
    """After training, and after an exception between forward and backward; then the model trains and measures as any other."""
    before = marks(both.model)
    both.private(plan(sigma=1.0, clip=1.0))
    assert marks(both.model) == before

    def broken():
        with per_example_gradients(both.model):
            both.model.train()
            losses_of(both.model, both.batch([0, 1]), "classification")
            assert marks(both.model) != before
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert marks(both.model) == before
    update, _ = local_update(both.model, "client-1", 1, ClientData(both.rows, both.rows), both.place.work)
    assert update.num_examples == ROWS
    assert evaluate(both.model, both.rows, both.place.work)["rows"] == ROWS


@pytest.mark.parametrize(
    ("method", "moved"),
    [("ffa", ("B", "B")), ("fedsvd", ("B", "B")), ("rolora", ("B", "A")), ("fed-sb", ("C", "C")), ("fedex", ("AB", "AB"))],
)
def test_methods_through_two_rounds(folder, method, moved):
    """An update says the stated rows, and no metrics; the factors that the method trains in a round are those that have moved."""
    small = {"training": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1}}
    kept = {"local": {"schedule": "run", "optimizer_state": "reset" if method in ("rolora", "fedsvd") else "keep"}}
    setting = build(folder, method=method, privacy={**PRIVATE, "ledger": "unused"}, **small, **kept)
    moments, steps = None, []
    for round in (1, 2):
        before = {name: layer.pair().parts for name, layer in lora_layers(setting.model).items()}
        data = ClientData(setting.rows, setting.rows)
        update, moments = local_update(
            setting.model, "client-1", round, data, setting.place.work, moments, lambda step, of: steps.append((step, of))
        )
        assert (update.num_examples, update.metrics) == (40, {})
        assert steps == round * [(step, 5) for step in range(1, 6)]  # of 40 stated rows, where there are 12
        for name, pair in update.adapter.items():
            changed = "".join(part for part, old in before[name].items() if not torch.equal(pair.parts[part], old))
            assert changed == moved[round - 1]
    assert (moments is None) == (method in ("rolora", "fedsvd"))


class Toy(nn.Module):
    """A model that uses a weight once more than hooks can see, or never."""

    def __init__(self, twice=False):
        super().__init__()
        self.layer, self.twice = nn.Linear(3, 2), twice

    def forward(self, x):
        hidden = self.layer(x)
        return SimpleNamespace(logits=hidden + x @ self.layer.weight.T if self.twice else hidden)


def train_toy(model, folder, spoil=lambda trainer: None, **more):
    generator = torch.Generator().manual_seed(2)
    rows = [{"x": torch.randn(3, generator=generator), "labels": torch.tensor(number % 2)} for number in range(ROWS)]
    arguments = TrainingArguments(
        str(folder / "toy"), report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, **more
    )
    stacked = {"data_collator": lambda few: {name: torch.stack([row[name] for row in few]) for name in few[0]}}
    with private_trainer(plan(sigma=1.0, clip=1.0), "classification", arguments, model=model, train_dataset=rows, **stacked) as trainer:
        spoil(trainer)
        trainer.train()


def test_a_gradient_that_is_not_the_parameters_own_stops_it(folder):
    """Training is checked as it goes, whatever the probe said before."""
    train_toy(Toy(), folder)
    with pytest.raises(TrainingError, match=r"no gradient of single rows for layer.weight \(1 such\): nothing is sent"):
        train_toy(Toy(twice=True), folder)
    with pytest.raises(TrainingError, match=r"no gradient of single rows for layer.weight \(2 such\): nothing is sent"):
        train_toy(Toy(), folder, lambda trainer: trainer.model.layer._backward_hooks.clear())
    with pytest.raises(TrainingError, match=r"training did not move layer.weight \(2 such\): nothing is sent"):
        train_toy(Toy(), folder, learning_rate=1e-30)

    def replaced(trainer):
        trainer.model.layer.weight = nn.Parameter(trainer.model.layer.weight.detach().clone())

    with pytest.raises(TrainingError, match="the optimiser's parameters are not those that are trained"):
        train_toy(Toy(), folder, replaced)


def test_a_sound_model_passes_the_probe_as_it_was(settings):
    for kind in KINDS:
        setting = settings(kind)
        before, marked = {name: one.clone() for name, one in setting.model.state_dict().items()}, marks(setting.model)
        check_trainer(setting.model, setting.rows, private_work(setting))
        assert all(torch.equal(one, before[name]) for name, one in setting.model.state_dict().items())
        assert marks(setting.model) == marked


def private_work(setting):
    work = setting.place.work
    config = work.config.model_copy(update={"privacy": work.config.privacy.model_copy(update=PRIVATE)})
    return type(work)(config, work.task, work.processor, work.trainer)


@pytest.mark.parametrize(
    ("task", "model", "lora", "told"),
    [
        (None, None, {"target_modules": ["embed_tokens", "q_proj"]}, ["model.embed_tokens (it is not called as a module"]),
        (
            None,
            "moe",
            {"target_modules": ["q_proj", "gate_proj", "up_proj"]},
            ["model.layers.0.mlp.shared_expert.gate_proj, model.layers.0.mlp.shared_expert.up_proj (it sees tokens"],
        ),
    ],
)
def test_modules_without_a_gradient_of_single_rows_are_refused_by_name(folder, task, model, lora, told):
    setting = build(folder, task, model, lora={"r": 2, "alpha": 8, **lora})
    with pytest.raises(ModelError) as error:
        check_trainer(setting.model, setting.rows, private_work(setting))
    assert str(error.value).startswith("private training needs the gradient of every single row, and has none for ")
    assert all(part in str(error.value) for part in told), str(error.value)
    assert "q_proj" not in str(error.value)
    assert "\n" not in str(error.value)


class Odd(nn.Module):
    """Everything that is wrong with modules, in one. Where rows are mixed, the gradient of `plain`, too, depends on those beside."""

    def __init__(self, mixing):
        super().__init__()
        self.mixing = mixing
        self.plain, self.unused, self.tokens = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(1, 1)
        self.counted, self.beside, self.raw = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.ParameterList([torch.ones(4)])

    def forward(self, x):
        tokens = self.tokens(x.reshape(-1, 1)).view_as(x)
        mixed = self.beside(x - x.mean(dim=0) if self.mixing else x)
        return SimpleNamespace(logits=self.plain(self.counted(x)) + tokens + mixed * self.raw[0])


@pytest.mark.parametrize("mixing", [True, False])
def test_all_odd_modules_are_told_at_once_and_the_model_is_as_before(mixing):
    model, rows = Odd(mixing), [{"x": torch.randn(4), "labels": torch.tensor(number)} for number in range(3)]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ModelError) as error:
        require_sound(model, rows, stacked, "classification", ("AB",))
    for part in ("counted (it keeps buffers", "unused (the loss does not", "tokens (it sees tokens", "raw (it is not called"):
        assert part in str(error.value), str(error.value)
    assert ("beside, plain (its gradient of a row depends on the rows beside it)" in str(error.value)) == mixing
    assert ("plain" in str(error.value)) == mixing
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.requires_grad for one in model.parameters())


def test_settings_that_do_not_go_are_one_line():
    """All of them at once, each with its reason; over the defaults, and what is post-processing, nothing is said."""
    privacy = {"privacy": {**PRIVATE, "ledger": "unused"}}
    wrong = {"fp16": True, "label_smoothing_factor": 0.1, "optim": "lomo", "max_grad_norm": 0.3, "lr_scheduler_type": "greedy"}
    wrong["length_column_name"] = "rows"  # of those that no one has looked at
    bad = configuration(method="keep", base={"quantization": "int8"}, training=wrong, local={"trainer": "own:make"}, **privacy)
    with pytest.raises(ConfigError) as error:
        require_private(bad)
    keys = [f"training.{key}" for key in wrong]
    for part in ("method = 'keep' (use one of ffa, fed-sb, rolora, fedsvd)", "local.trainer", "base.quantization", *keys):
        assert part in str(error.value)
    require_private(bad.model_copy(update={"privacy": configuration().privacy}))
    fine = {"max_grad_norm": 1.0, "optim": "adamw_torch", "bf16": True, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
    require_private(configuration(method="ffa+balanced", training=fine, **privacy))
    assert {name for name, row in METHODS.items() if row.private == "warns"} == {"fedex", "fedit", "reinit"}
    assert {name for name, row in METHODS.items() if row.private == "yes"} == {"ffa", "fed-sb", "rolora", "fedsvd"}
    defaults = TrainingArguments("unused", use_cpu=True)
    assert all(getattr(defaults, key) in harmless or key in ("accelerator_config", "fsdp") for key, (harmless, _) in REFUSED.items())
    assert {field.name for field in fields(TrainingArguments)} > FREE


def test_unnamed_classes_are_refused():
    own = {"name": "custom", "train": "rows.csv", "train_rows": None, "eval_rows": None}
    config = configuration(task=own, clients={"partition": "iid", "column": None}, privacy={**PRIVATE, "ledger": "unused"})
    with pytest.raises(ConfigError, match=re.escape("classes that the rows decide (name them all in task.labels)")):
        require_private(config)


def test_a_party_is_held_to_its_own_refusals(settings):
    """Whatever a server's configuration says, training itself looks again."""
    setting = settings("lora")
    work = private_work(setting)
    work = type(work)(work.config.model_copy(update={"method": "fedex-svd"}), work.task, work.processor)
    with pytest.raises(ConfigError, match="fedex-svd"):
        local_update(setting.model, "client-1", 1, ClientData(setting.rows, setting.rows), work)


HARM = {
    "max_grad_norm": 0.3,
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "group_by_length",
    "neftune_noise_alpha": 5.0,
    "fsdp": "full_shard",
    "deepspeed": "plan.json",
    "debug": "underflow_overflow",
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "accelerator_config": {"split_batches": True},
    "parallelism_config": {"dp": 1},
}


@pytest.mark.parametrize("key", REFUSED)
def test_each_field_that_sees_single_rows_is_refused(key):
    config = configuration(method="ffa", privacy={**PRIVATE, "ledger": "unused"})
    with pytest.raises(ConfigError, match=f"training.{key} = "):
        require_private(config.model_copy(update={"training": {key: HARM.get(key, True)}}))


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"training": {"lr_scheduler_type": "reduce_lr_on_plateau"}}, "it follows the loss"),
        ({"local": {"head_rounds": 1}}, "local.head_rounds"),
    ],
)
def test_schedules_that_follow_the_loss_and_a_head_of_its_own_are_refused(tables, words):
    with pytest.raises(ConfigError, match=words):
        require_private(configuration(method="ffa", privacy={**PRIVATE, "ledger": "unused"}, **tables))


def test_what_may_be_set_and_what_may_be_said_are_these():
    """Both lists are promises: whoever adds to one looks here, and says why."""
    assert sorted(FREE) == sorted(
        "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon optim optim_args lr_scheduler_type lr_scheduler_kwargs warmup_steps "
        "num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps bf16 tf32 use_cpu "
        "full_determinism torch_empty_cache_steps dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor".split()
    )
    said = {code for code in WORDS if Failure(code, 3).private == Failure(code)}
    assert said == set("base busy client config labels-unset lacks message model no-data package privacy settings size".split())
