"""The tests of a comparison: against scipy's, and, by simulation, against what theory says of false alarms and power."""

import math

import numpy as np
import pytest
from benchmarks.power_of_comparisons import simulate
from scipy import stats

from fedex_lora.errors import UsageError
from fedex_lora.experiments.compare import Hypothesis, answers, parse_protocol
from fedex_lora.experiments.compare._picture import bands, spread
from fedex_lora.experiments.compare._statistics import at_rounds
from fedex_lora.experiments.compare._tests import holm, paired, tost


@pytest.fixture(scope="module")
def pairs():
    generator = np.random.default_rng(3)
    return [0.03 * generator.standard_normal((2, n)) + [[0.02], [0.0]] for n in (2, 3, 12)]


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_a_paired_test_is_student_s(pairs, alternative):
    for one, other in pairs:
        found, reference = paired(list(one - other), alternative), stats.ttest_rel(one, other, alternative=alternative)
        assert (found.t, found.p) == (pytest.approx(reference.statistic), pytest.approx(reference.pvalue))
        interval = stats.ttest_rel(one, other).confidence_interval(0.95)
        assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(interval))
        assert (found.n, found.standard_error) == (len(one), pytest.approx(stats.sem(one - other)))


def test_equivalence_is_two_one_sided_tests(pairs):
    """So it holds at 5 % where the 90 % interval lies within the bound."""
    for one, other in pairs:
        above = stats.ttest_1samp(one - other, -0.05, alternative="greater").pvalue
        below = stats.ttest_1samp(one - other, 0.05, alternative="less").pvalue
        assert tost(list(one - other), 0.05) == pytest.approx(max(above, below))
        edges = stats.ttest_rel(one, other).confidence_interval(0.9)
        bound = max(abs(edges.low), abs(edges.high))
        assert tost(list(one - other), 1.001 * bound) < 0.05 < tost(list(one - other), 0.999 * bound)


def test_holm_steps_down():
    """Worked by hand: 0.01 x 4, 0.013 x 3 is below that, 0.02 x 2 stays below one, 0.5 is last."""
    assert holm([0.5, 0.013, 0.02, 0.01]) == pytest.approx([0.5, 0.04, 0.04, 0.04])
    assert holm([0.03]) == [0.03]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("values", [[0.1], [], [0.1, math.nan], [0.1, math.inf], [0.0, 0.0, 0.0], [0.1 + 0.2, 0.3]])
def test_what_cannot_be_computed_is_never_significant(values):
    assert math.isnan(paired(values).p)
    assert math.isnan(tost(values, 1.0))
    assert holm([math.nan, 0.02]) == [pytest.approx(math.nan, nan_ok=True), 0.04]  # it counts


METRICS = {
    "a": {0: [0.1, 0.5, 0.7], 1: [0.1, 0.5, 0.8], 2: [0.1, 0.6, 0.8]},
    "b": {0: [0.1, 0.4, 0.6], 1: [0.1, 0.3, 0.6], 2: [0.1, 0.5, 0.7]},
    "c": {0: [0.1, 0.4, 0.9], 1: [0.1, math.nan, 0.9], 2: [0.1, 0.5, 0.9]},
}


def asked(**fields):
    return parse_protocol({"tests": [fields]}).tests[0].settled(2)


def test_rounds_means_and_the_best_control():
    """Each side at its own round; of the controls the one that was best in tuning, though another is best here."""
    scores = {"b": (0.9, -1.0), "c": (0.2, -1.0)}
    tests = [
        asked(better="a", than="b", round_better=1, round_than=2, primary=True),
        asked(better="a", than_best_of=["c", "b"], mean_of=2),
        asked(better="a", than="c", mean_of=2, primary=True),
        asked(equivalent=["a", "b"], bound=0.3),
    ]
    early, best, broken, equal = answers(METRICS, tests, 1, scores)
    assert early["differences"] == pytest.approx([-0.1, -0.1, -0.1])
    assert not early["computable"]  # all the same
    assert best["variants"] == ["a", "b"]
    assert best["differences"] == pytest.approx([0.1, 0.2, 0.1])
    assert best["p"] == pytest.approx(stats.ttest_1samp([0.1, 0.2, 0.1], 0).pvalue)
    assert best["p_holm"] is None
    assert not broken["computable"]
    assert math.isnan(broken["p_holm"])
    assert equal["p"] == pytest.approx(tost([0.1, 0.2, 0.1], 0.3))
    assert [test["name"] for test in (early, best, equal)] == ["a > b", "a > the best of c, b", "a = b"]


