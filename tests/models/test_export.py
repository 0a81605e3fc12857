"""Exports: plain transformers and PEFT give the logits of the run; what is not so is not written."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tests import oracle
from tests.runs.test_run import configuration, ignore
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel
from typer.testing import CliRunner

import fedex_lora.models.export as exporting
from fedex_lora import load_model
from fedex_lora.cli import app
from fedex_lora.config import base_folder
from fedex_lora.errors import ModelError, StorageError
from fedex_lora.models.export import export, logits
from fedex_lora.models.merge import plain_model
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.verify import verify
from fedex_lora.runs.run import run
from fedex_lora.storage.adapter_folder import read_adapter_folder
from fedex_lora.storage.files import read_manifest

CAUSAL = {"method": "fedex", "rounds": 2, "training": {"learning_rate": 2e-2, "num_train_epochs": 2}}


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A run of a causal LM, two rounds, so that there is a base delta."""
    out = tmp_path_factory.mktemp("causal") / "run"
    run(configuration(**CAUSAL), out, ignore)
    return out


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run with a head, which is trained whole."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [{"text": f"a cough of {word}", "label": index % 2} for index, word in enumerate(("mild", "severe") * 12)]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = {"name": "custom", "data": str(folder), "train": "train.jsonl", "eval": "eval.jsonl", "kind": "classification"}
    config = configuration(
        task=task, clients={"partition": "iid", "count": 2, "column": None}, lora={"target_modules": ["q_proj", "v_proj"]}
    )
    run(config, folder / "run", ignore)
    return folder / "run"


def reloaded(form, folder):
    """As someone would who has never heard of this package."""
    if form == "merged":
        return AutoModelForCausalLM.from_pretrained(folder)
    base, adapter = (base_folder(), folder) if form == "adapter" else (folder / "base", folder / "adapter")
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def distance(left, right):
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("form", ["merged", "adapter", "base+adapter"])
def test_an_export_has_the_logits_of_the_run(form, causal, tmp_path):
    """And the run's model is not its base, nor its adapter alone: the check can fail."""
    result = export(causal, form, tmp_path / "out")
    want = logits(load_model(causal, str(base_folder())))
    assert distance(logits(reloaded(form, tmp_path / "out")), want) < 1e-5
    assert result["output_error"] < 1e-5
    assert result["update_error"] == 0
    assert distance(logits(AutoModelForCausalLM.from_pretrained(base_folder())), want) > 1e-2
    trainable = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder()), causal / "final" / "trainable")
    assert distance(logits(trainable), want) > 1e-4
    assert read_manifest(tmp_path / "out")["format"] == form  # and all sha256 sums fit
    assert "fedex" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_names_no_party(causal, tmp_path):
    """It is made to be shared; the round's own folder, which is not, names them."""
    export(causal / "rounds" / "0002", "adapter", tmp_path / "out")
    parties = [entry["client"] for entry in read_manifest(causal / "rounds" / "0002")["inputs"]]
    assert len(parties) == 3
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(f"{name}" in text for name in parties for text in texts)


def test_a_cut_adapter_has_the_error_that_it_says(causal, tmp_path):
    """Eckart-Young per module, in numpy; rank 4 of 8 misses some of the update, and the reported number is that."""
    whole = export(causal, "adapter", tmp_path / "whole")
    cut = export(causal, "adapter", tmp_path / "cut", rank=4)
    assert (whole["rank"], cut["rank"]) == (2 + 2 * 2 * 2, 4)
    missing = total = 0.0
    adapters = [read_adapter_folder(tmp_path / name).adapter for name in ("whole", "cut")]
    for name, pair in adapters[0].items():
        update = oracle.product(pair)
        missing += np.linalg.norm(update - oracle.product(adapters[1][name])) ** 2
        total += np.linalg.norm(update) ** 2
        tail = np.sqrt((np.linalg.svd(update, compute_uv=False)[4:] ** 2).sum())
        assert np.linalg.norm(update - oracle.product(adapters[1][name])) == pytest.approx(tail, rel=1e-3, abs=1e-7)
    assert cut["update_error"] == pytest.approx(math.sqrt(missing / total), rel=1e-4)
    want = logits(load_model(causal, str(base_folder())))
    assert distance(logits(reloaded("adapter", tmp_path / "cut")), want) == pytest.approx(cut["output_error"], rel=1e-3)


