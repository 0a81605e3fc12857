"""A trainer of the party's own: the same training as ours where it says so, held to the adapter, and DPO against the run's start."""

import dataclasses
import json
import math
import shutil
import threading
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
from tests.client.test_first_batch import base
from tests.fake_accelerator import accelerator
from tests.runs.test_resume import StopError, stopping
from tests.runs.test_run import assert_same_bits, configuration, events_of, ignore, tensors
from tests.tasks.test_rows import bytewise
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import DPOConfig, SFTConfig

from fedex_lora import load_model
from fedex_lora.client.arguments import training_arguments, without_trainer
from fedex_lora.client.trainers import find_trainer, with_columns
from fedex_lora.client.training import local_update
from fedex_lora.config import parse_config, read_config, write_config
from fedex_lora.errors import ConfigError, FedexLoraError, TrainingError
from fedex_lora.models.lora import lora_layers
from fedex_lora.offline.verify import verify
from fedex_lora.protocol.dumps import unpack
from fedex_lora.protocol.failures import WORDS, failure_of
from fedex_lora.runs.context import ModelContext
from fedex_lora.runs.estimate import estimate
from fedex_lora.runs.learner import ModelLearner
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.checkpoint import load_base_delta
from fedex_lora.storage.events import ClientDone, of_kind, read_events
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import round_folder, strays
from fedex_lora.storage.updates import read_updates
from fedex_lora.tasks import load_task

PLAIN = """
from transformers import DataCollatorForSeq2Seq, Trainer


def make(model, rows, processor, arguments):
    return Trainer(model, arguments, DataCollatorForSeq2Seq(processor, label_pad_token_id=-100), rows)
"""
WRONG = '''
from copy import deepcopy
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, Trainer
from wrong_helper import NOTHING

NUMBER = 3


def two(model, rows):
    return model


def raises(model, rows, processor, arguments):
    raise KeyError("no such thing")


def exits(model, rows, processor, arguments):
    raise SystemExit


def a_list(model, rows, processor, arguments):
    return [NOTHING]


def another_model(model, rows, processor, arguments):
    return trainer(deepcopy(model), rows, processor, arguments)


def trainer(model, rows, processor, arguments, kind=Trainer, **more):
    return kind(model, arguments, DataCollatorForSeq2Seq(processor, label_pad_token_id=-100), rows, **more)


def own_schedule(model, rows, processor, arguments):
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    return trainer(model, rows, processor, arguments, optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)))


def no_state(model, rows, processor, arguments):
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], 0.1)
    return trainer(model, rows, processor, arguments, optimizers=(optimizer, None))


def no_steps(model, rows, processor, arguments):
    class Idle(Trainer):
        def train(self):
            return None

    return trainer(model, rows, processor, arguments, Idle)


def after(change):
    """A Trainer that does something to the model once it has trained on the rows of client-1 (the probe's are fewer)."""

    def make(model, rows, processor, arguments):
        class Careless(Trainer):
            def train(self):
                done = super().train()
                if len(rows) == 12 and rows[0]["prompt"] == "say 0":
                    with torch.no_grad():
                        change(self)
                return done

        return trainer(model, rows, processor, arguments, Careless)

    return make


def _frozen(self):
    self.model.get_input_embeddings().weight.data[3] += 1e-3


def _merged(self):
    self.model.merge_adapter()


def _shape(self):
    layer = self.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"]
    layer.weight.data = torch.zeros(3, layer.weight.shape[1])


def _replaced(self):
    layer = self.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"]
    layer.weight = torch.nn.Parameter(layer.weight.clone())


def _scaling(self):
    self.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").scaling["default"] *= 2


def _adapter(self):
    self.model.add_adapter("mine", self.model.peft_config["default"])
    self.model.set_adapter("mine")


def _swapped(self):
    self.model = deepcopy(self.model)


def _raises(self):
    self.model.get_input_embeddings().weight.data[3] += 1e-3
    raise ValueError("in the middle")


def _exits(self):
    raise SystemExit("in the middle")


frozen, merged, shape, replaced, scaling, adapter, swapped, fails, leaves = map(
    after, (_frozen, _merged, _shape, _replaced, _scaling, _adapter, _swapped, _raises, _exits)
)
'''


