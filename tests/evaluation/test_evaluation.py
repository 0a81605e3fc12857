"""Models measured after training: generation, every kind of folder, lm-evaluation-harness, and bad input in one line."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, NoRepeatNGramLogitsProcessor
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import base_folder
from fedex_lora.errors import UsageError
from fedex_lora.evaluation import generate
from fedex_lora.evaluation._generation import _NoRepeat
from fedex_lora.tasks.scoring.e2e import read_predictions, read_references, score_e2e

BEAM = {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 4, "max_new_tokens": 16}
PROMPTS = [
    "Once upon a time",
    "The dog",
    "Lily and her mom went to the big park. They saw a red ball. Lily said:",
    "Tim",
    "One day, a little girl named Lucy found a small box in her room. She was very",
]


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def numbers(*arguments):
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def writer(stories):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(stories), tokenizer


@pytest.mark.parametrize("settings", [BEAM, {"max_new_tokens": 24}], ids=["beam", "greedy"])
def test_batches_padded_on_the_left_say_what_one_by_one_says(settings, writer):
    """Prompts of unequal lengths: all together, two at a time, and each alone by plain `model.generate` without padding."""
    model, tokenizer = writer
    alone = [generate(model, tokenizer, [prompt], settings, 1)[0][0] for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS, settings, len(PROMPTS)) == (alone, 0)
    assert generate(model, tokenizer, PROMPTS, settings, 2) == (alone, 0)
    assert len(set(alone)) == len(PROMPTS)
    if "num_beams" not in settings:
        plain = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")
            output = model.generate(**ids, do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
            plain.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        assert alone == plain


def test_padding_on_the_right_would_say_something_else(writer):
    """The check can fail: the same prompts padded on the right."""
    model, tokenizer = writer
    tokens = tokenizer(PROMPTS, padding=True, padding_side="right", return_tensors="pt")
    output = model.generate(**tokens, do_sample=False, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id)
    texts = [text.strip() for text in tokenizer.batch_decode(output[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)]
    assert texts != generate(model, tokenizer, PROMPTS, {"max_new_tokens": 24})[0]


def test_n_grams_of_the_prompt_may_be_repeated_and_those_of_the_text_not(writer):
    """By hand, where transformers' own rule forbids a name of four tokens that the prompt gives; and in a text, none comes twice."""
    prompt, free = torch.tensor([[1, 2, 3, 4, 1, 2, 3], [7, 7, 7, 1, 2, 3, 9]]), torch.zeros(2, 10)
    written = torch.cat([prompt, torch.tensor([[1, 2, 3], [1, 2, 3]])], dim=1)
    assert torch.equal(_NoRepeat(4, 7)(written, free), free)
    assert NoRepeatNGramLogitsProcessor(4)(written, free)[0, 4] == -torch.inf
    again = torch.cat([written, torch.tensor([[4, 1, 2, 3], [5, 1, 2, 3]])], dim=1)
    assert _NoRepeat(4, 7)(again, free).isinf().nonzero().tolist() == [[0, 4], [1, 5]]
    model, tokenizer = writer
    text = generate(model, tokenizer, PROMPTS[:1], {"max_new_tokens": 60, "no_repeat_ngram_size": 4})[0][0]
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    grams = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    assert len(grams) == len(set(grams))


def test_a_prompt_longer_than_the_context_loses_its_beginning(writer):
    model, tokenizer = writer
    long = "The dog ran. " * 300 + "Once upon a time"
    texts, cut = generate(model, tokenizer, [long, "The dog"], {"max_new_tokens": 8})
    assert (len(texts), cut) == (2, 1)
    with pytest.raises(UsageError, match=r"leaves no room for a prompt .*--generate max_new_tokens=N"):
        generate(model, tokenizer, ["The dog"], {"max_new_tokens": 5000})
    with pytest.raises(UsageError, match="unknown generation setting num_beems"):
        generate(model, tokenizer, ["The dog"], {"max_new_tokens": 8, "num_beems": 2})


