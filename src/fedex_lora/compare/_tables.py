"""A comparison as tables: for the terminal, and in Markdown."""

from collections.abc import Mapping
from typing import Any

EDGE, OWN = "*", "†"


def markdown(result: Mapping[str, Any]) -> str:
    """The table for documents: one line a variant, then the curves."""
    headline = result["headline"]
    columns, rows = table_rows(result)
    lines = [f"{title(result)}.", ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        footnotes(result),
        "",
        f"Mean {headline} after each round:",
        "",
        f"| round | {' | '.join(map(str, range(result['rounds'] + 1)))} |",
    ]
    lines += ["|" + "---|" * (result["rounds"] + 2)]
    for row in result["methods"]:
        means = [sum(values) / len(values) for values in zip(*row["seeds"].values(), strict=True)]
        lines.append(f"| {row['name']} | {' | '.join(f'{value:.3f}' for value in means)} |")
    return "\n".join(lines) + "\n"


def title(result: Mapping[str, Any]) -> str:
    """What was compared."""
    rounds, seeds = result["rounds"], len(result["seeds"])
    after = f"{rounds} round{'s' * (rounds > 1)}, {seeds} seed{'s' * (seeds > 1)}"
    return f"{result['headline']} on {result['task']} after {after}"


def table_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and cells, for the terminal and for Markdown."""
    reference, target = result["reference"], result["target"]
    columns = ["method", "lr", result["headline"], f"minus {reference}", f"rounds to {target:.3f}"]
    columns += ["mean over rounds", "exactness", "down, all", "up, all"]
    rows = []
    for row in result["methods"]:
        mark = EDGE if row["learning_rate_at_edge"] else ""
        reached = " ".join("-" if number is None else str(number) for number in row["rounds_to_target"])
        error = row["exactness_error"]
        own = OWN if row["exactness"] == "personalised" else ""
        rows.append(
            [
                f"{row['name']}{own}",
                f"{row['learning_rate']:g}{mark}",
                _plus_minus(row["mean"], row["half_width"]),
                ""
                if row["name"] == reference or row["difference"] is None
                else _plus_minus(row["difference"], row["difference_half_width"], "+"),
                reached,
                f"{row['over_rounds']:.3f}",
                "" if error is None else f"{error:.1e}",
                f"{row['bytes_down'] / 1e6:.2f} MB",
                f"{row['bytes_up'] / 1e6:.2f} MB",
            ]
        )
    return columns, rows


def _plus_minus(value: float, width: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" + ("" if width is None else f" ± {width:.3f}")


def footnotes(result: Mapping[str, Any]) -> str:
    """What the marks in the table mean, as far as they occur."""
    bytes_are = "Bytes are of all clients together, the final model to all of them included, divided by the rounds"
    notes = [f"{bytes_are}; differences are paired by seed."]
    if len(result["seeds"]) > 1:
        notes.append("± is a 95 % confidence interval of the mean over seeds.")
    if any(row["learning_rate_at_edge"] for row in result["methods"]):
        notes.append(f"{EDGE} the best learning rate is at the edge of the grid: a wider one may do better.")
    if any(row["exactness"] == "personalised" for row in result["methods"]):
        notes.append(f"{OWN} no global model: measured on the clients' own held-out rows, so not comparable with the others.")
    return " ".join(notes)