LITTER = (
    PLAIN.replace("make(", "plain(")
    + """

import torch


def make(model, rows, processor, arguments):
    made = plain(model, rows, processor, arguments)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output + 1e3)
    embeddings.extra = torch.nn.Linear(2, 2).requires_grad_(False)
    for one in model.parameters():
        if one.requires_grad:
            one.register_hook(lambda gradient: 0 * gradient)
            one.register_post_accumulate_grad_hook(nine)
    made.train = lambda: train(made)
    return made


def nine(parameter):
    parameter.data.fill_(9.0)


def train(made):
    from transformers import Trainer

    done = Trainer.train(made)
    made.model.config.use_cache = not made.model.config.use_cache
    made.processing_class and made.processing_class.add_tokens(["<new>"])
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    return done
"""
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny Llama, 24 preference rows, and modules with trainers beside the configuration."""
    folder = tmp_path_factory.mktemp("work")
    torch.manual_seed(3)
    base(folder / "base", bytewise())
    made = [
        {"prompt": f"say {n}", "completion": " word" * (n % 5 + 1), "chosen": " yes" * (n % 3 + 1), "rejected": " no" * (n % 4 + 1), "n": n}
        for n in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (folder / "plain_trainer.py").write_text(PLAIN)
    (folder / "wrong_trainer.py").write_text(WRONG)
    (folder / "litter_trainer.py").write_text(LITTER)
    (folder / "wrong_helper.py").write_text("NOTHING = None\n")
    (folder / "broken_trainer.py").write_text("import a_module_that_nobody_has\n")
    return folder


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
TURNS = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def setting(work, trainer=None, rounds=1, training=None, task=None, local=None, lora=None, **more):
    tree = {
        "rounds": rounds,
        "torch_threads": 1,
        "base": {"model": "base"},
        "task": {"name": "custom", "kind": "causal-lm", "train": "rows.jsonl", "eval": "rows.jsonl", **(task or {})},
        "clients": {"count": 2, "holdout": 0.0},
        "lora": {"r": 2, "target_modules": ["q_proj", "down_proj"], **(lora or {})},
        "training": {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 5e-3, "use_cpu": True, **(training or {})},
        "local": {**({"trainer": trainer} if trainer else {}), **(local or {})},
        **more,
    }
    (work / "config.toml").write_text(write_config(parse_config(tree)))
    return read_config(work / "config.toml")


def finished(config, out):
    run(config, out, ignore)
    return out


def moved(out, number=1):
    """What each client's update adds to each weight, in fp64."""
    return {
        (update.client_id, name): pair.delta()
        for update in read_updates(round_folder(out, number), [])
        for name, pair in update.adapter.items()
    }


def size(tensors):
    return math.sqrt(sum(float(one.double().norm()) ** 2 for one in tensors.values()))


def distance(left, right):
    assert left.keys() == right.keys()
    return size({name: left[name].double() - right[name].double() for name in left}) / size(right)


@pytest.fixture(scope="module")
def ours(work, tmp_path_factory):
    return finished(setting(work, rounds=2), tmp_path_factory.mktemp("ours") / "run")


@pytest.mark.parametrize("trainer", ["trl:SFTTrainer", "plain_trainer:make"])
def test_another_trainer_of_the_same_loss_gives_the_same_update(trainer, work, ours, tmp_path):
    """fp32, no checkpointing, no dropout, no packing, the same batches."""
    out = finished(setting(work, trainer, rounds=2), tmp_path / "run")
    theirs, mine = moved(out), moved(ours)
    print(f"{trainer}: sizes {size(theirs):.6f} and {size(mine):.6f}, apart by {distance(theirs, mine):.1e} of it")
    assert size(mine) > 1e-3
    assert distance(theirs, mine) < 1e-5
    assert distance(moved(out, 2), moved(ours, 2)) < 1e-4  # from round 2 on Adam has felt the rounding
    assert distance({name: 2 * one for name, one in theirs.items()}, mine) > 0.9  # the measure can fail
    assert strays(out) == []
    assert_same_bits(out, finished(setting(work, trainer, rounds=2), tmp_path / "again"))


@pytest.mark.parametrize("method", ["ffa", "rolora", "full-ft"])
def test_what_a_method_freezes_stays_frozen(method, work, tmp_path):
    """PEFT makes all factors trainable when adapters are added or switched, which TRL does."""
    trainers = [None, "trl:SFTTrainer"] + (["trl:DPOTrainer"] if method != "full-ft" else [])
    settings = [setting(work, one, rounds=2, method=method, task={"completion": "{chosen}"}) for one in trainers]
    outs = [finished(one, tmp_path / f"run-{number}") for number, one in enumerate(settings)]
    mine, theirs = (tensors(out) for out in outs[:2])
    assert distance(theirs, mine) < 1e-5
    if method == "ffa":
        start = ModelContext(settings[2], load_task(settings[2].task, 0)).first
        after = read_result(outs[2] / "final").adapter
        assert all(torch.equal(after[name].A, pair.A) and not torch.equal(after[name].B, pair.B) for name, pair in start.items())


@pytest.mark.parametrize("local", [{"optimizer_state": "keep"}, {"schedule": "run"}], ids=lambda local: next(iter(local)))
def test_moments_and_schedules_go_on_under_another_trainer(local, work, ours, tmp_path):
    mine = finished(setting(work, rounds=2, local=local), tmp_path / "ours")
    theirs = finished(setting(work, "trl:SFTTrainer", rounds=2, local=local), tmp_path / "theirs")
    assert distance(moved(theirs, 2), moved(mine, 2)) < 1e-4
    assert distance(moved(theirs, 2), moved(ours, 2)) > 1e-3  # without them it is another round


@pytest.mark.parametrize("trainer", ["trl:SFTTrainer", "trl:DPOTrainer"])
def test_a_run_that_was_interrupted_ends_in_the_same_bits(trainer, work, tmp_path):
    config = setting(work, trainer, rounds=2, task={"completion": "{chosen}"})
    whole = finished(config, tmp_path / "whole")
    with pytest.raises(StopError):
        run(config, tmp_path / "run", stopping("client_done", 3))
    run(config, tmp_path / "run", ignore, resume=True)
    assert_same_bits(whole, tmp_path / "run")


@pytest.mark.parametrize("trainer", ["trl:SFTTrainer", "trl:DPOTrainer"])
def test_the_model_is_given_back_as_it_was(trainer, work):
    """TRL patches `forward`, turns dropout off, adds `ref`, sets flags and tokens: none of it stays."""
    config = setting(work, trainer, task={"completion": "{chosen}"}, lora={"dropout": 0.25}, training={"gradient_checkpointing": True})
    home = LocalSimulation(config, ignore)
    learner, place = home.pool.learner, home.pool.learner.place
    before = described(place)
    learner.load(place.first, {}, {})
    update, _ = learner.train("client-0", 1, None)
    assert size({name: pair.B for name, pair in update.adapter.items()}) > 0
    assert described(place) == before
    assert list(place.model.peft_config) == ["default"]
    assert {module.p for module in place.model.modules() if isinstance(module, torch.nn.Dropout)} >= {0.25}


def test_what_is_left_lying_about_is_taken_away(work):
    """Hooks of modules, of gradients and of parameters, modules, flags, settings of torch: the next client has none of it."""
    learner = LocalSimulation(setting(work, "litter_trainer:make"), ignore).pool.learner
    place, plain = learner.place, LocalSimulation(setting(work), ignore).pool.learner
    before, process = described(place), (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    learner.load(learner.first, {}, {})
    spoiled, _ = learner.train("client-0", 1, None)
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == process
    assert described(place) == before
    updates = []
    for one in (learner, plain):
        one.load(one.first, {}, {})
        ours_again = dataclasses.replace(one.place.work, trainer=None)
        updates.append(local_update(one.place.model, "client-1", 1, one.data["client-1"], ours_again)[0].adapter)
    assert all(torch.equal(updates[0][name].B, updates[1][name].B) for name in updates[1])
    assert float(next(iter(spoiled.adapter.values())).A.max()) == 9.0  # the hooks were at work


def test_classes_and_columns_of_their_name(work, ours, tmp_path):
    """A column `label` beside the tokens would be taken for the labels."""
    rows = [{"text": f"it is {n}", "label": "odd" if n % 2 else "even", "n": n} for n in range(24)]
    (work / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = "Trainer(model, arguments, None, rows, processing_class=processor)"
    (work / "class_trainer.py").write_text(PLAIN[: PLAIN.index("Trainer(model")] + call)
    task = {"kind": "classification", "train": "classes.jsonl", "eval": "classes.jsonl"}
    outs = [finished(setting(work, trainer, task=task), tmp_path / str(trainer)[:5]) for trainer in (None, "class_trainer:make")]
    assert_same_bits(*outs)


def described(place):
    model, configs = place.model, (place.model.config, place.model.generation_config)
    return (
        {
            name: (type(module).__name__, sorted(vars(module)), module.training, len(module._forward_hooks))
            for name, module in model.named_modules()
        },
        {name: (tuple(one.shape), one.dtype, one.requires_grad, one.grad is None) for name, one in model.named_parameters()},
        [config.to_dict() for config in configs],
        (place.work.processor.pad_token, place.work.processor.eos_token, place.work.processor.chat_template),
    )


def test_four_bits_stay_float32_adapters(work, ours, tmp_path):
    """TRL casts the adapters of a quantised model to bfloat16."""
    home = LocalSimulation(setting(work, "trl:SFTTrainer", base={"model": "base", "quantization": "nf4"}), ignore)
    home.pool.learner.load(home.host.place.first, {}, {})
    update, _ = home.pool.learner.train("client-0", 1, None)
    assert {layer.factor("A").dtype for layer in lora_layers(home.host.place.model).values()} == {torch.float32}
    plain = LocalSimulation(setting(work, base={"model": "base", "quantization": "nf4"}), ignore)
    plain.pool.learner.load(plain.host.place.first, {}, {})
    mine, _ = plain.pool.learner.train("client-0", 1, None)
    pairs = [({name: pair.delta() for name, pair in one.adapter.items()}) for one in (update, mine)]
    assert distance(*pairs) < 1e-4


@pytest.mark.parametrize(
    ("trainer", "more", "message"),
    [
        ("nowhere:make", {}, "there is no module nowhere beside the configuration"),
        ("nowhere.trainer:make", {}, r"there is no module nowhere\.trainer"),
        (
            "broken_trainer:make",
            {},
            "cannot be imported: ModuleNotFoundError: .*nobody_has' .broken_trainer.py, line 1.",
        ),
        ("plain_trainer:mike", {}, "there is no mike: did you mean make"),
        ("trl:SFTrainer", {}, "did you mean SFTTrainer"),
        ("wrong_trainer:NUMBER", {}, "NUMBER is a int: name a function"),
        ("wrong_trainer:two", {}, r"it must take \(model, rows, processor, arguments\)"),
        ("wrong_trainer:raises", {}, r"raised KeyError: 'no such thing' \(wrong_trainer.py, line 17\)"),
        ("wrong_trainer:exits", {}, r"raised SystemExit \(wrong_trainer.py, line 21\)"),
        ("wrong_trainer:a_list", {}, "returned a list: return a transformers.Trainer"),
        ("wrong_trainer:another_model", {}, "returned a Trainer of another model"),
        ("wrong_trainer:no_steps", {}, "made no step"),
        ("wrong_trainer:own_schedule", {"local": {"schedule": "run"}}, "brings its own schedule"),
        ("wrong_trainer:no_state", {"local": {"optimizer_state": "keep"}}, "optimiser that cannot be kept"),
        ("trl:SFTTrainer", {"training": {"packin": True}}, "unknown key training.packin: did you mean training.packing"),
        (
            "trl:SFTTrainer",
            {"training": {"assistant_only_loss": True}},
            "training.assistant_only_loss is not for trl:SFTTrainer, for the rows",
        ),
        ("plain_trainer:make", {"training": {"packing": True}}, "unknown key training.packing"),
        ("trl:DPOTrainer", {"training": {"sync_ref_model": True}}, "training.sync_ref_model is not for trl:DPOTrainer, for the reference"),
        (
            "trl:SFTTrainer",
            {"training": {"max_length": 16}},
            "would cut or drop rows that count in the mean, and say nothing: set task.max",
        ),
        ("trl:DPOTrainer", {"training": {"beta": "high"}}, "training.beta = 'high': give a finite number"),
        ("trl:DPOTrainer", {"method": "full-ft"}, "needs adapters"),
        ("trl:DPOTrainer", {"task": {"train": "plain.jsonl", "eval": "plain.jsonl"}}, "chosen, rejected not there"),
        ("trl:DPOTrainer", {"task": {"train": "empty.jsonl", "eval": "empty.jsonl"}}, "1 of 6 rows have no chosen or no rejected answer"),
        ("trl:DPOTrainer", {"task": {"train": "empty.jsonl"}}, "1 of 3 rows have no chosen or no rejected answer"),  # of one client
        ("trl:DPOTrainer", {"task": {"train": "plain.jsonl"}}, "chosen, rejected not there"),
        ("trl:SFTTrainer", {"task": {"kind": "classification", "text": ["prompt"], "label": "completion"}}, "task.kind = 'causal-lm'"),
    ],
    ids=lambda value: value if isinstance(value, str) and ":" in value and " " not in value else "",
)
def test_one_line_before_anything_is_written(trainer, more, message, work, tmp_path):
    row = {"prompt": "a", "completion": "b"}
    (work / "plain.jsonl").write_text(6 * (json.dumps(row) + "\n"))
    full = row | {"chosen": "c", "rejected": "d"}
    (work / "empty.jsonl").write_text(5 * (json.dumps(full) + "\n") + json.dumps(full | {"rejected": ""}) + "\n")
    with pytest.raises(FedexLoraError, match=message) as caught:
        run(setting(work, trainer, **more), tmp_path / "run", ignore)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["make", "package.:make", ":make", "plain_trainer:", "plain_trainer:make()"])
def test_a_name_is_a_module_and_a_function(name, work):
    with pytest.raises(ConfigError, match=r"write it as package\.module:function"):
        setting(work, name)


def test_where_a_module_is_looked_for(work, tmp_path, monkeypatch):
    """Beside the configuration, then where the command runs; what is installed is last, and no file of a folder hides it."""
    assert setting(work, "plain_trainer:make").local.trainer == f"{work}/plain_trainer:make"
    assert setting(work, "plain_trainer.py:make").local.trainer == f"{work}/plain_trainer:make"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "trainers_of_mine.py").write_text(PLAIN)
    (tmp_path / "json.py").write_text("def dumps(model, rows, processor, arguments): ...")
    monkeypatch.chdir(tmp_path)
    assert setting(work, "mine.trainers_of_mine:make").local.trainer == f"{tmp_path}/mine.trainers_of_mine:make"
    assert find_trainer(f"{tmp_path}/mine.trainers_of_mine:make").make.__module__ == "mine.trainers_of_mine"
    assert setting(work, "json:dumps").local.trainer == f"{tmp_path}/json:dumps"
    with pytest.raises(ConfigError, match="another module is called json"):
        find_trainer(f"{tmp_path}/json:dumps")
    overrides = ["local.trainer=mine/trainers_of_mine:make"]
    assert read_config(work / "config.toml", overrides).local.trainer == f"{tmp_path}/mine/trainers_of_mine:make"
    assert read_config(work / "config.toml", ["local.trainer=plain_trainer:make"]).local.trainer == f"{work}/plain_trainer:make"
    assert read_config(work / "config.toml", ["local.trainer=trl:SFTTrainer"]).local.trainer == "trl:SFTTrainer"


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ("frozen", "changed base_model.model.model.embed_tokens.weight, which is frozen"),
        ("merged", "merged"),
        ("shape", "changed shape or precision of .*lora_A.default.weight"),
        ("replaced", "replaced or removed the parameter .*lora_A.default.weight"),
        ("scaling", "rank or scaling of model.layers.0.self_attn.q_proj"),
        ("adapter", "trained .*lora_A.mine.weight .* which this run does not train"),
        ("swapped", "trained another model"),
        ("fails", r"raised ValueError: in the middle \(wrong_trainer.py, line"),
        ("leaves", r"raised SystemExit: in the middle \(wrong_trainer.py, line"),
    ],
)
def test_what_a_trainer_may_not_change_is_refused_and_the_next_client_is_as_ever(trainer, words, work, ours):
    home = LocalSimulation(setting(work, f"wrong_trainer:{trainer}"), ignore)
    learner, first = home.pool.learner, home.pool.learner.first
    learner.load(first, {}, {})
    with pytest.raises(TrainingError, match=words) as caught:
        learner.train("client-1", 1, None)
    assert "\n" not in str(caught.value)
    assert (failure_of(caught.value).code, "trainer" in WORDS) == ("trainer", True)
    learner.load(first, {}, {})
    update, _ = learner.train("client-0", 1, None)
    plain = {name: pair for (client, name), pair in moved(ours).items() if client == "client-0"}
    assert plain
    assert all(torch.equal(update.adapter[name].delta(), want) for name, want in plain.items())