def test_a_cut_adapter_keeps_modules_that_gained_nothing(tmp_path):
    """Their update is zero to the bit: they have rank 1 in the folder, and still add nothing."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder()), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for index in range(2):
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "q_proj" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        model.save_pretrained(tmp_path / f"{index}")
    aggregate_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "out", "fedex", None, None)
    assert export(tmp_path / "out", "adapter", tmp_path / "cut", str(base_folder()), rank=2)["rank"] == 2
    moved = {name.endswith("q_proj"): oracle.product(pair).any() for name, pair in read_adapter_folder(tmp_path / "cut").adapter.items()}
    assert moved == {True: True, False: False}


def test_a_head_travels_in_every_form(classifier, tmp_path):
    want = logits(load_model(classifier, str(base_folder())))
    for form in ("merged", "adapter", "base+adapter"):
        assert export(classifier, form, tmp_path / form)["output_error"] < 1e-5
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), want) < 1e-5


def test_another_base_is_refused_by_its_weights(causal, tmp_path):
    """The same architecture with one module's weights changed; for export, load_model and verify alike."""
    other = AutoModelForCausalLM.from_pretrained(base_folder())
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.mul_(1.001)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(base_folder()).save_pretrained(tmp_path / "other")
    for use in (
        lambda: export(causal, "merged", tmp_path / "out", str(tmp_path / "other")),
        lambda: load_model(causal, tmp_path / "other"),
        lambda: verify(causal, str(tmp_path / "other")),
    ):
        with pytest.raises(ModelError, match="is not the base of this result: its weights differ"):
            use()
    assert not (tmp_path / "out").exists()


def test_what_vllm_makes_of_it_is_said(causal, classifier, tmp_path):
    assert export(causal, "adapter", tmp_path / "a")["vllm"] == (
        f"vllm serve {base_folder()} --dtype float32 --enable-lora --max-lora-rank 16 --lora-modules fedex={tmp_path / 'a'}"
    )
    assert f"vllm serve {tmp_path / 'b' / 'base'} " in export(causal, "base+adapter", tmp_path / "b")["vllm"]
    assert export(causal, "merged", tmp_path / "c")["vllm"].startswith(f"vllm serve {tmp_path / 'c'} --dtype float32")
    assert "not a causal LM" in export(classifier, "adapter", tmp_path / "d")["vllm"]


def test_encoders_are_none_of_vllm_s_causal_lms(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path / "bert")
    for index in range(2):
        lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
        get_peft_model(AutoModel.from_pretrained(tmp_path / "bert"), lora).save_pretrained(tmp_path / str(index))
    aggregate_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "out", "fedex", None, None)
    assert "not a causal LM" in export(tmp_path / "out", "adapter", tmp_path / "a")["vllm"]


def test_verify_of_an_export_checks_its_sums(causal, tmp_path):
    export(causal, "adapter", tmp_path / "a")
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["verify", str(tmp_path / "a")])
    assert (done.exit_code, "is an export (adapter): its sums are right" in done.stdout) == (0, True), done.output
    (tmp_path / "a" / "README.md").write_text("else")
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "a")])
    assert (done.exit_code, "README.md has changed" in done.stderr) == (1, True), done.output


def test_an_export_that_is_not_the_run_is_not_left_behind(causal, tmp_path, monkeypatch):
    """The comparison decides: if what was reloaded gave other logits, there would be one line and no folder."""
    monkeypatch.setattr(exporting, "logits", lambda model: logits(model) + (0.1 if isinstance(model, PeftModel) else 0.0))
    with pytest.raises(ModelError, match="gives other logits than the run"):
        export(causal, "merged", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_log_is_damaged_is_said_before_anything_is_written(causal, tmp_path):
    run = shutil.copytree(causal, tmp_path / "run")
    (run / "events.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(StorageError, match=r"events\.jsonl: line 1 is damaged"):
        export(run, "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--as", "onnx"], "give merged, adapter, base\\+adapter"),
        (["--as", "merged", "--rank", "2"], "a rank cuts the stand-alone adapter"),
        (["--as", "adapter", "--rank", "0"], "give 1 to 10"),
        (["--as", "adapter", "--rank", "11"], "give 1 to 10"),
        (["--as", "adapter", "--base", "nowhere"], "neither a local folder"),
    ],
)
def test_bad_exports(options, message, causal, tmp_path):
    """One line, a status, nothing written."""
    done = CliRunner().invoke(app, ["export", str(causal), "-o", str(tmp_path / "out"), *options])
    assert done.exit_code in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(message, done.stderr)
    assert not (tmp_path / "out").exists()


