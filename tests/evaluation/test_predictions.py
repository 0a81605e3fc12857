"""What is predicted of each row, how each class is told, a model beside its base, and rows of another file; against plain transformers."""

import csv
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tests.evaluation.test_evaluation import call, numbers, one_line
from tests.runs.test_run import configuration, ignore
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    ViTConfig,
    ViTForImageClassification,
)

from fedex_lora.config import base_folder, read_config, write_config
from fedex_lora.errors import ModelError
from fedex_lora.evaluation import ClassScore, ClassScores
from fedex_lora.evaluation._classes import write_rows
from fedex_lora.evaluation._model import open_source
from fedex_lora.models.export import export
from fedex_lora.runs.run import run
from fedex_lora.storage.events import Started, of_kind, read_events

WORDS = {"calm": ("mild", "faint"), "odd": ("strange", "itchy"), "urgent": ("severe", "sharp")}
IID = {"partition": "iid", "count": 2, "column": None}


def notes(seed, count):
    drawn = np.random.default_rng(seed)
    labels = [sorted(WORDS)[index % 3] for index in range(count)]
    return [{"text": f"a {drawn.choice(WORDS[label])} cough, day {drawn.integers(9)}", "label": label} for label in labels]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three classes on csv files, of which the one to measure on has a row without a label; beside it another file."""
    folder = tmp_path_factory.mktemp("made")
    files = {"train": notes(0, 48), "eval": notes(1, 21), "later": notes(2, 15)}
    files["eval"].insert(4, {"text": "nobody knows", "label": ""})
    for name, rows in files.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    task = {"name": "custom", "data": str(folder), "train": "train.csv", "eval": "eval.csv", "on_bad_row": "drop", "eval_rows": None}
    run(configuration(task=task, clients=IID, lora={"target_modules": ["q_proj", "v_proj"]}), folder / "run", ignore)
    return folder, files


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """text -> the shares of the classes, by plain transformers on the merged export, one row at a time."""
    out = tmp_path_factory.mktemp("plain") / "out"
    export(made[0] / "run", "merged", out)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    return lambda text: model(**tokenizer(text, return_tensors="pt")).logits[0].detach().double().softmax(0)


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
def test_a_line_a_row_and_what_they_come_to(ending, made, plain, tmp_path):
    """Every prediction is plain transformers' own; the scores of the classes are counted by hand from the file; no text is in it."""
    folder, files = made
    found = numbers("evaluate", folder / "run", "--predictions", tmp_path / f"p.{ending}")
    lines = read(tmp_path / f"p.{ending}")
    kept = [(number + 2, row) for number, row in enumerate(files["eval"]) if row["label"]]  # the header is line 1
    assert [int(line["line"]) for line in lines] == [number for number, _ in kept]
    for line, (_, row) in zip(lines, kept, strict=True):
        shares = plain(row["text"])
        assert line["label"] == row["label"]
        assert line["predicted"] == sorted(WORDS)[int(shares.argmax())]
        assert float(line["probability"]) == pytest.approx(float(shares.max()), abs=1e-5)
    text = (tmp_path / f"p.{ending}").read_text()
    assert not any(row["text"] in text for row in files["eval"])
    pairs = Counter((line["label"], line["predicted"]) for line in lines)
    assert found["confusion"] == [[pairs[label, other] for other in sorted(WORDS)] for label in sorted(WORDS)]
    assert found["accuracy"] == pytest.approx(sum(pairs[name, name] for name in WORDS) / 21)
    for one in found["classes"]:
        name, right = one["name"], pairs[one["name"], one["name"]]
        said, there = (sum(count for pair, count in pairs.items() if pair[side] == name) for side in (1, 0))
        assert one["support"] == there == 7
        assert one["precision"] == pytest.approx(right / said if said else 0)
        assert one["recall"] == pytest.approx(right / there)
        assert one["f1"] == pytest.approx(2 * right / (said + there))


