"""Methods, gauges and measured errors, from the code and from benchmarks/results/exactness.json."""

import json
from pathlib import Path

from fedex_lora.aggregation import GAUGES, METHODS, Method

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "exactness.json"
BASE = {"base": "gains the rest", "truncate": "gains the best part of the rest", "drop": "stays"}
R, SIZE, K = 4, 768, 3


def trained(row: Method) -> str:
    if not row.lora:
        return "the whole model"
    return ", then ".join({"AB": "A and B", "A": "A", "B": "B", "C": "a core C"}[part] for part in row.trained_schedule)


def travels(row: Method) -> str:
    """Ranks of a square module that travel in a later round, in units of r N."""
    if not row.lora:
        return "all weights"
    ranks = [R] * (1 if row.centralised else K)
    numbers = [
        row.message_size(ranks, 0, (SIZE, SIZE), round, truncated=R if row.residual_policy == "truncate" else None) for round in (3, 4)
    ]
    unit = R * 2 * SIZE
    return " / ".join(f"{sum(getattr(one, way) for one in numbers) / 2 / unit:.3g}" for way in ("down", "up"))


def methods() -> list[str]:
    lines = [
        "| method | trained | the base | down / up | the model after a round | ranks | clients | from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in METHODS.values():
        keeps = {"": "stateless", "AB": "keep A and B", "B": "keep B"}[row.client_state]
        ranks = "per client" if row.per_client_ranks else "one"
        base = BASE[row.residual_policy] if row.lora else "is what is averaged"
        cells = [f"`{row.name}`", trained(row), base, travels(row), row.exactness, ranks if row.lora else "", keeps, row.paper]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def gauges() -> list[str]:
    lines = ["| gauge | factors |", "|---|---|"]
    return lines + [f"| `{name}` | {(gauge.__doc__ or '').splitlines()[0].replace('|', chr(92) + '|')} |" for name, gauge in GAUGES.items()]


def measured() -> list[str]:
    lines = ["| method | after 1 round | after 3 rounds | from the outputs | must miss by | gap |", "|---|---|---|---|---|---|"]
    for name, numbers in json.loads(MEASURED.read_text(encoding="utf-8")).items():
        rounds = [f"{numbers['by_rounds'][number]:.1e}" for number in ("1", "3")]
        rest = [""] * 3 if numbers["exactness"] == "personalised" else [f"{numbers[key]:.1e}" for key in ("outputs", "theory", "gap")]
        lines.append(f"| `{name}` | {' | '.join([*rounds, *rest])} |")
    return lines


def tables() -> dict[str, list[str]]:
    return {"methods": methods(), "gauges": gauges(), "errors": measured()}
