"""What docs/privacy-costs.md says that privacy costs in accuracy, against the records of the runs."""

import re
from pathlib import Path

import numpy as np
import pytest
from benchmarks import private_methods

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "privacy-costs.md").read_text()


def cells(lines):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("name", "study"), [("notes", private_methods.notes()), ("sst2", private_methods.sst2(Path("nowhere"), Path("nowhere")))]
)
def test_the_page_says_what_was_run(name, study, monkeypatch):
    """All runs are there, so that none is made; each cell's rate is the best of the grid on the tuning seed."""
    monkeypatch.setattr(private_methods, "accuracy", lambda *_: pytest.fail("a run is not there"))
    records = private_methods.Records(ROOT / "results" / "private" / name / "records.jsonl")
    assert len(records.found) == len(study.methods) * len(study.epsilons) * (len(study.rates) + len(study.seeds))
    header = f"| epsilon | {' | '.join(study.methods)} |\n"
    lines = PAGE.partition(header)[2].splitlines()[1 : 1 + len(study.epsilons)]
    told, made = cells(lines), cells(private_methods.table(study, records).splitlines()[2:])
    assert [row[0] for row in told] == [row[0] for row in made]
    for said, counted in zip(told, made, strict=True):
        for words, cell in zip(said[1:], counted[1:], strict=True):
            assert re.findall(r"0\.\d{3}", words) == re.findall(r"0\.\d{3}", cell)[: 1 + ("±" in words)]
            if "(" in words:
                assert ("edge" in words) == ("edge" in cell)
                assert float(re.search(r"\de-\d", words)[0]) == float(re.search(r"at (\S+)", cell)[1])


def test_with_few_rows_privacy_costs_everything():
    study, records = private_methods.notes(), private_methods.Records(ROOT / "results" / "private" / "notes" / "records.jsonl")
    private = [(method, epsilon) for method, epsilon in private_methods.cells(study) if epsilon]
    rates = {cell: private_methods.best_rate(study, records, *cell) for cell in private}
    means = [np.mean([records.of(study, *cell, rates[cell], seed) for seed in study.seeds]) for cell in private]
    assert max(means) < 0.427 + 0.0055