def test_the_rows_own_columns_only_where_they_are_asked_for(made, tmp_path):
    folder, files = made
    numbers("evaluate", folder / "run", "--predictions", tmp_path / "p.jsonl", "--with-rows", "--rows", 5)
    lines = read(tmp_path / "p.jsonl")
    assert len(lines) == 5
    assert all(line["text"] == files["eval"][line["line"] - 2]["text"] for line in lines)
    (tmp_path / "named.csv").write_text("text,label,output,predicted\na mild cough,calm,mine,mine\nan itchy cough,odd,mine,mine\n")
    asked = ["--file", tmp_path / "named.csv", "--predictions", tmp_path / "q.tsv", "--with-rows", "--beside", folder / "run"]
    numbers("evaluate", folder / "run", *asked)
    for line in read(tmp_path / "q.tsv"):
        assert (line["output"], line["beside"]) == ("mine", line["predicted"])
        assert line["predicted"] in WORDS


def test_beside_the_base_stand_the_run_s_own_numbers_before_round_1(made, tmp_path):
    folder, _ = made
    found = numbers("evaluate", folder / "run", "--beside", "base")
    before = of_kind(read_events(folder / "run" / "events.jsonl"), Started)[0].metrics
    for metric in ("accuracy", "loss", "macro_f1"):
        assert found["beside"][metric] == pytest.approx(before[metric], abs=1e-6)
        assert found["beside"]["difference"][metric] == pytest.approx(found[metric] - before[metric], abs=1e-6)
    assert abs(found["beside"]["difference"]["loss"]) > 1e-3
    merged = export(folder / "run", "merged", tmp_path / "merged")["out"]
    same = numbers("evaluate", folder / "run", "--beside", merged, "--predictions", tmp_path / "p.tsv")["beside"]
    assert same["difference"]["accuracy"] == 0
    assert all(line["beside"] == line["predicted"] for line in read(tmp_path / "p.tsv"))
    assert "has no trained score" in one_line(call("evaluate", merged, "--config", folder / "run" / "config.toml", "--beside", "base"), 1)
    file = tmp_path / "q.tsv"  # nothing is left by a try that fails, so that the next is not refused
    one_line(call("evaluate", folder / "run", "--beside", tmp_path / "nothere", "--predictions", file), 1)
    assert not file.exists()
    shown = call("evaluate", folder / "run", "--beside", "base").stdout
    assert all(words in shown for words in ("difference", "by class", "F1 of base", "rows by label (down)"))


def test_another_file_is_measured_without_the_training_rows(made, plain, tmp_path):
    """A folder of an export, another file, and a configuration whose training rows are not there: the classes are the folder's."""
    folder, files = made
    for form in ("merged", "adapter"):
        export(folder / "run", form, tmp_path / form)
    config = (folder / "run" / "config.toml").read_text().replace("train.csv", "gone.csv")
    (tmp_path / "other.toml").write_text(config)
    right = sum(sorted(WORDS)[int(plain(row["text"]).argmax())] == row["label"] for row in files["later"])
    for source in (folder / "run", tmp_path / "merged", tmp_path / "adapter"):
        found = numbers("evaluate", source, "--config", tmp_path / "other.toml", "--file", folder / "later.csv")
        assert (found["rows"], found["accuracy"]) == (15, pytest.approx(right / 15))
    (tmp_path / "long.csv").write_text("text,label\n" + "a cough " * 400 + ",urgent\na cough,urgentt\n")
    long = ["evaluate", folder / "run", "--config", tmp_path / "other.toml", "--file", tmp_path / "long.csv"]
    notes = numbers(*long)["notes"]
    assert any("1 of 1 rows are cut at task.max_length" in note for note in notes)
    assert any("left out" in note for note in notes)
    assert f"! {notes[-1]}" in " ".join(call(*long).stdout.split())
    (tmp_path / "odd.csv").write_text("text,label\na cough,urgentt\n")
    strict = ["--config", tmp_path / "strict.toml", "--file", tmp_path / "odd.csv"]
    (tmp_path / "strict.toml").write_text(config.replace('on_bad_row = "drop"', 'on_bad_row = "refuse"'))
    assert "did you mean 'urgent'" in one_line(call("evaluate", folder / "run", *strict), 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    shape = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8)
    torch.manual_seed(5)
    ViTForImageClassification(shape).save_pretrained(folder / "vit")
    rows = [{"image": f"{index}.png", "label": ("red", "blue")[index % 2]} for index in range(16)]
    for index, row in enumerate(rows):
        Image.new("RGB", (16, 16), (row["label"] == "red") * 200 + index).save(folder / row["image"])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"name": "custom", "kind": "image-classification", "data": str(folder), "train": "rows.jsonl", "eval": "rows.jsonl"}
    task |= {"train_rows": None, "eval_rows": None}
    config = configuration(base={"model": str(folder / "vit")}, task=task, clients=IID, rounds=1, lora={"target_modules": ["q_proj"]})
    run(config, folder / "run", ignore)
    return folder


