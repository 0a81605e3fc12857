"""What `evaluate --json` found, in a report: numbers, classes, and a confusion matrix that is drawn where its counts are."""

import json
import re

import pytest
import vl_convert
from tests.finished_runs import event, synthetic, written
from tests.report.test_report import EVIL, charts, parsed
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.cli._evaluate import _as_json
from fedex_lora.evaluation import ClassScore, ClassScores, Measured

NAMES, COUNTS = ["urgent", EVIL, "calm"], [[7, 0, 1], [2, 5, 0], [0, 0, 11]]


@pytest.fixture
def folder(tmp_path):
    """A run of which round 2 of 3 was best, and what the command prints of a model beside another."""
    told = {str(number): {"accuracy": 0.5 + 0.1 * (number == 2), "rows": 20} for number in (1, 2, 3)}
    events = [*list(synthetic(rounds=3, clients=2, layers=1))[:-1], event("run_done", rounds=3, best_round=2, held_out=told)]
    written(tmp_path / "run", events)
    scores = [ClassScore(name, 0.125, 0.25, 0.375 + index, sum(COUNTS[index])) for index, name in enumerate(NAMES)]
    turned = [list(row) for row in zip(*COUNTS, strict=True)]
    other = Measured({"accuracy": 0.25, "rows": 26}, ClassScores(scores, turned))
    measured = Measured({"accuracy": 0.875, "rows": 26, "prompts_cut": 3}, ClassScores(scores, COUNTS), other)
    said = {"model": "run", "task": "custom", **_as_json(measured, "base")}
    (tmp_path / "found.json").write_text(json.dumps(said))
    return tmp_path


def call(folder, *arguments):
    return CliRunner().invoke(app, ["report", str(folder / "run"), *(str(argument) for argument in arguments)])


def cells(svg):
    """The counts and the names of a drawing: text -> (x, y) of the marks' group."""
    found = re.findall(r'<text[^>]*transform="translate\(([-\d.]+),([-\d.]+)\)[^"]*"[^>]*>([^<]*)</text>', svg)
    return [(float(x), float(y), text) for x, y, text in found]


def test_counts_are_drawn_by_label_down_and_prediction_across(folder):
    """The compiled drawing, read by the places of its numbers; the table under it; metrics and classes beside those of the other model."""
    assert call(folder, "--evaluated", folder / "found.json", "-o", folder / "out.html").exit_code == 0
    html = (folder / "out.html").read_text()
    drawn = [one for one in charts(html) if one["description"].startswith("Confusion matrix")]
    for spec, counts in zip(drawn, [COUNTS, [list(row) for row in zip(*COUNTS, strict=True)]], strict=True):
        svg = vl_convert.vegalite_to_svg({**spec, "width": 300, "height": 300})
        numbers = [(round(y), round(x), int(text)) for x, y, text in cells(svg) if text.isdigit()]
        assert [number for _, _, number in sorted(numbers)] == [count for row in counts for count in row]
        shares = [value["share"] for value in spec["data"]["values"]]
        assert shares == pytest.approx([count / sum(row) for row in counts for count in row])
        assert [value["was"] for value in spec["data"]["values"][::3]] == NAMES
    tags, text = parsed(html)
    assert not [tag for tag, _ in tags if tag == "img"]
    assert "accuracy 0.8750 0.2500 +0.6250" in text
    assert "rows 26 26" in text
    assert "prompts_cut 3" in text
    assert "urgent 0.1250 0.2500 0.3750 0.3750 8" in text
    assert "calm 0 0 11" in text


def test_the_best_round_is_a_headline(folder):
    assert call(folder, "-o", folder / "out.html").exit_code == 0
    text = parsed((folder / "out.html").read_text())[1]
    assert "best round 2 by the clients' held-out rows (accuracy 0.6000 on 20 rows); export and evaluate take it by --round best" in text


@pytest.mark.parametrize("loss", ["null", "NaN", "Infinity"])
def test_a_number_that_is_not_finite_is_shown(loss, folder):
    """Beside another model's, and among a class's scores, too."""
    found = json.loads((folder / "found.json").read_text())
    found["beside"]["loss"], found["classes"][0]["f1"] = 0.5, None
    (folder / "nan.json").write_text(json.dumps(found)[:-1] + f', "loss": {loss}}}')
    assert call(folder, "--evaluated", folder / "nan.json", "-o", folder / "out.html").exit_code == 0
    text = parsed((folder / "out.html").read_text())[1]
    assert "loss not finite 0.5000" in text
    assert "urgent 0.1250 0.2500 – 0.3750 8" in text


CLASS = '{"name": "a", "recall": 1, "f1": 1, "support": 1%s}'


@pytest.mark.parametrize(
    "content",
    [
        None,
        "not json",
        '{"model": "x"}',
        '{"model": "x", "accuracy": 1, "confusion": [[1, 2], [3, 4]]}',
        *(f'{{"model": "x", "accuracy": 1, "classes": [{CLASS % more}], "confusion": [[1]]}}' for more in ("", ', "precision": "high"')),
    ],
)
def test_what_is_no_evaluation_is_one_line(content, folder):
    if content is not None:
        (folder / "odd.json").write_text(content)
    done = call(folder, "--evaluated", folder / "odd.json", "-o", folder / "out.html")
    assert done.exit_code == 2
    assert done.stderr.strip().endswith("is not what `fedex-lora evaluate RUN --json` prints: write that there, and give it again")
    assert not (folder / "out.html").exists()


@pytest.mark.parametrize("classes", [2, 15, 16, 77])
def test_of_many_classes_the_colours_tell(classes, folder):
    names = [f"class {number}" for number in range(classes)]
    scores = [{"name": name, "precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 3} for name in names]
    counts = [[3 * (row == column) for column in range(classes)] for row in range(classes)]
    found = {"model": "m", "accuracy": 1.0, "rows": 3.0 * classes, "classes": scores, "confusion": counts}
    (folder / "many.json").write_text(json.dumps(found))
    assert call(folder, "--evaluated", folder / "many.json", "-o", folder / "out.html").exit_code == 0
    spec = next(one for one in charts((folder / "out.html").read_text()) if one["description"].startswith("Confusion matrix"))
    svg = vl_convert.vegalite_to_svg({**spec, "width": 300})
    assert sum(text == "3" for _, _, text in cells(svg)) == (classes if classes <= 15 else 0)
    assert len(spec["data"]["values"]) == classes**2
