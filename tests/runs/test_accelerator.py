"""Runs on an accelerator, as far as a machine without one can show it: on an emulated device they end in the bits of the CPU."""

import itertools
import shutil
import weakref
from unittest import mock

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import torch
from bitsandbytes.autograd import _functions as bitsandbytes_kernels
from PIL import Image
from tests.engines.test_flower import alone, differing, small
from tests.fake_accelerator import accelerator, on_device
from tests.models.test_layers import CASES, adapted
from tests.runs.test_resume import StopError, stopping
from tests.runs.test_run import configuration, events_of, ignore
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from fedex_lora import load_model
from fedex_lora.aggregation import server_state as server
from fedex_lora.client.arguments import training_arguments
from fedex_lora.config import base_folder, parse_config
from fedex_lora.engines.flower._node import Node
from fedex_lora.evaluation import generate
from fedex_lora.evaluation import measure as evaluate
from fedex_lora.exactness import measure
from fedex_lora.models import base_weights as _base
from fedex_lora.models import pristine as _pristine
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.models.export import FORMS, export
from fedex_lora.models.lora import lora_layers, read_model, read_other, write_model
from fedex_lora.models.merge import logits
from fedex_lora.models.processor import load_processor
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.verify import verify
from fedex_lora.runs.context import ModelContext
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.storage.tensors import load_tensors
from fedex_lora.tasks import load_task
from fedex_lora.types import ClientUpdate

COMMIT = "0" * 40
LABELS = ("low", "mid", "high")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS = {  # name -> the task, the adapted modules
    "head": ({"kind": "classification", "text": ["text"], "label": "label"}, ["query", "dense"]),
    "causal-lm": ({"kind": "causal-lm", "prompt": "{text}", "completion": " {label}"}, ["q_proj", "down_proj"]),
    "images": ({"kind": "image-classification", "image": "image", "label": "label"}, ["q_proj", "v_proj"]),
}
BASES = {
    "folded": {},
    "side": {"delta": "side"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
}
METHODS = {  # all that keep something from round to round, and some that do not
    "fedex": {},
    "fedex-best, two ranks": {"method": "fedex-best", "clients": {"ranks": [2, 1]}},
    "keep": {"method": "keep"},
    "fedsa": {"method": "fedsa"},
    "fedsvd": {"method": "fedsvd"},
    "reinit": {"method": "reinit"},
    "rolora": {"method": "rolora"},
    "optimizer_state": {"local": {"optimizer_state": "keep"}},
    "full-ft": {"method": "full-ft"},
}
SOURCES = ("folder", "hub", "random")  # random weights are nowhere but in memory


def every(bases=BASES, methods=METHODS):
    """All combinations: full fine-tuning has float32 bases only, and quantised weights come from a checkpoint."""
    for index, (kind, base, method) in enumerate(itertools.product(KINDS, bases, methods)):
        if method != "full-ft" or base in ("folded", "side"):
            source = SOURCES[index % 3]
            yield kind, base, method, "hub" if source == "random" and "quantization" in BASES[base] else source


def some():
    """Every pair of kind and base, kind and method."""
    place_of = {name: index for names in (KINDS, BASES, METHODS) for index, name in enumerate(names)}
    for kind, base, method, source in every():
        wanted = (2 * place_of[kind] + place_of[method]) % len(BASES)
        if place_of[base] == (place_of[kind] % 2 if method == "full-ft" else wanted):
            yield kind, base, method, source


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, and three tiny bases: in folders `bases/KIND`, and as `tests/KIND` in a hub's cache."""
    folder = tmp_path_factory.mktemp("accelerator")
    names = [LABELS[index % 3] for index in range(24)]
    rows = pd.DataFrame({"text": [f"patient {index} waits, {name}" for index, name in enumerate(names)], "label": names})
    rows["image"] = [f"{index}.png" for index in rows.index]
    for name, pixels in zip(rows["image"], np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8), strict=True):
        Image.fromarray(pixels).save(folder / name)
    rows[:18].to_csv(folder / "train.csv", index=False)
    rows[18:].to_csv(folder / "eval.csv", index=False)
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    text = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0}
    torch.manual_seed(0)
    models = {
        "head": BertModel(BertConfig(**text), add_pooling_layer=False),
        "causal-lm": LlamaForCausalLM(LlamaConfig(**text, num_key_value_heads=1, bos_token_id=1, eos_token_id=1)),
        "images": ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8), add_pooling_layer=False),
    }
    for kind, model in models.items():
        repository = folder / "hub" / f"models--tests--{kind}"
        for where in (folder / "bases" / kind, repository / "snapshots" / COMMIT):
            model.save_pretrained(where)
            if kind != "images":
                tokenizer.save_pretrained(where)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub")):
        yield folder


