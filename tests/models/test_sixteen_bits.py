"""Exports in 16 bits, by plain transformers and PEFT: the run's outputs, the nearest weights, class names, templates, shards."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tests import oracle
from tests.runs.test_run import configuration, ignore
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from typer.testing import CliRunner

import fedex_lora.models.export as exporting
from fedex_lora import LoRAPair, load_model
from fedex_lora.aggregation.growth import growth
from fedex_lora.cli import app
from fedex_lora.config import base_folder
from fedex_lora.errors import ModelError, UsageError
from fedex_lora.models.export import export
from fedex_lora.models.merge import logits, plain_model
from fedex_lora.models.rounded import logit_bound
from fedex_lora.runs.run import run
from fedex_lora.storage.result import read_result

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
ASKED = [{"role": "user", "content": "bed 4 : the boy has fever and cough . triage :"}]
FORMS = ("merged", "adapter", "base+adapter")
HOSPITALS = {"partition": "iid", "count": 3, "column": None}
QUICK = {"learning_rate": 2e-2, "num_train_epochs": 2, "per_device_train_batch_size": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Runs of two rounds of a classifier, of a chat model with a template and settings of its own, and of an image model."""
    root = tmp_path_factory.mktemp("models")
    chat = shutil.copytree(base_folder(), root / "chat-base")
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(chat)
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True}))
    shape = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8)
    torch.manual_seed(5)
    ViTForImageClassification(shape).save_pretrained(root / "vit")
    drawn = np.random.default_rng(0)
    for index in range(24):
        noise = drawn.normal(0, 30, (16, 16, 3)) + np.array([(200, 60, 60), (60, 60, 200)][index % 2])
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(root / f"{index}.png")
    rows = {
        "notes": [
            {"text": f"a cough of {word} pain", "label": ("calm", "urgent", "odd")[index % 3]} for index, word in enumerate("abcd" * 9)
        ],
        "images": [{"image": f"{index}.png", "label": ("red", "blue")[index % 2]} for index in range(24)],
    }
    for name, made in rows.items():
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in made))
    own = {"name": "custom", "data": str(root)}
    configs = {
        "classifier": configuration(
            task={**own, "train": "notes.jsonl", "eval": "notes.jsonl"},
            clients=HOSPITALS,
            training=QUICK,
            lora={"target_modules": ["q_proj", "v_proj"]},
        ),
        "chat": configuration(base={"model": str(chat)}, training=QUICK),
        "images": configuration(
            base={"model": str(root / "vit")},
            task={**own, "kind": "image-classification", "train": "images.jsonl", "eval": "images.jsonl", "train_rows": None},
            clients=HOSPITALS,
            training=QUICK,
            lora={"target_modules": ["q_proj", "v_proj"]},
        ),
    }
    for name, config in configs.items():
        run(config, root / name, ignore)
    bases = {"classifier": base_folder(), "chat": chat, "images": root / "vit"}
    return {name: (root / name, bases[name]) for name in configs}


def as_the_card_says(folder):
    """The Python lines of an export's README, in its folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    there, names = os.getcwd(), {}
    os.chdir(folder)
    try:
        exec(code[1], names)
    finally:
        os.chdir(there)
    return names["model"]


def share(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["classifier", "chat", "images"])
def test_an_export_in_bfloat16_is_the_run_s_model_but_for_rounding(name, form, models, tmp_path):
    """Loaded by the card's own lines: in bfloat16, within the bound, nearer to the run than its base is, with the class names."""
    source, base = models[name]
    result = export(source, form, tmp_path / "out", dtype="bfloat16")
    model = as_the_card_says(tmp_path / "out")
    got, want = logits(model), logits(load_model(source, str(base)))
    stored = [parameter for key, parameter in model.named_parameters() if "lora_" not in key]
    assert {parameter.dtype for parameter in stored} == {torch.bfloat16}
    assert share(got, want) == pytest.approx(result["output_error"], rel=1e-3, abs=1e-6)
    assert 1e-4 < result["output_error"] < result["output_bound"] < 0.25
    assert result["change_error"] < 0.5
    if name != "chat":
        names = ["calm", "odd", "urgent"] if name == "classifier" else ["blue", "red"]
        assert [model.config.id2label[index] for index in range(len(names))] == names
        assert model.config.label2id == {label: index for index, label in enumerate(names)}


def plain_inputs(name, folder, root):
    """Rows as someone has them who holds an export only: by the tokenizer or processor that stands in its folder."""
    if name == "images":
        processor = AutoImageProcessor.from_pretrained(folder)
        return processor([Image.open(root / f"{index}.png") for index in range(8)], return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name == "classifier":
        return tokenizer([f"a cough of {word} pain" for word in "abcd"], padding=True, return_tensors="pt")
    return tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True)