def test_a_party_whose_trainer_is_refused_sends_nothing(work, tmp_path):
    failed = []
    config = setting(work, "wrong_trainer:frozen", clients={"count": 2, "holdout": 0.0, "quorum": 0.5})
    run(config, tmp_path / "run", lambda event: failed.append(event) if hasattr(event, "message") else None)
    assert [event.client for event in failed] == ["client-1"]
    assert [update.client_id for update in read_updates(round_folder(tmp_path / "run", 1), [])] == ["client-0"]
    assert "embed_tokens" not in (tmp_path / "run" / "events.jsonl").read_text()


def reference(folder):
    return unpack("reference", (folder / "reference.safetensors").read_bytes())[0]


def log_probabilities(model, tokenizer, rows, answer):
    """Plain torch: the sum of log-softmax over the answer's tokens."""
    sums = []
    for row in rows:
        head = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row[answer] + tokenizer.eos_token)["input_ids"]
        assert ids[: len(head)] == head
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        sums.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(head), len(ids))))
    return torch.tensor(sums, dtype=torch.float64)


@pytest.fixture(scope="module")
def preferred(work, tmp_path_factory):
    """Three rounds of DPO, each of one step on all of a client's rows. The first moves B only: the base gains in the second."""
    training = {"per_device_train_batch_size": 12, "learning_rate": 5e-2, "beta": 0.5}
    config = setting(work, "trl:DPOTrainer", rounds=3, training=training, task={"completion": "{chosen}"})
    out, stamps = tmp_path_factory.mktemp("preferred") / "run", []

    def listen(event):
        if isinstance(event, ClientDone):
            stamps.append({path: path.stat().st_mtime_ns for path in out.glob("clients/*/reference*")})

    run(config, out, listen)
    return SimpleNamespace(config=config, out=out, stamps=stamps)