@pytest.fixture(autouse=True)
def same_kernel():
    """On a CPU int8 layers multiply dequantised weights when they train; elsewhere they quantise their inputs, too. So they do here."""
    with mock.patch.object(bitsandbytes_kernels, "MatMul8bitFp", bitsandbytes_kernels.MatMul8bitLt):
        yield


def settings(place, kind, base="folded", method="fedex", source="folder"):
    task, modules = KINDS[kind]
    tree = {
        "rounds": 2,
        "torch_threads": 1,
        "base": {"model": str(place / "bases" / kind) if source == "folder" else f"tests/{kind}", **BASES[base]},
        "task": {"name": "custom", "data": str(place), "train": "train.csv", "eval": "eval.csv", **task},
        "lora": {"r": 2, "alpha": 8, "target_modules": modules},
        "clients": {"partition": "iid", "count": 2},
        "training": {"learning_rate": 1e-2, "num_train_epochs": 1, "per_device_train_batch_size": 4},
    }
    tree["base"] |= {"random_weights": True} if source == "random" else {}
    for key, value in METHODS[method].items():
        tree[key] = {**tree[key], **value} if key == "clients" else value
    return parse_config(tree)


def stored(folder):
    """Every tensor below a folder, the clients' too; but not their answers as they were sent, which say how long training took."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": tensor for name, tensor in load_tensors(path)[0].items() if name != "reply"}
    return found


def assert_the_same(left, right):
    left, right = stored(left), stored(right)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def told(folder):
    """What a run's events say of its rounds, but for the clock."""
    clock = ("time", "seconds", "bytes_up")
    return [{name: value for name, value in event.fields().items() if name not in clock} for event in events_of(folder, "round_done")]


def check(place, out, combination):
    """A run on the device that is stopped while it waits for a client of round 2 and goes on, against one on the CPU."""
    config, cpu, other = settings(place, *combination), out / "cpu" / "run", out / "device" / "run"  # a run's name is in its messages
    run(config, cpu, ignore)
    with accelerator() as device:
        with pytest.raises(StopError):
            run(config, other, stopping("client_done", 3))
        run(config, other, ignore, resume=True)
    assert events_of(other, "started")[0]["device"] == str(device)
    assert_the_same(cpu, other)
    assert told(cpu) == told(other)


@pytest.mark.parametrize("combination", list(some()), ids=", ".join)
def test_a_run_on_a_device_ends_in_the_bits_of_the_cpu(combination, place, tmp_path):
    check(place, tmp_path, combination)


@pytest.mark.campaign
@pytest.mark.parametrize("combination", [one for one in every() if one not in list(some())], ids=", ".join)
def test_so_does_every_other_one(combination, place, tmp_path):
    check(place, tmp_path, combination)