PLAIN = {"classifier": AutoModelForSequenceClassification, "chat": AutoModelForCausalLM, "images": AutoModelForImageClassification}
TASKS = {"classifier": "text-classification", "chat": "text-generation", "images": "image-classification"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["classifier", "chat", "images"])
def test_plain_libraries_alone_give_the_run_s_outputs(name, models, tmp_path):
    """From the folders of a model in parts and of an adapter, on rows read by what stands there; the oracle is PEFT's own merge in float32,
    cast: the model's error is that of the cast, and its greedy words are the cast model's."""
    source, base = models[name]
    parts = export(source, "merged", tmp_path / "model", dtype="bfloat16", shard="30KB")
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1
    model = PLAIN[name].from_pretrained(tmp_path / "model").eval()
    row = plain_inputs(name, tmp_path / "model", source.parent)
    want = load_model(source, str(base))(**row).logits
    cast = load_model(source, str(base)).merge_and_unload().to(torch.bfloat16)
    as_model = {key: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for key, tensor in row.items()}
    got, theirs = (one(**as_model).logits.float() for one in (model, cast))
    assert model.dtype == torch.bfloat16
    assert share(got, want) < 1.5 * share(theirs, want) < parts["output_bound"]
    adapter = export(source, "adapter", tmp_path / "adapter", dtype="bfloat16")
    more = {"num_labels": 3 if name == "classifier" else 2} if name != "chat" else {}
    grown = PeftModel.from_pretrained(PLAIN[name].from_pretrained(base, dtype=torch.bfloat16, **more), tmp_path / "adapter")
    assert all(torch.equal(tensor, row[key]) for key, tensor in plain_inputs(name, tmp_path / "adapter", source.parent).items())
    assert share(grown(**as_model).logits, want) < adapter["output_bound"] / 2
    bare = PLAIN[name].from_pretrained(base, **more).eval()
    assert share(bare(**row).logits, want) > 4 * share(got, want)
    made = pipeline(TASKS[name], model=str(tmp_path / "model"))
    if name == "chat":
        words = made(ASKED, max_new_tokens=6, do_sample=False)[0]["generated_text"][-1]
        output = cast.generate(**row, max_new_tokens=6, do_sample=False)[0, row["input_ids"].shape[1] :]
        assert words == {"role": "assistant", "content": made.tokenizer.decode(output, skip_special_tokens=True)}
        assert words["content"]
    else:
        given = "a cough of a pain" if name == "classifier" else Image.open(source.parent / "0.png")
        labels = ("calm", "odd", "urgent") if name == "classifier" else ("blue", "red")
        assert made(given)[0]["label"] == labels[int(want[0].argmax())]


def nearest(numbers, like):
    return torch.from_numpy(numbers).to(like.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_weight_is_rounded_once_from_the_sum(dtype, models, tmp_path):
    """W0 + D in numpy's fp64 from the files, then the nearest number: all weights of the file; rounding W0 first would give others."""
    source, base = models["chat"]
    export(source, "merged", tmp_path / "out", dtype=dtype)
    got, pristine, result = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(base / "model.safetensors"),
        read_result(source / "final"),
    )
    twice = 0
    for module, pair in result.adapter.items():
        gained = oracle.product(pair) + result.base_delta[module].dense().numpy()
        stored, W0 = got[f"{module}.weight"], pristine[f"{module}.weight"]
        assert torch.equal(stored, nearest(W0.double().numpy() + gained, stored)), module
        twice += int((stored != nearest(W0.to(stored.dtype).double().numpy() + gained, stored)).sum())
    assert twice > 0
    untouched = [name for name in pristine if name.removesuffix(".weight") not in result.adapter]
    assert untouched
    assert all(torch.equal(got[name], pristine[name].to(got[name].dtype)) for name in untouched)


def test_a_tokenizer_a_template_and_generation_settings_come_along(models, tmp_path):
    source, base = models["chat"]
    want = AutoTokenizer.from_pretrained(base).apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    assert want == f"user: {ASKED[0]['content']}\nassistant:"
    for form, folders in {"merged": ["."], "adapter": ["."], "base+adapter": ["base", "adapter"]}.items():
        export(source, form, tmp_path / form)
        for folder in folders:
            tokenizer = AutoTokenizer.from_pretrained(tmp_path / form / folder)
            assert tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True) == want
    for folder in (tmp_path / "merged", tmp_path / "base+adapter" / "base"):
        kept = GenerationConfig.from_pretrained(folder)
        assert (kept.eos_token_id, kept.temperature, kept.do_sample) == ([1, 2], 0.6, True)
    images = export(models["images"][0], "merged", tmp_path / "images")["out"]
    assert AutoImageProcessor.from_pretrained(images).size["height"] == 16
    assert AutoConfig.from_pretrained(images).id2label == {0: "blue", 1: "red"}