def rows_of(place, client, config):
    home = LocalSimulation(config, ignore)
    return [dict(row) for row in home.pool.learner.data[client].train.select_columns(["prompt", "chosen", "rejected"])]


def test_the_reference_of_dpo_is_the_model_at_the_run_s_start(work, preferred, tmp_path):
    """In all rounds, as plain torch has it of the untouched base; and worked out anew in round 3, it is the same."""
    out, tokenizer = preferred.out, bytewise()
    untouched = AutoModelForCausalLM.from_pretrained(work / "base").eval()
    assert len(preferred.stamps[-1]) == 2
    assert preferred.stamps[1] == preferred.stamps[-1]  # written once
    assert load_base_delta(round_folder(out, 2))  # so round 3 does not begin with the untouched base
    for client in ("client-0", "client-1"):
        found, rows = reference(out / "clients" / client), rows_of(out, client, preferred.config)
        for answer in ("chosen", "rejected"):
            want = log_probabilities(untouched, tokenizer, rows, answer)
            print(f"{client} {answer}: {float((found[answer] - want).abs().max()):.1e} off, of {float(want.abs().max()):.1f}")
            assert torch.allclose(found[answer].double(), want, atol=1e-3, rtol=1e-5)
    with pytest.raises(StopError):
        run(preferred.config, tmp_path / "run", stopping("client_done", 5))
    kept = reference(tmp_path / "run" / "clients" / "client-1")
    (tmp_path / "run" / "clients" / "client-1" / "reference.safetensors").write_bytes(b"broken")
    run(preferred.config, tmp_path / "run", ignore, resume=True)
    again = reference(tmp_path / "run" / "clients" / "client-1")
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert_same_bits(out, tmp_path / "run")


