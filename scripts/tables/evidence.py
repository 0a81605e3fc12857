"""What the comparisons below evidence/ say, from compare.json and the records: all primary tests; of each setting its arms and tests."""

import json
import math
import re
import sys
import tarfile
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.power_of_comparisons import equivalence

from fedex_lora.experiments.compare._plan import label
from fedex_lora.experiments.compare._tests import at_round, holm, paired

RECORDS = Path(__file__).parents[2] / "evidence"
SETTINGS = ["notes", "topics", "places", "sentiment"]
ADDED = ["notes/long", "notes/cores", "notes/steps", "topics/heads", "sentiment/again"]
LAST = 3  # rounds, of which an arm's second number is the mean
CONTRASTS = [  # thought of after the results, where both arms are there
    *((f"{name}+balanced{rest}", f"{name}{rest}") for name in ("fedit", "fedex") for rest in ("", " momentum")),
    ("fedit momentum of factors", "fedit momentum"),
]


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
    lines = head("setting", "lost", "centralised", "FedIT", "centralised minus FedIT", "primary", "difference", "seeds", "p", "p, Holm", "")
    for name, result in results.items():
        if result is None:
            lines.append(row(name, "not ended", *[""] * 9))
            continue
        test, ends = primary(result), {method["name"]: method for method in result["methods"]}
        pooled, reference = ends["centralised"], result["reference"]
        lines.append(
            row(
                name,
                lost(name, ends[reference]),
                f"{pooled['mean']:.3f}",
                f"{ends[reference]['mean']:.3f}",
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


def rounds_of(name: str, method: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rounds of an arm's test runs, seed by seed; none: there are no records."""
    archive = RECORDS / name / "runs.tar.xz"
    if not archive.is_file():
        return []
    wanted = {f"runs/{method['name']}/{label(method['settings'])}/seed-{seed}/events.jsonl" for seed in method["seeds"]}
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(member).read().decode() for member in tar if member.name in wanted]
    if len(files) != len(wanted):
        sys.exit(f"{archive} has {len(files)} of {len(wanted)} runs of {method['name']}")
    return [[event for event in map(json.loads, file.splitlines()) if event["event"] == "round_done"] for file in files]


def lost(name: str, method: dict[str, Any]) -> str:
    """How far plain averaging is from the mean of products, all modules together: in the first round and in the last, mean of the seeds."""
    runs = rounds_of(name, method)
    return f"{mean(run[0]['deviation'] for run in runs):.0%}, {mean(run[-1]['deviation'] for run in runs):.0%}" if runs else "no records"


def losses(ended: dict[str, dict[str, Any]]) -> list[str]:
    """The same as Frobenius norms over all modules, of what is lost and of the mean of products."""
    lines = head("setting", "lost, first round", "last", "mean of products, first round", "last")
    for name, result in ended.items():
        reference = next(method for method in result["methods"] if method["name"] == result["reference"])
        if not (runs := rounds_of(name, reference)):
            continue
        norms = [mean(math.hypot(*run[at]["modules"][which]) for run in runs) for which in ("deviation", "ideal") for at in (0, -1)]
        lines.append(row(name, *(f"{norm:.2f}" for norm in norms)))
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


def asked(result: dict[str, Any]) -> list[str]:
    """The tests of the protocol, as they are: no p is corrected."""
    lines = head("test", "difference of", "and", "mean of rounds", "difference", "p")
    for test in result["tests"]:
        (here, there), (one, other), many = test["rounds"], test["variants"], test["mean_of"]
        rounds = f"{here - many + 1} to {here}" + (f", {there - many + 1} to {there}" if there != here else "")
        p = f"{test['p']:.2g}" + (f", of equivalence within {test['bound']:g}" if test["kind"] == "equivalence" else "")
        lines.append(
            row(
                f"**{test['name']}**" if test["primary"] else test["name"],
                one,
                other,
                rounds,
                f"{test['mean']:+.4f} ± {test['half_width']:.4f}",
                p,
            )
        )
    return lines


def contrasts(result: dict[str, Any]) -> list[str]:
    """Differences that the protocol does not ask for; of H1's arms at equal rounds too, and of each with itself."""
    rounds, (here, there) = result["rounds"], next(test["rounds"] for test in result["tests"] if test["name"] == "H1")
    ours, control = next(test["variants"] for test in result["tests"] if test["name"] == "H1")
    alone = [(f"fedex{gauge}{rest}", f"fedit{gauge}{rest}") for gauge in ("", "+balanced") for rest in ("", " momentum")]
    asked = [
        *((one, other, (rounds, rounds), (LAST, LAST)) for one, other in CONTRASTS),
        *((one, one, (here, there), (LAST, LAST)) for one in (ours, control)),
        *((ours, other, (here, here), (LAST, LAST)) for other in (control, "fedit")),
        *((one, other, (at, at), (many, many)) for one, other in alone for at, many in ((here, LAST), (rounds, 1))),
    ]
    return differences(result, asked)


def of_heads(result: dict[str, Any]) -> list[str]:
    """Where the arms are when their heads are frozen, after round 2, and what each gains from there."""
    rounds, (_, ours, *cores) = result["rounds"], [method["name"] for method in result["methods"]]
    lead = [(core, ours, (2, 2), (1, 1)) for core in cores]
    return differences(result, [*lead, *((arm, arm, (rounds, 2), (LAST, 1)) for arm in (ours, *cores))])


def differences(result: dict[str, Any], asked: list[tuple[str, str, tuple[int, int], tuple[int, int]]]) -> list[str]:
    """One arm minus another, each after a round or as the mean of so many up to that one; no p is corrected."""
    arms = {method["name"]: list(method["seeds"].values()) for method in result["methods"]}
    lines = head("difference of", "and", "mean of rounds", "difference", "p")
    for one, other, at, many in dict.fromkeys(asked):
        if {one, other} <= arms.keys():
            pairs = zip(arms[one], arms[other], strict=True)
            found = paired([at_round(mine, at[0], many[0]) - at_round(yours, at[1], many[1]) for mine, yours in pairs])
            spans = [f"{last - count + 1} to {last}" if count > 1 else str(last) for last, count in zip(at, many, strict=True)]
            difference = f"{found.mean:+.4f} ± {found.half_width:.4f}"
            lines.append(row(one, other, ", ".join(dict.fromkeys(spans)), difference, f"{found.p:.2g}"))
    return lines


def hours(ended: list[str]) -> list[str]:
    """Core-hours of the rounds of each comparison's runs, tuning included; a run has one thread."""
    lines = head("comparison", "runs", "core-hours, if each run took the median", "hours of all rounds, two runs at once")
    found = list[tuple[int, float, float]]()
    for name in ended:
        with tarfile.open(RECORDS / name / "runs.tar.xz") as tar:
            files = [tar.extractfile(member).read().decode() for member in tar if member.name.endswith("events.jsonl")]
        runs = [[event["seconds"] for event in map(json.loads, file.splitlines()) if event["event"] == "round_done"] for file in files]
        took = [sum(seconds) / 3600 for seconds in runs]
        found.append((len(took), median(took) * len(took), sum(took)))
        lines.append(row(name, str(len(took)), *(f"{hours:.1f}" for hours in found[-1][1:])))
    runs, quiet, real = (sum(column) for column in zip(*found, strict=True))
    return [*lines, row("together", str(runs), f"{quiet:.1f}", f"{real:.1f}")]


def power(result: dict[str, Any]) -> list[str]:
    """How often the primary test would show equivalence if there were no difference, and how many seeds four times in five need."""
    test = primary(result)
    spread, n = test["standard_error"] * math.sqrt(test["n"]), test["n"]
    enough = next(seeds for seeds in range(2, 1000) if equivalence(0, test["bound"] / spread, seeds) >= 0.8)
    lines = head("test", "standard deviation of the difference", "seeds", "power", "seeds for a power of .8")
    return [*lines, row(test["name"], f"{spread:.4f}", str(n), f"{equivalence(0, test['bound'] / spread, n):.2f}", str(enough))]


def summary() -> dict[str, list[str]]:
    return {"primary": tests()}


def tables(*about: str) -> dict[str, list[str]]:
    """Those of some settings, with what was added to them. Places of what has ended are in the page."""
    return {name: lines for name, lines in _all().items() if re.split("[/ ]", name)[0] in about}


@cache
def _all() -> dict[str, list[str]]:
    ended = {name: result for name in [*SETTINGS, *ADDED] if (result := found(name))}
    made = {f"{name} arms": arms(result) for name, result in ended.items()} | {
        f"{name} tests": asked(result) for name, result in ended.items()
    }
    equivalences = {name: result for name, result in ended.items() if name in SETTINGS and primary(result)["kind"] == "equivalence"}
    made |= {f"{name} contrasts": contrasts(ended[name]) for name in ("notes", "topics", "places") if name in ended}
    made |= {"topics/heads contrasts": of_heads(ended["topics/heads"])} if "topics/heads" in ended else {}
    made["lost"] = losses({name: result for name, result in ended.items() if name in SETTINGS})
    return made | {f"{name} power": power(result) for name, result in equivalences.items()} | {"hours": hours(list(ended))}