def test_better_is_smaller_where_smaller_is_better():
    """A loss that is lower has p below one half, one-sided, and the other way round above it."""
    lower = [asked(better="b", than="a", alternative="greater"), asked(better="a", than="b", alternative="greater")]
    small, large = (record["p"] for record in answers(METRICS, lower, -1))
    assert small < 0.05
    assert large == pytest.approx(1 - small)


def test_variants_side_by_side_at_rounds():
    (record,) = at_rounds(METRICS, "a", [1], ["c"])
    assert record["round"] == 1
    one, other, apart = record["methods"].values()
    assert (one["mean"], one["difference"]) == (pytest.approx(1.6 / 3), None)
    assert other["difference"] == pytest.approx(-0.4 / 3)
    assert other["p"] == pytest.approx(stats.ttest_1samp([-0.1, -0.2, -0.1], 0).pvalue)
    assert math.isnan(apart["mean"])
    assert apart["p"] is None


def test_bands_are_intervals_of_the_mean_and_labels_keep_apart():
    rows = [{"name": name, "seeds": {str(seed): metric for seed, metric in by_seed.items()}} for name, by_seed in METRICS.items()]
    for row, band in zip(rows, bands({"methods": rows}).values(), strict=True):
        for number, (mean, low, high) in enumerate(band):
            values = [metric[number] for metric in row["seeds"].values()]
            reference = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values)) if np.ptp(values) else (values[0], values[0])
            assert (low, high) == pytest.approx(reference, nan_ok=True)
            assert mean == pytest.approx(np.mean(values), nan_ok=True)
    ends = [0.8, 0.5, 0.81, 0.79, 0.3]
    placed = spread(ends, 0.05)
    assert np.argsort(placed).tolist() == np.argsort(ends).tolist()
    assert np.diff(sorted(placed)).min() > 0.05 - 1e-12
    assert (placed[1], placed[4]) == (0.5, 0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"better": "a"}, "one of `than` and `than_best_of`"),
        ({"better": "a", "than": "b", "than_best_of": ["c"]}, "one of `than` and `than_best_of`"),
        ({"better": "a", "than": "b", "equivalent": ["a", "b"], "bound": 1}, "or `equivalent`"),
        ({"equivalent": ["a", "b"]}, "give both or neither"),
        ({"equivalent": ["a", "b"], "bound": 0}, "bound 0: input should be greater than 0"),
        ({"equivalent": ["a", "b"], "bound": 0.1, "round_than": 2}, "`equivalent` takes `round`"),
        ({"better": "a", "than": "b", "round": 1, "round_than": 2}, "give `round`, or"),
        ({"better": "a", "than": "b", "round": 0}, "greater than or equal to 1"),
        ({"better": "a", "then": "b"}, "unknown key tests.0.then: did you mean than?"),
        ({"better": "a", "than": "b", "alternative": "less"}, "'two-sided' or 'greater'"),
    ],
)
def test_tests_that_ask_nothing(fields, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_protocol({"tests": [fields]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seeds", [5, 12])
def test_false_alarms_and_power_are_theory_s(seeds, capsys):
    """1,000 comparisons of synthetic curves; everything is within three standard deviations of the binomial."""
    for rate in simulate(1000, seeds):
        print(f"{seeds} seeds: {rate.what}: {rate.found:.3f}, theory {rate.theory:.3f}")
        assert abs(rate.found - rate.theory) <= 3 * rate.error, rate


def test_the_simulation_can_fail(monkeypatch):
    """Without the pairing by seed the false alarms are not those of theory."""
    monkeypatch.setattr("benchmarks.power_of_comparisons.answers", lambda metrics, tests, *rest: answers(unpaired(metrics), tests, *rest))
    rates = simulate(200, 12)
    assert any(abs(rate.found - rate.theory) > 3 * rate.error for rate in rates)


def unpaired(metrics):
    return {name: {seed: by_seed[(seed + ("control" in name)) % len(by_seed)] for seed in by_seed} for name, by_seed in metrics.items()}


def test_a_hypothesis_needs_no_file():
    assert Hypothesis(better="a", than="b").settled(4).rounds == (4, 4)