def test_the_loss_of_later_rounds_is_dpo_s_against_that_reference(work, preferred):
    """-log sigmoid(beta (margin of the model - margin of the reference)), by plain torch, of the model that round 2 made."""
    losses = {(event.round, event.client): event.train_loss for event in of_kind(read_events(preferred.out / "events.jsonl"), ClientDone)}
    assert losses[1, "client-0"] == pytest.approx(math.log(2), abs=1e-6)
    home, result = LocalSimulation(preferred.config, ignore), read_result(round_folder(preferred.out, 2))
    home.pool.learner.load(result.adapter, load_base_delta(round_folder(preferred.out, 2)), {})
    model, rows = home.host.place.model.eval(), rows_of(preferred.out, "client-0", preferred.config)
    now = {answer: log_probabilities(model, bytewise(), rows, answer) for answer in ("chosen", "rejected")}
    start = reference(preferred.out / "clients" / "client-0")
    margin = 0.5 * ((now["chosen"] - now["rejected"]) - (start["chosen"].double() - start["rejected"].double()))
    want = float(-torch.nn.functional.logsigmoid(margin).mean())
    print(f"round 3: {losses[3, 'client-0']:.6f}, by plain torch {want:.6f}")
    assert abs(want - math.log(2)) > 1e-3  # it would be log 2 against a copy of the round's start
    assert losses[3, "client-0"] == pytest.approx(want, rel=1e-4)