def made_of(place, kind, out, source):
    """What the commands make of a run's folder: numbers; their files are in `out`."""
    config, base = settings(place, kind, source=source), str(place / "bases" / kind) if source == "folder" else f"tests/{kind}"
    run_folder = place / "runs" / kind
    numbers = {"verify": verify(run_folder, base), "logits": logits(load_model(run_folder, base)).tolist()}
    numbers |= {form: {**export(run_folder, form, out / form, base), "out": "", "vllm": ""} for form in FORMS}
    numbers["evaluate"] = [evaluate(str(folder), config.task).numbers for folder in (run_folder, out / "merged")]
    numbers["aggregate"] = aggregate_folders([run_folder / "a", run_folder / "b"], out / "sum", "fedex", None, None)
    numbers["aggregate"] = {"max_relative_error": numbers["aggregate"]["max_relative_error"], **verify(out / "sum", base)}
    numbers["aggregate"]["rounds"] = len(numbers["aggregate"]["rounds"])  # they name the folder
    if kind == "causal-lm":
        model = load_model(run_folder, base)
        numbers["texts"] = generate(model, load_processor(config.base, kind), ["the patient", "mid"], {"max_new_tokens": 3})
    return numbers


MADE = [
    ("head", "folded", "hub"),
    ("head", "bfloat16", "folder"),
    ("causal-lm", "nf4", "folder"),
    ("causal-lm", "int8", "hub"),
    ("images", "side", "folder"),
]


@pytest.mark.parametrize(("kind", "base", "source"), MADE)
def test_what_is_made_of_a_run(kind, base, source, place, tmp_path):
    """verify --base, load_model, the exports, evaluate, generate, and aggregate of two adapters: the same numbers and files on both."""
    folder = place / "runs" / kind
    shutil.rmtree(folder, ignore_errors=True)
    run(settings(place, kind, base, source=source), folder, ignore)
    for name, trained in (("a", "rounds/0001"), ("b", "final")):
        shutil.copytree(folder / trained / "trainable", folder / name)
    want = made_of(place, kind, tmp_path / "cpu", source)
    with accelerator():
        got = made_of(place, kind, tmp_path / "device", source)
    assert got == want
    assert want["verify"]["max_relative_error"] < 1e-6
    assert_the_same(tmp_path / "cpu", tmp_path / "device")


def test_parties_with_devices_of_their_own(tmp_path):
    """As over Flower: every message is answered by a new `Node` with a folder of its own; the server has a device, too."""
    config = small(local={"optimizer_state": "keep"})
    with accelerator():
        assert alone(config, tmp_path / "alone", lambda request: Node(ignore).reply(request)) == []
    run(config, tmp_path / "together", ignore)
    assert differing(tmp_path / "together", tmp_path / "alone" / "run") == []


def after_a_round(case, where, device):
    """What a round leaves in a model on a device that was made by hand."""
    make, options = CASES[case]
    models = [adapted(make, options, seed).to(device) for seed in range(2)]
    base = FrozenBase(models[0], where)
    updates = [ClientUpdate(f"c{index}", read_model(model), index + 1, read_other(model)) for index, model in enumerate(models)]
    state, result = server.step(server.init(updates[0].adapter, updates[0].other), updates)
    base.set(state.base_delta)
    write_model(models[0], state.adapter, state.other)
    exact = base.realised(measure.ideal_update({}, updates, result.weights))
    numbers = [base.fingerprint(), base.side_error, dict(exact.error), exact.worst, logits(models[0]).tolist()]
    base.set({})
    return [*numbers, {name: layer.weight().cpu().tolist() for name, layer in lora_layers(models[0]).items()}]


@pytest.mark.parametrize("where", ["auto", "side"])
@pytest.mark.parametrize("case", ["conv2d", "modules_to_save", "everything, patterns"])
def test_every_kind_of_layer(case, where):
    """Convolutions, embeddings, Conv1D, tied weights: what goes in, what is measured and answered, and that W0 comes back."""
    want = after_a_round(case, where, "cpu")
    with accelerator() as device:
        assert after_a_round(case, where, device) == want


def test_quantised_models_are_loaded_onto_the_device(place):
    """Or the tests above would show nothing of them."""
    with accelerator():
        model = LocalSimulation(settings(place, "causal-lm", "nf4"), ignore).host.place.model
        assert all(on_device(tensor) for tensor in model.parameters())


def refused(what):
    with pytest.raises((RuntimeError, TypeError)) as error:
        what()
    return str(error.value)