def test_a_model_is_written_in_parts(models, tmp_path):
    source, base = models["chat"]
    export(source, "merged", tmp_path / "out", dtype="float16", shard="100KB")
    parts = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(parts) > 2
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert share(logits(as_the_card_says(tmp_path / "out")), logits(load_model(source, str(base)))) < 0.02
    with pytest.raises(UsageError, match="PEFT writes an adapter as one file"):
        export(source, "adapter", tmp_path / "no", shard="1GB")
    with pytest.raises(UsageError, match="write it as 2GB or 500MB"):
        export(source, "merged", tmp_path / "no", shard="much")
    with pytest.raises(UsageError, match="dtype 'int4': give float32, bfloat16, float16"):
        export(source, "merged", tmp_path / "no", dtype="int4")
    assert not (tmp_path / "no").exists()


def test_what_is_not_the_run_s_is_noticed_in_sixteen_bits_too(models, tmp_path, monkeypatch):
    """The update lost, and a head that float16 cannot hold: nothing is left behind."""
    source, _ = models["classifier"]
    with monkeypatch.context() as lost:
        lost.setattr(exporting, "plain_model", lambda base, delta, other, **options: plain_model(base, {}, other, **options))
        for form in ("merged", "base+adapter"):
            with pytest.raises(ModelError, match="is not the run's, rounded to bfloat16"):
                export(source, form, tmp_path / "out", dtype="bfloat16")
    read = exporting.read_global

    def large(folder):
        result = read(folder)
        for tensor in result.other.values():
            tensor.mul_(1e7)
        return result

    monkeypatch.setattr(exporting, "read_global", large)
    with pytest.raises(ModelError, match="where float16 ends: use --dtype bfloat16"):
        export(source, "merged", tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_the_bound_is_that_of_a_random_walk():
    """n matrices in a row, each rounded with what it gives, in bfloat16 against fp64: below the bound, and no more than ten times below."""
    for layers in (4, 64):
        generator = torch.Generator().manual_seed(layers)
        chain = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(layers)))
        for layer in chain:
            torch.nn.init.orthogonal_(layer.weight, generator=generator)
        x = torch.randn(16, 64, generator=generator)
        want = chain.double()(x.double()).detach()
        got = chain.to(torch.bfloat16)(x.to(torch.bfloat16)).double().detach()
        assert logit_bound(chain, torch.bfloat16) / 10 < share(got, want) < logit_bound(chain, torch.bfloat16)


def test_the_command_says_what_rounding_costs_how_the_rank_grows_and_the_line_for_vllm(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, _ = models["chat"]
    call = CliRunner(env={"COLUMNS": "400"}).invoke
    shown = call(app, ["export", str(source), "--as", "merged", "--dtype", "bfloat16", "-o", "out"]).stdout
    assert "every weight is the nearest in bfloat16, whose rounding explains up to" in shown
    assert f"vLLM: vllm serve {tmp_path / 'out'} --dtype bfloat16\n" in shown
    assert "as one adapter it has rank 10: 2, and 4 a round; from round" in shown
    shown = call(app, ["export", str(source), "--as", "adapter", "--dtype", "bfloat16", "-o", str(tmp_path / "small")]).stdout
    assert re.search(
        rf"--dtype bfloat16 --enable-lora --max-lora-rank 16 --lora-modules fedex={re.escape(str(tmp_path / 'small'))}\n", shown
    )


def test_the_rank_grows_as_it_is_said(models):
    """Rounds counted one by one, by the numbers that an adapter of each rank has."""
    pairs = {"q": LoRAPair(torch.zeros(8, 100), torch.zeros(60, 8)), "v": LoRAPair(torch.zeros(8, 40), torch.zeros(900, 8))}
    for total in (3_000, 20_000, 40_000):
        found = growth(pairs, {name: pair.low_rank() for name, pair in pairs.items()}, 1, total)
        assert (found.rank, found.own, found.by) == (16, 8, 8)
        sizes = {n: min(8 + 8 * n, 60) * 160 + min(8 + 8 * n, 40) * 940 for n in range(1, 20)}
        assert found.merged_from == next((n for n, size in sizes.items() if size > total), None)
    wide = {"q": LoRAPair(torch.zeros(100, 2000), torch.zeros(2000, 100))}
    assert growth(wide, {"q": wide["q"].low_rank()}, 1, 10**9).unserved_from == 5  # 100 + 5 x 100 is the first above 512
    assert "more rounds leave as it is" in growth(pairs, {}, 3, 10**6).line()
