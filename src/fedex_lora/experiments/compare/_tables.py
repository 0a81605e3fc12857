"""A comparison as tables: for the terminal, and in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedex_lora.errors import counted
from fedex_lora.experiments.compare._tests import interval
from fedex_lora.experiments.tables import TextTable, plus_minus

EDGE, OWN = "*", "†"
COSTS = "mean over rounds"
TableBody = tuple[list[str], list[list[str]]]
"""Column names and cells."""


def result_tables(result: Mapping[str, Any]) -> list[TextTable]:
    """One line a variant, the tests, and the variants at some rounds."""
    found = [TextTable(f"{title(result)}.", *_variants(result), [footnotes(result)])]
    if result["tests"]:
        found.append(TextTable("Tests:", *_tests(result), [_test_notes(result)]))
    return found + [TextTable(f"After round {record['round']}:", *_at(result, record)) for record in result["at"]]


def markdown(result: Mapping[str, Any]) -> str:
    """The tables for documents, and the curves."""
    means = [
        [row["name"], *(f"{interval(list(values))[0]:.3f}" for values in zip(*row["seeds"].values(), strict=True))]
        for row in result["methods"]
    ]
    columns = ["round", *map(str, range(result["rounds"] + 1))]
    made = [*result_tables(result), TextTable(f"Mean {result['headline']} after each round:", columns, means)]
    return "\n".join(table.markdown() for table in made) + f"\nprotocol sha256 {result['protocol_sha256']}\n"


def title(result: Mapping[str, Any]) -> str:
    """What was compared."""
    after = f"{counted(result['rounds'], 'round')}, {counted(len(result['seeds']), 'seed')}"
    return f"{result['headline']} on {result['task']} after {after}"


def _variants(result: Mapping[str, Any]) -> TableBody:
    """One row a variant; the columns from `COSTS` on are what it costs."""
    reference, target, several = result["reference"], result["target"], len(result["seeds"]) > 1
    keys = list(result["grid"])
    columns = ["method", *_short(keys), result["headline"], f"minus {reference}", *["p"] * several, f"rounds to {target:.3f}"]
    columns += [COSTS, "exactness", "down, all", "up, all"]
    rows = []
    for row in result["methods"]:
        reached = " ".join("-" if number is None else str(number) for number in row["rounds_to_target"])
        error = row["exactness_error"]
        rows.append(
            [
                f"{row['name']}{OWN if row['exactness'] == 'personalised' else ''}",
                *(f"{_value(row['settings'][key])}{EDGE if key in row['at_edge'] else ''}" for key in keys),
                plus_minus(row["mean"], row["half_width"]),
                plus_minus(row["difference"], row["difference_half_width"], sign="+"),
                *[_p(row["p"])] * several,
                reached,
                f"{row['over_rounds']:.3f}",
                "" if error is None else f"{error:.1e}",
                f"{row['bytes_down'] / 1e6:.2f} MB",
                f"{row['bytes_up'] / 1e6:.2f} MB",
            ]
        )
    return columns, rows


def _tests(result: Mapping[str, Any]) -> TableBody:
    """One row a test."""
    rows = []
    for test in result["tests"]:
        one, other = test["variants"]
        first, second = test["rounds"]
        shown = f"{one} minus {other}" if first == second == result["rounds"] else f"{one} after {first} minus {other} after {second}"
        shown += f", mean of {test['mean_of']} rounds" if test["mean_of"] > 1 else ""
        kind = f"within {test['bound']:g}" if test["kind"] == "equivalence" else test["alternative"]
        t = "" if test["kind"] == "equivalence" else f"{test['t']:.2f}"
        holm = _p(test["p_holm"]) if test["primary"] else ""
        mean = plus_minus(test["mean"], test["half_width"], sign="+")
        rows.append([test["name"], shown, kind, str(test["n"]), mean, t, _p(test["p"]), holm])
    return ["test", "difference", "kind", "n", "mean", "t", "p", "p, Holm"], rows


def _test_notes(result: Mapping[str, Any]) -> str:
    """How the tests are computed."""
    primary, kinds = sum(test["primary"] for test in result["tests"]), {test["kind"] for test in result["tests"]}
    notes = [
        "p is of Student's paired test over the seeds" + (", of equivalence the larger of two one-sided ones." if len(kinds) > 1 else ".")
    ]
    if kinds == {"equivalence"}:
        notes = ["p is the larger of two one-sided paired t-tests over the seeds."]
    if primary:
        notes.append(f"Holm's correction is for the {counted(primary, 'primary test')} together; the others have none.")
    if not all(test["computable"] for test in result["tests"]):
        notes.append(
            'A test with p "none" cannot be computed (numbers that are not finite, or differences that are all the same): it failed.'
        )
    return " ".join(notes)


def _at(result: Mapping[str, Any], record: Mapping[str, Any]) -> TableBody:
    """All variants after one round."""
    columns = ["method", result["headline"], f"minus {result['reference']}", "p"]
    rows = []
    for name, row in record["methods"].items():
        difference = plus_minus(row["difference"], row["difference_half_width"], sign="+")
        rows.append([name, plus_minus(row["mean"], row["half_width"]), difference, _p(row["p"])])
    return columns, rows


def _short(keys: Sequence[str]) -> list[str]:
    """The last words of keys, where they tell them apart."""
    last = ["lr" if key == "training.learning_rate" else key.rpartition(".")[2] for key in keys]
    return [word if last.count(word) == 1 else key for word, key in zip(last, keys, strict=True)]


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return "none" if value != value else f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"


def footnotes(result: Mapping[str, Any]) -> str:
    """What the marks in the table mean, as far as they occur."""
    bytes_are = "Bytes are of all clients together, the final model to all of them included, divided by the rounds"
    notes = [f"{bytes_are}; differences are paired by seed."]
    if len(result["seeds"]) > 1:
        notes.append("± is a 95 % confidence interval of the mean over seeds, p of Student's paired test, not corrected.")
    seeds = ", ".join(map(str, result["tuning_seeds"]))
    where = f"seed{'s' * (len(result['tuning_seeds']) > 1)} {seeds}" + ("" if result["tuning_apart"] else ", one of those shown here")
    notes.append(f"Settings were chosen on {where}.")
    if any(row["at_edge"] for row in result["methods"]):
        notes.append(f"{EDGE} the best value is at the edge of the grid: a wider one may do better.")
    notes += [f"{one['method']} failed with seed {one['seed']}, and has no numbers there: {one['reason']}." for one in result["failed"]]
    if any(row["exactness"] == "personalised" for row in result["methods"]):
        notes.append(f"{OWN} no global model: measured on the clients' own held-out rows, so not comparable with the others.")
    return " ".join(notes)
