"""How often the tests of `compare` are wrong, and how often they see what is there: synthetic curves of a known effect, no training.

The curves go through the functions that a comparison's do (`experiments.compare.answers`); what should come out is computed from the
noncentral t distribution, and for equivalence by integration over the chi distribution of the standard error.

    python benchmarks/power_of_comparisons.py
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.integrate import quad
from scipy.stats import chi, nct, norm
from scipy.stats import t as student

from fedex_lora.experiments.compare import Hypothesis, answers

ROUNDS, LAST, ALPHA = 8, 3, 0.05  # the metric of a test is the mean of the last three rounds
OF_SEED, OF_RUN, OF_ROUND = 0.08, 0.02, 0.01  # standard deviations: shared by the variants of a seed, of one run, of one evaluation
SPREAD = math.sqrt(2 * (OF_RUN**2 + OF_ROUND**2 / LAST))
"""Of the difference of two runs with one seed."""
EFFECTS = {"null": 0.0, "effect": 1.0, "equal": 0.0, "at the bound": 1.0}
"""Of a pair of variants, in units of `SPREAD`."""
BOUND, NULLS = 1.0, 4


@dataclass(frozen=True)
class Rate:
    """How often something was found, and how often theory says."""

    what: str
    found: float
    theory: float
    times: int

    @property
    def error(self) -> float:
        """The standard deviation of `found`."""
        return math.sqrt(self.theory * (1 - self.theory) / self.times)


def curves(generator: np.random.Generator, effects: Mapping[str, float], seeds: int) -> dict[str, dict[int, list[float]]]:
    """Curves of a pair of variants, "NAME" and "NAME control", for each effect: they rise, and share what a seed does."""
    rise = 0.8 - 0.5 * np.exp(-np.arange(ROUNDS + 1) / 3)
    shared = OF_SEED * generator.standard_normal(seeds)
    made = {}
    for name, effect in effects.items():
        for variant, shift in ((name, effect * SPREAD), (f"{name} control", 0.0)):
            own = OF_RUN * generator.standard_normal((seeds, 1)) + OF_ROUND * generator.standard_normal((seeds, ROUNDS + 1))
            metric = rise + shared[:, None] + shift + own
            made[variant] = {seed: metric[seed].tolist() for seed in range(seeds)}
    return made


def hypothesis(name: str, kind: str = "two-sided", primary: bool = False) -> Hypothesis:
    """A pair against its control."""
    if kind == "equivalence":
        asked = Hypothesis(name=f"{name} equivalent", equivalent=(name, f"{name} control"), bound=BOUND * SPREAD, mean_of=LAST)
    else:
        asked = Hypothesis(name=f"{name} {kind}", better=name, than=f"{name} control", mean_of=LAST, primary=primary, alternative=kind)
    return asked.settled(ROUNDS)


def power(effect: float, seeds: int, sided: int) -> float:
    """Of a paired t-test, for a difference of `effect` standard deviations."""
    freedom, shift = seeds - 1, effect * math.sqrt(seeds)
    critical = student.ppf(1 - ALPHA / sided, freedom)
    return float(nct.sf(critical, freedom, shift) + (nct.cdf(-critical, freedom, shift) if sided == 2 else 0))


def equivalence(effect: float, bound: float, seeds: int) -> float:
    """How often two one-sided tests say that a difference of `effect` is within the bound, both in standard deviations."""
    freedom, root = seeds - 1, math.sqrt(seeds)
    critical = student.ppf(1 - ALPHA, freedom)

    def inside(ratio: float) -> float:  # of the estimated to the true standard error
        return max(0.0, norm.cdf((bound - effect) * root - critical * ratio) - norm.cdf((-bound - effect) * root + critical * ratio))

    return float(quad(lambda x: inside(x / math.sqrt(freedom)) * chi.pdf(x, freedom), 0, math.sqrt(freedom) * 4)[0])


def simulate(times: int = 1000, seeds: int = 12, start: int = 0) -> list[Rate]:
    """Draw curves so many times, and count."""
    generator = np.random.default_rng(start)
    nulls = [f"null {number}" for number in range(NULLS)]
    effects = {name: EFFECTS["null"] for name in nulls} | {name: EFFECTS[name] for name in ("effect", "equal", "at the bound")}
    family = [hypothesis(name, primary=True) for name in nulls]
    others = [
        hypothesis("effect"),
        hypothesis("effect", "greater"),
        *(hypothesis(name, "equivalence") for name in ("equal", "at the bound")),
    ]
    found = np.zeros(7)
    for _ in range(times):
        metrics = curves(generator, effects, seeds)
        together, alone = answers(metrics, [*family, *others], 1), answers(metrics, family[:1], 1)
        falling = answers({name: {s: [-m for m in row] for s, row in one.items()} for name, one in metrics.items()}, others[1:2], -1)
        seen = [alone[0]["p_holm"], min(record["p_holm"] for record in together[:NULLS]), *(record["p"] for record in together[NULLS:])]
        found += np.array([*seen, falling[0]["p"]]) <= ALPHA
    effect = EFFECTS["effect"]
    theory: Sequence[tuple[str, float]] = (
        ("false alarms of one primary test", ALPHA),
        (f"any false alarm of {NULLS} primary tests, Holm", 1 - (1 - ALPHA / NULLS) ** NULLS),
        (f"power, d = {effect:g}, two-sided", power(effect, seeds, 2)),
        (f"power, d = {effect:g}, one-sided", power(effect, seeds, 1)),
        ("equivalence of what is equal", equivalence(0, BOUND, seeds)),
        ("false equivalence, at the bound", equivalence(EFFECTS["at the bound"], BOUND, seeds)),
        (f"power, d = {effect:g}, one-sided, smaller is better", power(effect, seeds, 1)),
    )
    return [Rate(what, count / times, expected, times) for count, (what, expected) in zip(found, theory, strict=True)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--times", type=int, default=1000)
    options.add_argument("--seeds", type=int, default=12)
    given = options.parse_args()
    print(f"{given.seeds} seeds, {given.times} times, alpha {ALPHA}\n\n| | found | theory | standard deviation |\n|---|---|---|---|")
    for rate in simulate(given.times, given.seeds):
        print(f"| {rate.what} | {rate.found:.3f} | {rate.theory:.3f} | {rate.error:.3f} |")


if __name__ == "__main__":
    main()