def test_an_update_that_is_lost_is_noticed_however_small(tmp_path, monkeypatch):
    """At a tiny learning rate the bare base has the logits of the run to 1e-5 of the largest: the change by the update counts."""
    run(configuration(rounds=1, training={"learning_rate": 1e-5}), tmp_path / "run", ignore)
    assert export(tmp_path / "run", "merged", tmp_path / "good")["change_error"] < 0.1
    monkeypatch.setattr(exporting, "plain_model", lambda base, delta, other, **options: plain_model(base, {}, other, **options))
    with pytest.raises(ModelError, match="gives other logits than the run"):
        export(tmp_path / "run", "merged", tmp_path / "bad")


def test_full_fine_tuning_of_a_tied_model_is_exported(gpt2, tmp_path):
    """Both ends of the tie were trained as one, and stay one."""
    changes = {"base": {"model": str(gpt2)}, "training": {"learning_rate": 1e-3}, "task": {"max_length": 48}}
    config = configuration(method="full-ft", rounds=1, **changes)
    run(config, tmp_path / "run", ignore)
    assert export(tmp_path / "run", "merged", tmp_path / "out")["output_error"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_adapters_without_a_task_type_find_their_head(tmp_path):
    """PEFT users often leave it out; the base's modules tell which head they were trained with."""
    for index in range(2):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder()), LoraConfig(r=2, target_modules=["q_proj"]))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        model.save_pretrained(tmp_path / f"{index}")
    aggregate_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "out", "fedex", None, None)
    assert isinstance(
        load_model(tmp_path / "out", str(base_folder())).get_base_model(), type(AutoModelForCausalLM.from_pretrained(base_folder()))
    )
    assert export(tmp_path / "out", "merged", tmp_path / "merged", str(base_folder()))["output_error"] < 1e-5
    assert verify(tmp_path / "out", str(base_folder()))["base_checked"] is False


def test_the_command_prints_numbers(causal, tmp_path):
    done = CliRunner().invoke(app, ["export", str(causal), "--as", "adapter", "--rank", "3", "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["rank"] == 3
    assert 0 < numbers["update_error"] < 1
    assert torch.isfinite(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))).all()


def test_verify_and_export_say_which_round_final_is_and_where_the_best_is(causal, tmp_path):
    copy = shutil.copytree(causal, tmp_path / "run")
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    for event in events:
        event.update({"best_round": 1} if event["event"] == "run_done" else {})
    (copy / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    checked = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["verify", str(copy)])
    assert "is the last round, 2, bit for bit; best on the clients' held-out rows was round 1" in " ".join(checked.stdout.split())
    assert "rounds/0001" in checked.stdout
    written = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["export", str(copy), "--as", "adapter", "-o", str(tmp_path / "out")])
    assert "adapter of round 2" in written.stdout
    assert "rounds/0001" in written.stdout
    alone = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["verify", str(copy / "rounds" / "0001")])
    assert "best" not in alone.stdout


def test_verify_says_shares_of_the_output(causal):
    """Relative to a small update errors may be many times it; as shares of the logits they are rounding."""
    result = verify(causal, str(base_folder()))
    assert result["output_share_float32"] < 1e-5
    assert result["output_share_floor_float32"] < 1e-5
    shown = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["verify", str(causal), "--base", str(base_folder())])
    assert "are off by" in shown.stdout
    assert "of themselves" in shown.stdout


def test_a_model_is_written_in_files_of_the_size_that_is_asked_for(causal, tmp_path):
    for size, several in (("100KB", True), ("1GB", False)):
        out = tmp_path / size
        done = CliRunner().invoke(app, ["export", str(causal), "--as", "merged", "--max-shard-size", size, "-o", str(out)])
        assert done.exit_code == 0, done.stderr
        assert (len(list(out.glob("*.safetensors"))) > 1) == several