def test_the_emulated_device_refuses_what_devices_refuse():
    """And gives gradients, tied weights and copies as they do."""
    here = torch.ones(3)
    with accelerator() as device:
        there = here.to(device)
        assert (there.device, there.cpu().device.type, (2 * there[1:]).device) == (device, "cpu", device)
        for mixed in (
            lambda: there + here,
            lambda: torch.equal(there, here),
            lambda: torch.stack([there[0], here[0]]),
            lambda: here[torch.tensor([0], device=device)],
            lambda: torch.nn.Linear(3, 2)(there),
        ):
            assert "same device" in refused(mixed)
        assert "numpy" in refused(there.numpy)
        assert "float64" in refused(there.double)
        assert "generator" in refused(lambda: torch.randn(2, device=device, generator=torch.Generator()))
        assert float((there * here[0])[torch.tensor([0])]) == 1.0  # a scalar, and indices: these may be the CPU's
        tied = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        tied[1].weight = tied[0].weight
        tied.to(device)(there).sum().backward()
        assert tied[0].weight is tied[1].weight
        assert on_device(tied[0].weight.grad)


@pytest.fixture
def copies(monkeypatch):
    """Names of the weights of which a copy was made to be kept."""
    made = []
    monkeypatch.setattr(_pristine, "copied", lambda weight: made.append(weight.shape) or weight.clone())
    return made


@pytest.mark.parametrize(("source", "count"), [("folder", 0), ("hub", 0), ("16 bits", 0), ("random", 2)])
def test_the_weights_of_a_base_are_in_memory_once(source, count, place, copies, tmp_path):
    """They are read again from the folder, or from the hub's cache, also where those are in 16 bits; random ones are nowhere else."""
    config = settings(place, "causal-lm", source=source)
    if source == "16 bits":
        LlamaForCausalLM.from_pretrained(place / "bases" / "causal-lm", dtype=torch.bfloat16).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(place / "bases" / "causal-lm").save_pretrained(tmp_path)
        config = config.model_copy(update={"base": config.base.model_copy(update={"model": str(tmp_path)})})
    ModelContext(config, load_task(config.task, config.seed))
    assert len(copies) == count


@pytest.mark.parametrize("name", ["", "a/folder/that/is/gone", "tests/unknown"])
def test_a_model_without_files_is_copied(name):
    weight = torch.ones(2, 3)
    w0 = _pristine.PristineWeights(LlamaConfig(name_or_path=name)).source("q_proj", weight)
    weight.zero_()
    assert w0().sum() == 6


@pytest.mark.parametrize(("base", "home"), [("folded", _base._MergedDelta), ("nf4", _base._SideDelta)])
def test_a_fingerprint_holds_one_weight_at_a_time_and_is_taken_once(base, home, place, monkeypatch):
    host, weights, real = LocalSimulation(settings(place, "head", base), ignore).host, [], home.w0

    def watched(self):
        assert all(weight() is None for weight in weights)
        weight = real(self)
        weights.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(home, "w0", watched)
    assert host.facts({})["base_fingerprint"] == host.facts({})["base_fingerprint"]
    assert len(weights) == 4  # of as many adapted modules


def test_one_of_several_gpus_is_used_and_that_is_said(place, tmp_path, monkeypatch):
    """Trainer would make DataParallel's batches of 3 x 4 rows of them, and half as many steps."""
    config = settings(place, "causal-lm")
    run(config, tmp_path / "one", ignore)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with accelerator():
        arguments = training_arguments(config)
        assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
        run(config, tmp_path / "several", ignore)
    (warning,) = events_of(tmp_path / "several", "warning")
    assert "one of 3 GPUs is used" in warning["message"]
    steps = [[event["steps"] for event in events_of(tmp_path / name, "client_done")] for name in ("one", "several")]
    assert steps[0] == steps[1] == [2.0, 2.0, 2.0, 2.0]
    assert not events_of(tmp_path / "one", "warning")


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_memory_is_as_it_is_asked_for(pinned):
    assert training_arguments(configuration(training={"dataloader_pin_memory": pinned})).dataloader_pin_memory is pinned
