"""Tasks: published layouts, metrics equal to the libraries' formulas, templates, and what is said of bad data."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics
from transformers import AutoTokenizer, EvalPrediction

from fedex_lora import config
from fedex_lora.config import Clients, base_folder
from fedex_lora.errors import DataError
from fedex_lora.tasks import TASKS, load_task
from fedex_lora.tasks._completions import FULL, IGNORED, completion_metrics, tokenize_completions
from fedex_lora.tasks._metrics import class_metrics
from fedex_lora.tasks._task import _draw
from fedex_lora.tasks.demo import COLOURS, WARDS, colour_of
from fedex_lora.tasks.partition import partition
from fedex_lora.tasks.scoring.choices import CHOICES


def settings(**changes):
    return config.TaskSettings(**{"name": "demo", **changes})


@pytest.mark.parametrize(
    ("name", "train", "dev", "headline"),
    [
        ("glue/cola", 8551, 1043, "mcc"),
        ("glue/rte", 2490, 277, "accuracy"),
        ("glue/mrpc", 3668, 408, "accuracy"),
        ("glue/sst2", 67349, 872, "accuracy"),
        ("glue/stsb", 5749, 1500, "pearson"),
    ],
)
def test_glue_in_its_published_layout(name, train, dev, headline, data_folder):
    """Row counts as published, and every row tokenises with a label."""
    task = load_task(settings(name=name, data=data_folder / "glue"), 0)
    assert (len(task.train), len(task.eval), task.headline) == (train, dev, headline)
    rows = task.tokenize(AutoTokenizer.from_pretrained(base_folder()), task.eval.head(20))
    assert len(rows) == 20
    assert {"input_ids", "attention_mask", "labels"} <= set(rows.column_names)


def test_the_first_mrpc_row(data_folder):
    task = load_task(settings(name="glue/mrpc", data=data_folder / "glue"), 0)
    assert task.train.iloc[0]["#1 String"].startswith('Amrozi accused his brother, whom he called "the witness"')
    assert task.classes[:3].tolist() == [1, 0, 1]


@pytest.mark.parametrize("degenerate", [False, True])
def test_glue_metrics_are_those_of_sklearn_and_scipy(degenerate):
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 2, 200), rng.normal(size=(200, 2))
    if degenerate:
        logits[:, 1] = -9
    got = class_metrics(EvalPrediction(predictions=logits, label_ids=labels), ("accuracy", "f1", "mcc"))
    chosen = logits.argmax(1)
    assert got == {
        "accuracy": metrics.accuracy_score(labels, chosen),
        "f1": metrics.f1_score(labels, chosen, zero_division=0.0),
        "mcc": metrics.matthews_corrcoef(labels, chosen),
    }
    scores, values = rng.normal(size=200), np.zeros(200) if degenerate else rng.normal(size=200)
    got = class_metrics(EvalPrediction(predictions=values[:, None], label_ids=scores), ("pearson", "spearman"))
    want = (0.0, 0.0) if degenerate else (stats.pearsonr(values, scores)[0], stats.spearmanr(values, scores)[0])
    assert tuple(got.values()) == pytest.approx(want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "glue/mrcp"}, "did you mean 'glue/mrpc'"),
        ({"name": "glue/mrpc", "data": "/nowhere"}, r"/nowhere/train.tsv does not exist"),
        ({"name": "glue/mrpc"}, "go online, or give task.data"),
        ({"name": "custom"}, "needs task.train"),
        ({"name": "custom", "train": "a.csv", "eval": "a.csv"}, r"a.csv does not exist"),
        ({"name": "custom", "train": "nobody/nothing", "eval": "nobody/nothing"}, "cannot be had from the hub"),
    ],
)
def test_data_that_is_not_there(changes, message):
    with pytest.raises(DataError, match=message):
        load_task(settings(**changes), 0)


ROWS = [{"question": f"q{i}", "answer": f"a{i}", "kind": "odd" if i % 2 else "even"} for i in range(6)]


@pytest.fixture(params=["jsonl", "json", "csv", "tsv", "parquet"])
def file(request, tmp_path):
    import pandas as pd

    frame, path = pd.DataFrame(ROWS), tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif request.param == "json":
        path.write_text(json.dumps(ROWS))
    elif request.param == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if request.param == "tsv" else ",")
    return path


def test_custom_files(file):
    task = load_task(settings(name="custom", train=str(file), eval=str(file), text=["question", "answer"], label="kind"), 0)
    assert (len(task.train), task.model_config["num_labels"], task.classes.tolist()) == (6, 2, [0, 1, 0, 1, 0, 1])
    lm = load_task(
        settings(name="custom", kind="causal-lm", train=str(file), eval=str(file), prompt="{question}?", completion=" {answer}"), 0
    )
    assert len(lm.tokenize(AutoTokenizer.from_pretrained(base_folder()), lm.train)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ["question"], "label": "kin"}, "no column 'kin': did you mean 'kind'"),
        ({"text": ["sentence"], "label": "kind"}, "no column 'sentence'"),
        ({"kind": "causal-lm", "prompt": "{questoin}", "completion": "{answer}"}, "did you mean 'question'"),
        ({"kind": "causal-lm", "prompt": "{question", "completion": "{answer}"}, "template"),
        ({"kind": "causal-lm", "prompt": "{question!r}", "completion": "{answer}"}, "no column 'question!r': did you mean 'question'"),
        ({"kind": "causal-lm", "prompt": "{question.__class__}", "completion": "{answer}"}, "no column 'question.__class__'"),
    ],
)
def test_custom_columns_and_templates(changes, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(DataError, match=message):
        load_task(settings(**{"name": "custom", "train": str(path), "eval": str(path), **changes}), 0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\nx,1\ny,\n", r"1 row with no 'label' \(line 3\)"),
        ("a.jsonl", '{"text": null, "label": 1}\n{"text": "x", "label": 0}\n', r"1 row with no 'text' \(line 1\)"),
        ("a.csv", "text,label\nx,1,more\ny,0\n", "more fields than its header|cannot be read"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.xlsx", "x", "an ending that is not read"),
    ],
)
def test_holes_and_shifted_columns(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_task(settings(name="custom", data=tmp_path, train=name, eval=name), 0)


def test_a_label_outside_the_set(tmp_path):
    for name, kinds in (("train", "ab"), ("eval", "ac")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": "x", "label": kind}) + "\n" for kind in kinds))
    with pytest.raises(DataError, match=r"eval.jsonl: 1 row with a label outside \['a', 'b'\] \('c'\) \(line 2\)"):
        load_task(settings(name="custom", data=tmp_path, train="train.jsonl", eval="eval.jsonl"), 0)


def test_the_loss_is_on_the_completion_only():
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    rows = tokenize_completions(tokenizer, ["bed 4 : the man has itch , rash and burn . triage :"], [" red"], 64, end=False)
    labels, ids = rows[0]["labels"], rows[0]["input_ids"]
    assert [label for label in labels if label != IGNORED] == tokenizer(" red", add_special_tokens=False)["input_ids"]
    assert ids[-1] == labels[-1]
    cut = tokenize_completions(tokenizer, ["bed 4 : the man has itch , rash and burn . triage :"], [" red red red red"], len(ids) + 1)
    assert cut[0]["input_ids"][: len(ids)] == ids  # the beginning stays
    assert cut[0]["labels"][len(ids) - 1 :] == [labels[-1]] * 2
    assert (len(cut[0]["input_ids"]), cut[0][FULL]) == (len(ids) + 1, len(ids) + 4)


def test_completion_metrics_by_hand():
    labels = np.array([[IGNORED, IGNORED, 5, 6], [IGNORED, 7, 8, IGNORED]])
    predicted = np.array([[0, 5, 6, 0], [7, 9, 0, 0]])  # what stands at t predicts t + 1
    got = completion_metrics(EvalPrediction(predictions=predicted, label_ids=labels))
    assert got == {"token_accuracy": 0.75, "accuracy": 0.5}


def test_the_demo_needs_every_hospital():
    assert colour_of(["sniffle", "hoarseness", "cough"]) == "green"
    assert colour_of(["wheeze", "palpitations", "cough"]) == "yellow"
    assert colour_of(["collapse", "breathlessness", "sniffle"]) == "red"
    task = load_task(settings(), 0)
    assert set(task.train["hospital"]) == set(WARDS)
    assert set(task.train["completion"].str.strip()) == set(COLOURS)


@pytest.mark.parametrize(
    "clients", [Clients(), Clients(count=7), Clients(partition="dirichlet", count=4), Clients(partition="column", column="hospital")]
)
def test_every_row_belongs_to_one_client(clients):
    task = load_task(settings(), 0)
    parts = partition(task, clients, seed=1)
    everything = np.sort(np.concatenate([np.concatenate(part) for part in parts.values()]))
    assert np.array_equal(everything, np.arange(len(task.train)))
    assert all(len(train) and abs(len(held) - 0.1 * (len(train) + len(held))) <= 1 for train, held in parts.values())
    again = partition(task, clients, seed=1)
    assert all(np.array_equal(parts[client][0], again[client][0]) for client in parts)


def test_how_rows_are_dealt():
    """What alpha, the column and the seed do; and that neither the order of a file nor its first rows decide anything."""
    task = load_task(settings(), 0)

    def dealt(seed=1, **clients):
        return partition(task, Clients(**clients), seed)

    def largest(parts):
        return np.mean([np.bincount(task.classes[train], minlength=3).max() / len(train) for train, _ in parts.values()])

    even, skewed = (largest(dealt(partition="dirichlet", dirichlet_alpha=alpha)) for alpha in (1000, 0.1))
    assert even < 0.6 < skewed
    for name, rows in dealt(partition="column", column="hospital").items():
        assert set(task.train["hospital"].iloc[np.concatenate(rows)]) == {name}
    by_ward = dealt(partition="dirichlet", column="hospital", dirichlet_alpha=0.05)
    wards = [task.train["hospital"].iloc[train] for train, _ in by_ward.values()]
    assert max(ward.value_counts(normalize=True).max() for ward in wards) > 0.8
    (one, held), (other, _) = (dealt(seed)["client-0"] for seed in (1, 2))
    assert not np.array_equal(one, other)
    assert (np.diff(one) > 1).any()
    assert held.max() > one.min()


def test_rows_are_drawn_once_by_the_seed():
    one, two = (load_task(settings(train_rows=20, eval_rows=9), seed) for seed in (0, 1))
    assert not one.train.equals(two.train)
    for seed in range(3):
        drawn = _draw(100, 20, seed)
        assert len(set(drawn.tolist())) == 20
        assert list(drawn) == sorted(drawn)
    assert not np.array_equal(_draw(100, 20, 0), _draw(100, 20, 1))


def test_dirichlet_skews():
    task = load_task(settings(), 0)
    shares = [
        np.bincount(task.classes[train], minlength=3) / len(train)
        for train, _ in partition(task, Clients(partition="dirichlet", dirichlet_alpha=0.1), seed=0).values()
    ]
    assert max(share.max() for share in shares) > 0.8


def test_clients_without_rows_are_named():
    task = load_task(settings(train_rows=5), 0)
    with pytest.raises(DataError, match=r"client-.* gets no examples"):
        partition(task, Clients(count=9), seed=0)
    with pytest.raises(DataError, match="no column of the training rows"):
        partition(task, Clients(partition="column", column="ward"), seed=0)


def test_every_task_has_a_loader():
    glue = {"glue/mrpc", "glue/cola", "glue/rte", "glue/sst2", "glue/qnli", "glue/stsb"}
    arithmetic = {"arithmetic/gsm8k", "arithmetic/math"}
    assert {"demo", "custom", "e2e", *glue, *arithmetic, *(f"commonsense/{name}" for name in CHOICES)} == set(TASKS)


@pytest.mark.parametrize("names", [("accuracy", "macro_f1"), ("mse", "pearson")])
def test_what_is_no_number_is_no_prediction(names):
    """Nor an error in the middle of a round."""
    outputs, labels = np.array([[np.nan, 1.0], [0.0, 1.0]]), np.array([0, 1])
    scores = outputs if names[0] == "accuracy" else outputs[:, :1]
    found = class_metrics(EvalPrediction(predictions=scores, label_ids=labels), names)
    assert list(found) == list(names)
    assert np.isnan(list(found.values())).all()
