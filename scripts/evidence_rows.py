"""Rows of the settings in docs/evidence-protocol.md, with the columns by which clients differ.

    python scripts/evidence_rows.py DATA OUT

DATA holds `math/` and `e2e/` in their published layouts; OUT gets

- `topics/train.jsonl`, `topics/eval.jsonl`: the problems of MATH, 7,500 and 5,000, and the subject of each, one of seven;
- `places/train.csv`, `places/eval.csv`: of the E2E training set the texts with an eatType (coffee shop, pub, restaurant), as many of each;
  no meaning is in both files.

Nothing is drawn at random: the same DATA gives the same OUT.
"""

import sys
from pathlib import Path

import pandas as pd

TRAIN, EVAL = 1600, 120
"""Texts of a kind of place."""


def topics(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for source, column, name in (("train", "subject", "train"), ("test", "type", "eval")):
        rows = pd.read_json(data / f"{source}.jsonl", lines=True, dtype=False)
        rows = rows.rename(columns={column: "subject"})[["problem", "subject"]]
        rows.to_json(out / f"{name}.jsonl", orient="records", lines=True, force_ascii=False)


def places(data: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(data / "trainset.csv", dtype=str, keep_default_na=False).drop_duplicates("ref")
    rows["place"] = rows["mr"].str.extract(r"eatType\[(.*?)\]", expand=False)
    rows = rows.dropna(subset=["place"])
    apart = pd.factorize(rows["mr"])[0] % 8 == 0  # an eighth of the meanings, in the order of the file
    for part, count, name in ((rows[~apart], TRAIN, "train"), (rows[apart], EVAL, "eval")):
        part.groupby("place").head(count).to_csv(out / f"{name}.csv", index=False)


def main(data: Path, out: Path) -> None:
    topics(data / "math", out / "topics")
    places(data / "e2e", out / "places")
    for setting in ("places", "topics"):
        for path in sorted((out / setting).iterdir()):
            print(f"{path}: {len(pd.read_json(path, lines=True) if path.suffix == '.jsonl' else pd.read_csv(path)):,} rows")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python scripts/evidence_rows.py DATA OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
