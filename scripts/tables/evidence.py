"""What the comparisons below evidence/ say: primary tests of all settings, and of each its arms and effects, from compare.json."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.power_of_comparisons import equivalence

from fedex_lora.experiments.compare._tests import at_round, holm, paired

RECORDS = Path(__file__).parents[2] / "evidence"
SETTINGS = ["notes", "topics", "places", "sentiment"]
LAST = 3  # rounds, of which effects are the mean
ARM = re.compile(r"(?P<exact>fedex|fedit)(?P<balanced>\+balanced)?(?P<momentum> momentum)?")
Arm = dict[str, bool]
"""Factor -> is it there."""


def found(name: str) -> dict[str, Any] | None:
    """A setting's result, with NaN where JSON has no number; None: it has not ended."""
    path = RECORDS / name / "compare.json"
    return _numbers(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    return [_numbers(inner) for inner in value] if isinstance(value, list) else math.nan if value is None else value


def primary(result: dict[str, Any]) -> dict[str, Any]:
    return next(test for test in result["tests"] if test["primary"])


def answer(test: dict[str, Any], p: float, greater: bool) -> str:
    """What a corrected p says."""
    if not p < 0.05:
        return "not shown"
    if test["kind"] == "equivalence":
        return "holds"
    return "holds" if (test["mean"] > 0) == greater else "refuted"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*names: str) -> list[str]:
    return [row(*names), "|---" * len(names) + "|"]


def tests() -> list[str]:
    """A row a setting. One that has not ended counts in Holm's correction as a test that failed."""
    results = {name: found(name) for name in SETTINGS}
    ps = {name: primary(result)["p"] if result else math.nan for name, result in results.items()}
    corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
    lines = head("setting", "centralised", "the reference", "their difference", "primary test", "difference", "seeds", "p", "p, Holm", "")
    for name, result in results.items():
        if result is None:
            lines.append(row(name, "not run", *[""] * 8))
            continue
        test, ends = primary(result), {method["name"]: method for method in result["methods"]}
        pooled, reference = ends["centralised"], result["reference"]
        lines.append(
            row(
                name,
                f"{pooled['mean']:.3f}",
                f"{reference}: {ends[reference]['mean']:.3f}",
                f"{pooled['difference']:+.3f} ± {pooled['difference_half_width']:.3f}",
                test["name"],
                f"{test['mean']:+.3f} ± {test['half_width']:.3f}",
                str(test["n"]),
                f"{test['p']:.2g}",
                f"{corrected[name]:.2g}",
                answer(test, corrected[name], result["greater_is_better"]),
            )
        )
    return lines


def last_rounds(result: dict[str, Any], method: dict[str, Any]) -> list[float]:
    """The mean of the last rounds, seed by seed."""
    return [at_round(values, result["rounds"], LAST) for values in method["seeds"].values()]


def arms(result: dict[str, Any]) -> list[str]:
    rounds = result["rounds"]
    lines = head("arm", "learning rate", f"after round {rounds}", f"mean of rounds {rounds - LAST + 1} to {rounds}")
    for method in result["methods"]:
        rate = method["settings"].get("training.learning_rate", result["config"]["training"]["learning_rate"])
        chosen = f"{rate:g}{', edge' if method['at_edge'] else ''}{'' if method['tuning'] else ', not tuned'}"
        later = paired(last_rounds(result, method))
        ends = f"{method['mean']:.3f} ± {method['half_width']:.3f}"
        lines.append(row(method["name"], chosen, ends, f"{later.mean:.3f} ± {later.half_width:.3f}"))
    return lines


def effects(result: dict[str, Any]) -> list[str]:
    """Of each factor: the mean over the arms that have it minus the mean over those that do not, paired by seed."""
    cells = list[tuple[Arm, list[float]]]()
    for method in result["methods"]:
        if match := ARM.fullmatch(method["name"]):
            arm = {"exact": match["exact"] == "fedex", "balanced": bool(match["balanced"]), "momentum": bool(match["momentum"])}
            cells.append((arm, last_rounds(result, method)))
    factors = [factor for factor in ("exact", "balanced", "momentum") if len({arm[factor] for arm, _ in cells}) == 2]

    def contrast(sign: Callable[[Arm], int]) -> Sequence[float]:
        return [2 * sum(sign(arm) * values[seed] for arm, values in cells) / len(cells) for seed in range(len(cells[0][1]))]

    asked = {factor: contrast(lambda arm, factor=factor: 1 if arm[factor] else -1) for factor in factors}
    for other in factors[1:]:
        both = contrast(lambda arm, other=other: 1 if arm["exact"] == arm[other] else -1)
        asked[f"exact, with {other} minus without"] = [2 * value for value in both]
    lines = head("effect", "difference", "p")
    for name, differences in asked.items():
        test = paired(differences)
        lines.append(row(name, f"{test.mean:+.4f} ± {test.half_width:.4f}", f"{test.p:.2g}"))
    return lines


def power(result: dict[str, Any]) -> list[str]:
    """How often the primary test would show equivalence if there were no difference, and how many seeds four times in five need."""
    test = primary(result)
    spread, n = test["standard_error"] * math.sqrt(test["n"]), test["n"]
    enough = next(seeds for seeds in range(2, 1000) if equivalence(0, test["bound"] / spread, seeds) >= 0.8)
    lines = head("test", "standard deviation of the difference", "seeds", "power", "seeds for a power of .8")
    return [*lines, row(test["name"], f"{spread:.4f}", str(n), f"{equivalence(0, test['bound'] / spread, n):.2f}", str(enough))]


def tables() -> dict[str, list[str]]:
    """Places of settings that have ended are in the page. One tuning seed is too few for effects: they would be of learning rates."""
    ended = {name: result for name in SETTINGS if (result := found(name))}
    made = {"primary": tests()} | {f"{name} arms": arms(result) for name, result in ended.items()}
    made |= {f"{name} power": power(result) for name, result in ended.items() if primary(result)["kind"] == "equivalence"}
    return made | {f"{name} effects": effects(result) for name, result in ended.items() if len(result["tuning_seeds"]) > 1}
