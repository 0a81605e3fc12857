"""The paper's observations on the deviation (section 6), as numbers of a run."""

import pandas as pd

from fedex_lora.report.analysis._modules import across_rounds, is_query, is_value

COLUMNS = ["observation", "holds", "number", "of"]
NOTHING = 1e-9  # |R| / |M| below which R is rounding errors


def observations(frame: pd.DataFrame, value: str = "relative", more_epochs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Which of the paper's observations hold in a run, and by how much.

    Args:
        frame: `analysis.modules` of a run.
        value: "relative" to the ideal update, or "scaled": divided by sqrt(out in).
        more_epochs: the same of a run that differs in its local epochs only, and has more of them.

    Returns:
        A row for each that this run can answer: `observation`, `holds` (does the number point that way, however little), `number` and what
        that is `of`. The first three are of the first round that has an update. None where averaging loses nothing but rounding errors.
    """
    from scipy.stats import spearmanr

    if frame.empty or frame["relative"].max() < NOTHING:
        return pd.DataFrame(columns=COLUMNS)
    first = _first(frame)
    rows: list[tuple[str, bool, float, str]] = []
    inside = first[first["layer"] >= 0]
    for projection, group in inside.groupby("projection"):
        if group["layer"].nunique() > 2:
            rho = float(spearmanr(group["layer"], group[value]).statistic)
            rows.append((f"falls with depth ({projection})", rho < 0, rho, "Spearman's correlation of layer and deviation"))
    queries, values = (inside[inside["projection"].map(kind).astype(bool)].groupby("layer")[value].mean() for kind in (is_query, is_value))
    if len(queries) and len(values):
        ratio = float(queries.mean() / values.mean())
        above = int((queries > values).sum())
        rows.append(
            ("query above value", ratio > 1, ratio, f"mean over layers, query / value; query is above in {above} of {len(queries)}")
        )
    if more_epochs is not None:
        ratio = float(_first(more_epochs)[value].mean() / first[value].mean())
        rows.append(("grows with local epochs", ratio > 1, ratio, "mean over modules, more / fewer local epochs"))
    over = across_rounds(frame, value).dropna()
    if len(over) > 2:
        last, first_round = over["round"].iloc[-1], over["round"].iloc[0]
        for which, name, what in (("mean", "", "mean over modules"), ("first", ", first layer", over.attrs["first"])):
            rho = float(spearmanr(over["round"], over[which]).statistic)
            ratio = float(over[which].iloc[-1] / over[which].iloc[0])
            of = f"{what}, round {last} / round {first_round}; Spearman's correlation {rho:.2f}"
            rows.append((f"falls with the rounds{name}", rho < 0 and ratio < 1, ratio, of))
    return pd.DataFrame(rows, columns=COLUMNS)


def _first(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first round."""
    return frame[frame["round"] == frame["round"].min()]