def test_the_reference_of_a_run_that_goes_on_from_a_result_is_that_result(work, tmp_path):
    """Learn what is preferred, then by preferences: the reference is what was learnt, adapter and base delta, in both rounds."""
    training = {"per_device_train_batch_size": 12, "learning_rate": 5e-2}
    learnt = finished(setting(work, rounds=2, training=training, task={"completion": "{chosen}"}), tmp_path / "learnt")
    base = {"model": "base", "start": str(learnt)}
    config = setting(work, "trl:DPOTrainer", rounds=2, training={**training, "beta": 0.5}, task={"completion": "{chosen}"}, base=base)
    out = finished(config, tmp_path / "run")
    found, rows = reference(out / "clients" / "client-1"), rows_of(out, "client-1", config)
    for answer in ("chosen", "rejected"):
        want = log_probabilities(load_model(learnt, str(work / "base")), bytewise(), rows, answer)
        untouched = log_probabilities(AutoModelForCausalLM.from_pretrained(work / "base").eval(), bytewise(), rows, answer)
        assert (found[answer] - want).norm() < 0.01 * (want - untouched).norm()
    losses = {(event.round, event.client): event.train_loss for event in of_kind(read_events(out / "events.jsonl"), ClientDone)}
    assert losses[1, "client-0"] == pytest.approx(math.log(2), abs=1e-6)
    assert verify(out)["max_relative_error"] < 1e-6


def test_messages_and_tools_reach_the_trainer_as_they_are(work, tmp_path):
    """Nested objects with other keys in each row, and DPO on chats through the tokenizer's template."""
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"place": "Oslo", "when": 59.9139}}}]
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": calls}],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi", "name": "Ann"}],
    ]
    frame = pd.DataFrame(
        {
            "messages": chats,
            "tools": [None, [{"name": "look"}]],
            "array": [np.array([{"a": np.int64(1)}]), None],
            "label": ["x", "y"],
            "text": ["a", float("nan")],
            "n": [1, 2],
            "scan": [{"bytes": b"\x89PNG", "path": None}, None],
            "sounds": [[b"\xff"], []],
        }
    )
    made = with_columns(load_tokens(2), frame)
    assert made["messages"][:] == chats
    assert made["tools"][:] == [None, [{"name": "look"}]]
    assert made["array"][:] == [[{"a": 1}], None]
    assert (made["text"][:], made["n"][:]) == (["a", None], [1, 2])
    assert not {"scan", "sounds"} & set(made.column_names)
    assert "label" not in made.column_names  # Trainer would take it for the labels


def test_columns_of_the_file_are_never_taken_for_ours(work):
    """`usable` counts what is cut in columns of its own, whatever the file's are called."""
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    names = {"torn": "no", "full_length": "x", "unknown_tokens": "y"}
    (work / "names.jsonl").write_text("".join(json.dumps(row | names) + "\n" for row in rows))
    config = setting(work, "plain_trainer:make", task={"train": "names.jsonl", "eval": "names.jsonl"})
    made = LocalSimulation(config, ignore).pool.learner.data["client-0"].train
    assert {name: made[0][name] for name in names} == names
    assert not any(name.startswith("fedex-lora:") for name in made.column_names)


def load_tokens(rows):
    return Dataset.from_dict({"input_ids": [[1, 2]] * rows, "attention_mask": [[1, 1]] * rows, "labels": [[-100, 2]] * rows})


