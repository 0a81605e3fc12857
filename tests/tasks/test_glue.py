"""GLUE's metrics against scikit-learn, scipy and the plain formulas, through the tasks, and what is said of broken files."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics
from transformers import EvalPrediction

from fedex_lora.config import TaskSettings
from fedex_lora.errors import DataError
from fedex_lora.experiments.reproduce import write_tiny_data
from fedex_lora.tasks import load_task

OFFICIAL = {
    "cola": {"mcc": metrics.matthews_corrcoef},
    "rte": {"accuracy": metrics.accuracy_score},
    "mrpc": {"accuracy": metrics.accuracy_score, "f1": lambda labels, chosen: metrics.f1_score(labels, chosen, zero_division=0.0)},
    "sst2": {"accuracy": metrics.accuracy_score},
    "qnli": {"accuracy": metrics.accuracy_score},
    "stsb": {"pearson": lambda y, x: stats.pearsonr(x, y)[0], "spearman": lambda y, x: stats.spearmanr(x, y)[0]},
}


def by_hand(name, labels, chosen):
    """The definitions, from counts."""
    hits, pairs = np.asarray(labels) == np.asarray(chosen), list(zip(labels, chosen, strict=True))
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (0, 1), (1, 0)))
    if name == "accuracy":
        return hits.mean()
    if name == "f1":
        return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / below if below else 0.0


def correlation(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_data(folder)
    return folder / "glue"


def predictions(kind, labels, rng):
    """Logits of two classes that choose as `kind` says."""
    chosen = {
        "random": rng.integers(0, 2, len(labels)),
        "all 0": np.zeros(len(labels), int),
        "all 1": np.ones(len(labels), int),
        "right": labels,
        "wrong": 1 - labels,
    }[kind]
    return np.where(np.arange(2) == chosen[:, None], 1.0, -1.0) * rng.uniform(0.1, 9, (len(labels), 1)), chosen


@pytest.mark.parametrize("kind", ["random", "all 0", "all 1", "right", "wrong"])
@pytest.mark.parametrize("labelled", ["both", "all 0", "all 1"])
@pytest.mark.parametrize("name", ["cola", "rte", "mrpc", "sst2", "qnli"])
def test_classification_is_scored_as_officially(name, labelled, kind, tiny):
    rng = np.random.default_rng(len(name))
    labels = {"both": rng.integers(0, 2, 300), "all 0": np.zeros(300, int), "all 1": np.ones(300, int)}[labelled]
    logits, chosen = predictions(kind, labels, rng)
    got = load_task(TaskSettings(name=f"glue/{name}", data=tiny), 0).metrics(EvalPrediction(predictions=logits, label_ids=labels))
    assert list(got) == list(OFFICIAL[name])
    for metric, official in OFFICIAL[name].items():
        assert got[metric] == official(labels, chosen)
        assert got[metric] == pytest.approx(by_hand(metric, labels.tolist(), chosen.tolist()))


@pytest.mark.parametrize("kind", ["random", "ties", "right", "reversed", "constant", "constant labels"])
def test_similarity_is_scored_as_officially(kind, tiny):
    rng = np.random.default_rng(7)
    labels = np.full(300, 2.0) if kind == "constant labels" else rng.uniform(0, 5, 300)
    scores = {
        "random": rng.normal(size=300),
        "ties": rng.integers(0, 4, 300).astype(float),
        "right": labels * 2 + 1,
        "reversed": -labels,
        "constant": np.full(300, 3.7),
        "constant labels": rng.normal(size=300),
    }[kind]
    task = load_task(TaskSettings(name="glue/stsb", data=tiny), 0)
    got = task.metrics(EvalPrediction(predictions=scores[:, None].astype(np.float32), label_ids=labels.astype(np.float32)))
    if kind.startswith("constant"):  # scipy has no number for it
        assert got == {"pearson": 0.0, "spearman": 0.0}
        return
    scores, labels = scores.astype(np.float32).astype(float), labels.astype(np.float32).astype(float)
    for metric, official in OFFICIAL["stsb"].items():
        assert got[metric] == pytest.approx(official(labels, scores), abs=1e-12)
    assert got["pearson"] == pytest.approx(correlation(scores, labels))
    assert got["spearman"] == pytest.approx(correlation(stats.rankdata(scores), stats.rankdata(labels)))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("CoLA", "\t1\t", "\t2\t", r"glue/cola has a label '2' outside \['0', '1'\]"),
        ("RTE", "not_entailment", "maybe", r"glue/rte has a label 'maybe' outside"),
        ("STS-B", "1.667", "high", r"glue/stsb has a score 'high' that is no number"),
        ("MRPC", "Quality", "Qualitaet", r"no column 'Quality': did you mean 'Qualitaet'"),
        ("SST-2", "\t1\n", "\t\n", r"1 row with no 'label' \(line 2\)"),
    ],
)
def test_broken_files(name, old, new, message, tmp_path):
    write_tiny_data(tmp_path)
    path = tmp_path / "glue" / name / "train.tsv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        load_task(TaskSettings(name=f"glue/{name.replace('-', '').lower()}", data=tmp_path / "glue"), 0)
    assert "\n" not in str(caught.value)
