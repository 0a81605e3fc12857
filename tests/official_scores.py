"""Our scores of four systems of the E2E challenge beside the official ones.

`python -m tests.official_scores DATA`: all five of each, four decimals; status 1 where one differs. METEOR takes most of a minute a system.
"""

import csv
import sys
from pathlib import Path

from fedex_lora.tasks.scoring.e2e import METRICS, read_predictions, read_references, score_e2e

SYSTEMS = ("tgen", "slug", "chen", "dangnt")


def official(data: Path) -> dict[str, dict[str, str]]:
    """System -> metric -> its official score, as written."""
    with (data / "e2e" / "system_outputs" / "scores.tsv").open() as file:
        return {row.pop("system"): row for row in csv.DictReader(file, delimiter="\t")}


def score(data: Path, system: str, metrics=METRICS) -> dict[str, str]:
    """Our scores, as the official ones are written."""
    references = read_references(data / "e2e" / "testset_w_refs.csv")
    texts = read_predictions(data / "e2e" / "system_outputs" / f"{system}.tsv", references)
    return {name: f"{value:.4f}" for name, value in score_e2e(texts, list(references.values()), metrics).items()}


def main(data: Path) -> int:
    differ = 0
    print("system", *METRICS, sep="\t")
    for system, want in official(data).items():
        got = score(data, system)
        marks = [f"{got[name]}{'' if got[name] == want[name] else f' (official: {want[name]})'}" for name in METRICS]
        print(system, *marks, sep="\t", flush=True)
        differ += got != want
    print("all as the official scripts say" if not differ else f"{differ} systems differ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