def test_heads_that_are_trained_whole_are_not_in_the_reference(work, tmp_path):
    config = setting(work, "trl:DPOTrainer", task={"completion": "{chosen}"}, lora={"modules_to_save": ["lm_head"]})
    learner = LocalSimulation(config, ignore).pool.learner
    found = []
    for step in (0.0, 0.1):
        learner.folder = tmp_path / str(step)
        (learner.folder / "client-0").mkdir(parents=True)
        learner.load(learner.first, {}, {name: one + step * torch.arange(len(one))[:, None] for name, one in learner.read()[1].items()})
        learner.train("client-0", 1, None)
        found.append(reference(learner.folder / "client-0"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("chosen", "rejected"))


def test_dpo_of_chats(work):
    config = setting(work, "trl:DPOTrainer", task={"completion": "{chosen}"})
    task = load_task(config.task, config.seed)
    for frame in (task.train, task.eval):
        for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            frame[name] = [[{"role": role, "content": text.strip()}] for text in frame[name]]
    place = ModelContext(config, dataclasses.replace(task, tokenize=lambda tokenizer, rows: load_tokens(len(rows))))
    place.work.processor.chat_template = TEMPLATE
    rows = place.work.tokens(place.work.task.train.iloc[:12])
    learner = ModelLearner(place, {"a": SimpleNamespace(train=rows)}, ignore)
    learner.folder = Path(work / "parties")
    (learner.folder / "a").mkdir(parents=True)
    learner.load(place.first, {}, {})
    update, _ = learner.train("a", 1, None)
    assert size({name: pair.B for name, pair in update.adapter.items()}) > 0
    assert update.metrics["train_loss"] == pytest.approx(math.log(2), abs=0.01)
    found = reference(learner.folder / "a")
    assert torch.isfinite(found["chosen"]).all()
    text = "[user]say 0[assistant]yes"
    ids = place.work.processor(text, add_special_tokens=False)["input_ids"]
    untouched = AutoModelForCausalLM.from_pretrained(work / "base").eval()
    with torch.no_grad():
        logits = untouched(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    assert float(found["chosen"][0]) == pytest.approx(sum(float(logits[i - 1, ids[i]]) for i in range(len(ids) - 3, len(ids))), rel=1e-4)


def test_dpo_of_a_chat_file(work, tmp_path):
    """`task.kind = "chat"` and preferences, from the file: two rounds, one reference, its loss, an exact result."""
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    tokenizer.chat_template = TEMPLATE.replace("}}{% endfor", "}}.{% endfor")
    tokenizer.save_pretrained(shutil.copytree(work / "base", work / "chat_base", dirs_exist_ok=True))
    turns = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()]
    rows = [{name: [{"role": role, "content": row[name].strip()}] for name, role in TURNS.items()} for row in turns]
    (work / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "chat", "train": "chats.jsonl", "eval": "chats.jsonl"}
    training = {"per_device_train_batch_size": 12, "learning_rate": 5e-2, "beta": 0.5}
    config = setting(work, "trl:DPOTrainer", rounds=2, task=task, training=training, base={"model": "chat_base"})
    out, stamps = tmp_path / "run", []

    def listen(event):
        if isinstance(event, ClientDone):
            stamps.append({path: path.stat().st_mtime_ns for path in out.glob("clients/*/reference*")})

    run(config, out, listen)
    assert len(stamps[1]) == 2
    assert stamps[1] == stamps[-1]  # the reference of round 2 is that of round 1
    losses = {(event.round, event.client): event.train_loss for event in of_kind(read_events(out / "events.jsonl"), ClientDone)}
    assert losses[1, "client-0"] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2, "client-0"] < 0.99 * math.log(2)  # of a copy of the round's start it would be log 2
    assert verify(out)["max_relative_error"] < 1e-6
    first = LocalSimulation(config, ignore).pool.learner.data["client-0"].train[0]
    asked, said = (first[name][0]["content"] for name in ("prompt", "chosen"))
    ids = tokenizer(f"[user]{asked}.[assistant]{said}.", add_special_tokens=False)["input_ids"]
    assert first["input_ids"] == ids  # ours are TRL's tokens
    untouched, answer = AutoModelForCausalLM.from_pretrained(work / "base").eval(), sum(label != -100 for label in first["labels"])
    with torch.no_grad():
        logits = untouched(input_ids=torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    want = sum(float(logits[place - 1, ids[place]]) for place in range(len(ids) - answer, len(ids)))
    assert float(reference(out / "clients" / "client-0")["chosen"][0]) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("trainer", "kind"), [("trl:SFTTrainer", SFTConfig), ("trl:DPOTrainer", DPOConfig)])
def test_trl_s_defaults_are_ours(trainer, kind, work):
    config = setting(work, trainer)
    found, plain = training_arguments(config, "out", 5, find_trainer(trainer)), training_arguments(config, "out", 5)
    assert isinstance(found, kind)
    odd = [field.name for field in dataclasses.fields(TrainingArguments) if getattr(found, field.name) != getattr(plain, field.name)]
    assert set(odd) <= {"logging_dir"}
    assert not found.gradient_checkpointing
    assert kind(output_dir="out", use_cpu=True).gradient_checkpointing  # which TRL has otherwise
    packed = setting(
        work, "trl:SFTTrainer", training={"packing": True, "max_length": 32, "gradient_checkpointing": True}, task={"max_length": 32}
    )
    assert training_arguments(packed, own=find_trainer("trl:SFTTrainer")).gradient_checkpointing
    assert "packing" not in without_trainer(packed).training


