"""Table 4 with SmolLM2-135M-Instruct, and what tells its methods apart, from results/runs."""

from pathlib import Path

from fedex_lora.experiments.compare._tests import interval
from fedex_lora.experiments.reproduce import cells, find_record, read_recipe, score
from fedex_lora.experiments.reproduce._scores import mean_and_deviation
from fedex_lora.experiments.tables import plus_minus

RESULTS = Path(__file__).parents[2] / "results"
PAIRS = (("FedEx-LoRA", "FedIT"), ("FedEx-LoRA", "FFA-LoRA"), ("FedIT", "Centralized LoRA"))
Scores = dict[str, dict[int, float]]  # column -> seed -> score


def measured() -> dict[str, Scores]:
    """Row -> its scores."""
    recipe = read_recipe("table4")
    columns = {column.label: column for column in recipe.columns}
    found: dict[str, Scores] = {}
    for cell in cells(recipe, "smollm2"):
        if record := find_record(RESULTS, cell):
            column, row = columns[cell.column], found.setdefault(cell.row, {})
            for label, factor, value in (
                (column.label, column.factor, score(record, column.metric, cell.test)),
                ("dev loss", 1.0, score(record, "loss")),
            ):
                assert value is not None, f"{cell.name} has no {label}"
                row.setdefault(label, {})[cell.seed] = factor * value
    return found


def tables() -> dict[str, list[str]]:
    rows, recipe = measured(), read_recipe("table4")
    digits = {column.label: column.digits for column in recipe.columns} | {"dev loss": 3}
    seeds = len(recipe.scaled("smollm2").seeds)
    heads = [*(column.metric.replace("_", "-") for column in recipe.columns), "dev loss"]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(digits) + 1) + "|"]
    for name, row in rows.items():
        texts = [mean_and_deviation(list(row[label].values()), seeds, places) for label, places in digits.items()]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    for one, other in PAIRS:
        texts = []
        for label, places in digits.items():
            ours, theirs = rows[one][label], rows[other][label]
            texts.append(plus_minus(*interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs]), places, "+"))
        lines.append(f"| {one} minus {other} | {' | '.join(texts)} |")
    return {"smollm2": lines}