def test_images_and_scores(made, images, tmp_path):
    found = numbers("evaluate", images / "run", "--predictions", tmp_path / "images.tsv")
    lines = read(tmp_path / "images.tsv")
    assert [line["line"] for line in lines] == [str(number) for number in range(1, 17)]
    assert found["accuracy"] == sum(line["label"] == line["predicted"] for line in lines) / 16
    assert {line["predicted"] for line in lines} <= {"red", "blue"}
    before = of_kind(read_events(images / "run" / "events.jsonl"), Started)[0].metrics
    assert numbers("evaluate", images / "run", "--beside", "base")["beside"]["loss"] == pytest.approx(before["loss"], abs=1e-6)
    rows = [{"text": f"{size} of ten", "label": size / 2} for size in range(12)]
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"name": "custom", "kind": "regression", "data": str(tmp_path), "train": "scores.jsonl", "eval": "scores.jsonl"}
    task |= {"train_rows": None, "eval_rows": None}
    run(configuration(task=task, clients=IID, rounds=1, lora={"target_modules": ["q_proj"]}), tmp_path / "run", ignore)
    found = numbers("evaluate", tmp_path / "run", "--predictions", tmp_path / "scores.tsv")
    lines = read(tmp_path / "scores.tsv")
    assert list(lines[0]) == ["line", "label", "predicted"]
    off = [(float(line["label"]) - float(line["predicted"])) ** 2 for line in lines]
    assert math.fsum(off) / 12 == pytest.approx(found["mse"], rel=1e-5)
    assert "classes" not in found


@pytest.mark.parametrize("ending", ["tsv", "jsonl"])
def test_texts_after_one_s_own_prompts_beside_the_base_s(ending, tmp_path):
    """Greedy, by plain transformers on the merged export and on the base, one prompt at a time; the numbers stay those of predictions."""
    rows = [{"note": f"bed {bed} : the boy has cough . triage :", "colour": ("red", "green")[bed % 2]} for bed in range(1, 10)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {"name": "custom", "kind": "causal-lm", "data": str(tmp_path), "train": "rows.jsonl", "eval": "rows.jsonl"}
    task |= {"prompt": "{note}", "completion": " {colour}", "train_rows": None, "eval_rows": None}
    run(configuration(task=task, clients=IID, rounds=1, lora={"target_modules": "all-linear"}), tmp_path / "run", ignore)
    alone = numbers("evaluate", tmp_path / "run")
    found = numbers(
        "evaluate", tmp_path / "run", "--beside", "base", "--predictions", tmp_path / f"p.{ending}", "--generate", "max_new_tokens=5"
    )
    assert {name: found[name] for name in alone} == alone
    assert {"loss", "token_accuracy", "accuracy", "rows"} <= alone.keys()
    merged = export(tmp_path / "run", "merged", tmp_path / "merged")["out"]
    models = {column: AutoModelForCausalLM.from_pretrained(name) for column, name in (("output", merged), ("beside", base_folder()))}
    tokenizer, lines = AutoTokenizer.from_pretrained(merged), read(tmp_path / f"p.{ending}")
    assert len(lines) == 9
    for row, line in zip(rows, lines, strict=True):
        assert (line["prompt"], line["reference"]) == (row["note"], row["colour"])
        ids = tokenizer(row["note"], return_tensors="pt")
        for column, model in models.items():
            output = model.generate(**ids, do_sample=False, max_new_tokens=5, eos_token_id=tokenizer.eos_token_id)
            assert line[column] == tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert any(line["output"] != line["beside"] for line in lines)


def test_of_many_classes_the_most_frequent_confusions_are_told():
    """Rows of three classes, counted by hand."""
    scores = ClassScores([ClassScore(name, 0.0, 0.0, 0.0, 5) for name in "abc"], [[3, 2, 0], [4, 1, 0], [0, 1, 4]])
    assert scores.most_confused(2) == [("b", "a", 4), ("a", "b", 2)]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--predictions", "p.csv"], 2, "end it in .tsv or .jsonl"),
        (["--with-rows"], 2, "--with-rows is for --predictions"),
        (["--generate", "num_beams=1"], 2, "measured on predictions, not on texts"),
        (["--file", "/nowhere/rows.csv"], 1, "/nowhere/rows.csv"),
        (["--task", "glue/mrpc", "--file", "rows.csv"], 2, "--file is for rows of your own"),
        (["--lm-eval", "x", "--beside", "base"], 2, "lm-evaluation-harness has its own rows"),
        (["--beside", "nobody/nothing"], 1, "neither a local folder"),
    ],
)
def test_bad_usage(arguments, status, message, made):
    assert message in one_line(call("evaluate", made[0] / "run", *arguments), status)