@pytest.mark.parametrize("settings", [{"num_return_sequences": 2, "num_beams": 2}, {"return_dict_in_generate": True}, {"do_sample": True}])
def test_one_text_a_prompt_and_none_by_chance(settings):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base_folder()), AutoTokenizer.from_pretrained(base_folder())
    with pytest.raises(UsageError, match="one text a prompt is written, and none is sampled: leave it out"):
        generate(model, tokenizer, ["bed 4 :"], {"max_new_tokens": 2, **settings})
    same = {"do_sample": False, "num_return_sequences": 1}
    assert len(generate(model, tokenizer, ["bed 4 :"], {"max_new_tokens": 2, **same})[0]) == 1


CONFIG = f"""
rounds = 1
[base]
model = "{base_folder()}"
[lora]
r = 2
target_modules = "all-linear"
[task]
name = "demo"
train_rows = 60
eval_rows = 40
[training]
learning_rate = 1e-2
num_train_epochs = 1
per_device_train_batch_size = 16
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of the demo's task, and its accuracy in the last round."""
    folder = tmp_path_factory.mktemp("ran")
    (folder / "run.toml").write_text(CONFIG)
    assert call("run", folder / "run.toml", "--out", folder / "run").exit_code == 0
    events = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    done = next(event for event in events if event["event"] == "round_done")
    return folder / "run", done["metrics"] if "metrics" in done else done["eval"]


def test_every_folder_of_a_run_measures_the_same(ran, tmp_path):
    """The run, its round, its final folder, and its three exports: the numbers of the run's own last evaluation."""
    run, want = ran
    sources = [run, run / "final", run / "rounds" / "0001"]
    for form in ("merged", "adapter", "base+adapter"):
        sources.append(tmp_path / form)
        assert call("export", run, "--as", form, "-o", sources[-1]).exit_code == 0
    for source in sources:
        got = numbers("evaluate", source, *([] if source in sources[:3] else ["--task", "demo"]), "--rows", 40)
        assert got["task"] == "demo"
        assert got["accuracy"] == want["accuracy"], source
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5), source
    of_a_file = numbers("evaluate", sources[-1], "--config", run / "config.toml", "--rows", 40)
    assert of_a_file["accuracy"] == want["accuracy"]
    everything = numbers("evaluate", run)
    assert everything["rows"] == 600
    shown = call("evaluate", run).stdout
    assert "accuracy" in shown
    assert "600.0" not in shown  # a count


def test_e2e_from_run_to_scores(stories, data_folder, tmp_path):
    """`run` trains it, `evaluate` writes predictions that `score e2e` reads; the global model is the one that wrote them."""
    text = CONFIG.replace(str(base_folder()), str(stories)).replace('"demo"', '"e2e"').replace("eval_rows = 40", "eval_rows = 6")
    (tmp_path / "e2e.toml").write_text(text.replace("eval_rows = 6", "eval_rows = 6\nmax_length = 256"))
    out, texts = tmp_path / "run", tmp_path / "texts.tsv"
    ran = call("run", tmp_path / "e2e.toml", "--set", f"task.data={data_folder}", "--out", out, "--json")
    assert ran.exit_code == 0, ran.stderr
    found = numbers(
        "evaluate", out, "--rows", 6, "--predictions", texts, "--no-score", "--generate", "max_new_tokens=16", "--generate", "num_beams=3"
    )
    assert found["rows"] == 6
    asked = [line.split("\t")[0].strip('"') for line in texts.read_text().splitlines()[1:]]
    people = {mr: refs for mr, refs in read_references(data_folder / "e2e" / "testset_w_refs.csv").items() if mr in asked}
    assert set(score_e2e(read_predictions(texts, people), list(people.values()), ["BLEU", "NIST"])) == {"BLEU", "NIST"}


TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["green", "yellow", "red"]
doc_to_target: label
metric_list:
  - metric: acc
"""


def test_the_harness_on_a_task_of_one_s_own(ran, tmp_path, monkeypatch):
    """Ten notes of the demo as a task of lm-evaluation-harness: what it says is what the model's own likelihoods say."""
    pytest.importorskip("lm_eval")
    from fedex_lora import load_model
    from fedex_lora.tasks.demo import COLOURS, examples

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": row["prompt"], "label": COLOURS.index(row["completion"].strip())} for row in examples("chest", 10, 3)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(file=tmp_path / "rows.json"))
    run, _ = ran
    found = numbers("evaluate", run, "--lm-eval", "colours", "--include-path", tmp_path / "tasks")["lm_eval"]["colours"]
    model, tokenizer = load_model(run, base_folder()), AutoTokenizer.from_pretrained(base_folder())
    right = 0
    for row in rows:
        logits = model(**tokenizer(row["prompt"], return_tensors="pt")).logits[0, -1].detach()
        words = [tokenizer(f" {colour}", add_special_tokens=False)["input_ids"] for colour in COLOURS]
        assert all(len(word) == 1 for word in words)
        right += int(torch.tensor([logits[word[0]] for word in words]).argmax()) == row["label"]
    assert found["acc,none"] == pytest.approx(right / 10)
    (tmp_path / "tasks" / "far.yaml").write_text(
        TASK.format(file="x").replace("task: colours", "task: far").replace("path: json", "path: a/b")
    )
    line = one_line(call("evaluate", run, "--lm-eval", "far", "--include-path", tmp_path / "tasks"), 1)
    assert "the data of far cannot be had: go online" in line


def test_the_harness_is_not_installed(ran, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else real(name))
    assert "pip install '.[lm-eval]'" in one_line(call("evaluate", ran[0], "--lm-eval", "hellaswag"), 2)


def one_line(result, status):
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == status, (result.exit_code, result.stdout, result.stderr)
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--task", "demi"], 1, "did you mean 'demo'"),
        (["--task", "demo", "--lm-eval", "x"], 2, "give one of --task and --lm-eval"),
        (["--config", "c.toml", "--lm-eval", "x"], 2, "give one of --config and --lm-eval"),
        (["--include-path", "x"], 2, "--include-path is for --lm-eval"),
        (["--generate", "num_beams=1"], 2, "measured on predictions, not on texts"),
        (["--generate", "num_beams"], 2, "write it as num_beams=1"),
        (["--no-score"], 2, "--no-score is for --predictions"),
        (["--predictions", "/nowhere/p.tsv"], 2, "/nowhere does not exist"),
        (["--task", "e2e", "--data", "/nowhere"], 1, "/nowhere/trainset.csv does not exist"),
        (["--base", "nobody/nothing"], 1, "neither a local folder nor to be had from the hub"),
    ],
)
def test_bad_usage(arguments, status, message, ran):
    assert message in one_line(call("evaluate", ran[0], *arguments), status)


def test_bad_models(ran, tmp_path, data_folder):
    run, _ = ran
    assert "is right only on top of the base delta" in one_line(call("evaluate", run / "final" / "trainable", "--task", "demo"), 1)
    assert "give --config, --task or --lm-eval" in one_line(call("evaluate", base_folder()), 2)
    glue = ["--task", "glue/mrpc", "--data", data_folder / "glue", "--rows", 4]
    assert "is a model for causal-lm, and the task needs classification" in one_line(call("evaluate", run, *glue), 1)
    assert "has no trained score" in one_line(call("evaluate", base_folder(), *glue), 1)
    assert "neither a local folder" in one_line(call("evaluate", "nobody/nothing", "--task", "demo"), 1)
    (tmp_path / "config.toml").write_text(CONFIG)
    assert "has no final model yet" in one_line(call("evaluate", tmp_path), 1)