def test_what_is_ours_stays_ours(work, tmp_path, monkeypatch):
    """A function that makes arguments of its own gets our seeds, writes nowhere, and reports to nobody."""
    (work / "headstrong_trainer.py").write_text(
        PLAIN.replace("make(", "plain(")
        + f"""

from transformers import TrainingArguments


def make(model, rows, processor, arguments):
    mine = TrainingArguments({str(tmp_path / "theirs")!r}, seed=99, learning_rate=arguments.learning_rate, use_cpu=True,
        save_strategy="steps", save_steps=1, per_device_train_batch_size=4, num_train_epochs=1, report_to="tensorboard", logging_steps=1)
    return plain(model, rows, processor, mine)
"""
    )
    out = finished(setting(work, "headstrong_trainer:make"), tmp_path / "run")
    plain = finished(setting(work), tmp_path / "plain")
    assert distance(moved(out), moved(plain)) < 1e-5
    assert not [path for path in (tmp_path / "theirs").rglob("*") if path.is_file()]


OBLIVIOUS = """
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


def make(model, rows, processor, arguments):
    own = TrainingArguments("unused", num_train_epochs=1, per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no")
    return Trainer(model, own, DataCollatorForSeq2Seq(processor, label_pad_token_id=-100), rows)
"""


@pytest.mark.parametrize(("size", "rows"), [(12, 12), (1, 3)])
def test_a_trainer_that_takes_no_notice_of_its_arguments_is_estimated(size, rows, work, monkeypatch):
    """Its rows are those of some steps, or all that there are; one step is enough to time."""
    (work / "oblivious.py").write_text(OBLIVIOUS)
    place, seen = LocalSimulation(setting(work, "oblivious:make", training={"per_device_train_batch_size": size}), ignore), []
    train = ModelLearner.train
    monkeypatch.setattr(ModelLearner, "train", lambda self, client, *rest: seen.append(self.rows[client]) or train(self, client, *rest))
    found = estimate(place)
    assert 0 < found.step_seconds < found.run_seconds < math.inf
    assert seen[0] == rows
    assert place.pool.learner.rows == {"client-0": 12, "client-1": 12}


def test_nobody_is_told(work, tmp_path, monkeypatch):
    """TRL's trainers tell the hub that they run, unless this was set before it was imported; the run sees to it, and undoes it."""
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", queue := Queue())
    monkeypatch.setattr(_telemetry, "_TELEMETRY_THREAD", threading.current_thread())  # so that nobody empties it
    finished(setting(work, "trl:SFTTrainer"), tmp_path / "run")
    assert queue.empty()
    assert not constants.HF_HUB_DISABLE_TELEMETRY
    _telemetry.send_telemetry("trl/SFTTrainer")
    assert not queue.empty()  # the check can fail


def test_only_one_module_imports_trl():
    root = Path(find_trainer.__code__.co_filename).parents[1]
    assert [path.name for path in sorted(root.rglob("*.py")) if "from trl" in path.read_text()] == ["trl_trainers.py"]


def test_the_function_on_the_page_is_the_example():
    root = Path(__file__).parents[2]
    text = (root / "examples" / "z_trainer.py").read_text().partition("\n\n")[2]
    assert f"```python\n{text}```" in (root / "docs" / "trainers.md").read_text()


def test_packed_rows_train(work, tmp_path):
    out = finished(
        setting(work, "trl:SFTTrainer", training={"packing": True, "packing_strategy": "wrapped", "max_length": 64}), tmp_path / "run"
    )
    steps = {event.steps for event in of_kind(read_events(out / "events.jsonl"), ClientDone)}
    assert np.isfinite(size(moved(out)))
    assert max(steps) < 3  # of 12 rows by 4


def test_on_a_device_a_run_ends_in_the_bits_of_the_cpu(work, tmp_path):
    """On an emulated one (which TRL's own kernel does not run on), with the base in 16 bits, so that it gains beside its weights."""
    more = {"base": {"model": "base", "dtype": "bfloat16"}, "training": {"use_cpu": False}}
    config = setting(work, "plain_trainer:make", rounds=3, **more)
    cpu = finished(config, tmp_path / "cpu")
    with accelerator():
        device = finished(config, tmp_path / "device")
    assert events_of(device, "started")[0]["device"].startswith("fake")
    assert_same_bits(cpu, device)


def test_the_rate_falls_over_the_whole_run(tmp_path, monkeypatch):
    """With `local.schedule = "run"` a line from the rate to zero over the steps of all rounds, else over those of each."""
    step, one = torch.optim.AdamW.step, {"partition": "iid", "column": None, "count": 1}
    for schedule, want in (("run", [1 - t / 6 for t in range(6)]), ("round", [1, 2 / 3, 1 / 3] * 2)):
        rates = []

        def noted(self, *args, rates=rates, **options):
            rates.append(self.param_groups[0]["lr"])
            return step(self, *args, **options)

        monkeypatch.setattr(torch.optim.AdamW, "step", noted)
        training = {"learning_rate": 4e-3, "max_steps": 3}
        run(configuration(rounds=2, clients=one, local={"schedule": schedule}, training=training), tmp_path / schedule, ignore)
        assert rates == pytest.approx([4e-3 * share for share in want])
