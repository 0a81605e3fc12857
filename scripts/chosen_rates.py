"""Choose the learning rates of the scale `small` from the records of its grid (`rates`), and write them into recipes/_glue_tuned.toml.

python scripts/chosen_rates.py [--results FOLDER] [--check]

For each method the rate with the best accuracy on the clients' own held-out rows of SST-2, averaged over the later half of the rounds,
with one seed; the lower loss decides ties. Methods that were not in the grid take the rate of the one that is most like them. A
method whose grid is not complete has no entry, and runs at the recipe's 3e-3.
"""

import argparse
import sys
from pathlib import Path

from fedex_lora.experiments.reproduce import cells, find_record, read_recipe, score

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "_glue_tuned.toml"
LIKE = {"ffa@2r": "ffa", "reinit": "fedex", "keep": "fedex", "fedex-best": "fedit+balanced"}
HEAD = """# Written by scripts/chosen_rates.py: the learning rates of the scale `small`, from the records of `rates`.
extends = "_glue"

[scale.small.learning_rates]
"""


def chosen(results: Path) -> dict[str, float]:
    """Method -> learning rate, of methods for which the whole grid is there."""
    grid: dict[str, list[tuple[float, float, float]]] = {}
    waiting = set()
    for cell in cells(read_recipe("rates"), "small"):
        record = find_record(results, cell)
        if record is None:
            waiting.add(cell.config.method)
        elif not record.failed:
            accuracy, loss = (score(record, f"held_out.{name}") or 0.0 for name in ("accuracy", "loss"))
            grid.setdefault(cell.config.method, []).append((accuracy, -loss, cell.config.training["learning_rate"]))
    rates = {method: max(found)[2] for method, found in grid.items() if method not in waiting}
    return rates | {method: rates[like] for method, like in LIKE.items() if like in rates}


def recipe(results: Path) -> str:
    """The file that holds them."""
    return HEAD + "".join(f'"{method}" = {rate:g}\n' for method, rate in chosen(results).items())


def main() -> None:
    """Write them, or check that they are what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    wanted = recipe(options.results)
    if not options.check:
        RECIPE.write_text(wanted, encoding="utf-8")
    elif RECIPE.read_text(encoding="utf-8") != wanted:
        sys.exit("recipes/_glue_tuned.toml does not fit the records of the grid: run python scripts/chosen_rates.py")


if __name__ == "__main__":
    main()