def test_a_line_break_of_any_kind_stays_in_its_cell(tmp_path):
    rows = [{"prompt": "a", "output": text} for text in ("one\rtwo", "one\ntwo", "plain")]
    write_rows(tmp_path / "p.tsv", rows)
    assert read(tmp_path / "p.tsv") == rows
    write_rows(tmp_path / "q.tsv", rows[2:])
    assert (tmp_path / "q.tsv").read_text() == "prompt\toutput\na\tplain\n"


def test_classes_in_an_order_of_their_own(made, tmp_path):
    """The names and the order are the model's where the task does not say them, and else the same, or nothing is measured."""
    folder, _ = made
    order = ["urgent", "calm", "odd"]
    config = configuration(
        task={**read_config(folder / "run" / "config.toml").task.model_dump(exclude_none=True), "labels": order, "train_rows": None},
        clients=IID,
        rounds=1,
        lora={"target_modules": ["q_proj", "v_proj"]},
    )
    run(config, tmp_path / "run", ignore)
    want = numbers("evaluate", tmp_path / "run")
    merged = export(tmp_path / "run", "merged", tmp_path / "merged")["out"]
    for name, labels in (("unsaid", None), ("other", sorted(order))):
        told = config.model_copy(update={"task": config.task.model_copy(update={"labels": labels})})
        (tmp_path / f"{name}.toml").write_text(write_config(told))
    for source in (tmp_path / "run", merged):
        found = numbers("evaluate", source, "--config", tmp_path / "unsaid.toml")
        assert (found["accuracy"], found["loss"]) == (want["accuracy"], pytest.approx(want["loss"], abs=1e-5))
    AutoModelForSequenceClassification.from_pretrained(merged).save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(merged).save_pretrained(tmp_path / "plain")
    said = "tells urgent, calm, odd apart, in this order, and the task calm, odd, urgent: set task.labels to the model's"
    cases = [(tmp_path / "run", "other"), (merged, "other"), (tmp_path / "plain", "other"), (tmp_path / "plain", "unsaid")]
    for source, name in cases:
        assert said in one_line(call("evaluate", source, "--config", tmp_path / f"{name}.toml"), 1)
    assert said in one_line(call("evaluate", folder / "run", "--beside", tmp_path / "run"), 1)
    assert numbers("evaluate", tmp_path / "plain", "--config", tmp_path / "run" / "config.toml")["accuracy"] == want["accuracy"]


def test_an_adapter_without_its_head_is_not_measured(tmp_path):
    """Nothing but chance would say what is predicted."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    tokenizer.save_pretrained(tmp_path / "base")
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "pad_token_id": tokenizer.pad_token_id}
    DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "base")
    settings = {"num_labels": 2, "problem_type": "single_label_classification"}
    for task_type, saved in ((None, None), (None, ["pre_classifier"]), ("SEQ_CLS", None)):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=2)
        whole = get_peft_model(model, LoraConfig(task_type=task_type, r=2, target_modules=["q_lin"], modules_to_save=saved))
        whole.save_pretrained(out := tmp_path / f"{task_type}-{saved}")
        if task_type is None:
            with pytest.raises(ModelError, match=r"has no trained classifier, and .* none either: save it with the adapter"):
                open_source(str(out), "classification", **settings)
    row = {key: value for key, value in tokenizer("a cough", return_tensors="pt").items() if key != "token_type_ids"}
    assert torch.equal(open_source(str(out), "classification", **settings).model(**row).logits, whole.eval()(**row).logits)
