"""The headline numbers of a report."""

import math

import numpy as np
import pandas as pd

from fedex_lora.report._groups import Group, final, final_metrics, group_sent, judged_column, worst_error
from fedex_lora.report._tables import duration, percent, scientific, size
from fedex_lora.storage.events import RunDone, of_kind


def tiles(group: Group) -> list[tuple[str, str, str]]:
    """The headline numbers: what, how much, and of what."""
    run, frame, headline = group.first, pd.concat(group.rounds, ignore_index=True), group.first.started.headline
    shown, found = judged_column(group), []
    if shown in frame:
        end = float(np.mean(final_metrics(group)))
        where = "evaluation rows" if shown == headline else "the clients' own rows"
        before = frame[frame["round"] == 0][shown].mean()
        base = f", {before:.4f} before training" if np.isfinite(before) else ""
        found.append(
            (headline, f"{end:.4f}" if math.isfinite(end) else "not finite", f"{where}, round {group.last_round}{base}{group.over('mean')}")
        )
    if not math.isnan(error := worst_error(frame, "exactness_error")):
        note = f"worst round and module, from the factors{group.over('worst')}"
        found.append(("exactness error", scientific(error), note))
    if ends := final(group, "deviation"):
        last = f"{percent(float(np.mean(ends)))} in the last that was measured{group.over('mean')}"
        note = f"of the whole model's update it would lose: most in one round{group.over('worst')}; {last}"
        found.append(("plain averaging", percent(frame["deviation"].max()), note))
    found += _best(group)
    down, up = group_sent(group)
    note = f"{size(down)} down, {size(up)} up, all clients and rounds{group.over('mean')}; with the final model, which all are sent"
    found.append(("travelled", size(down + up), note))
    asked, refused = (int(frame[column].sum()) if column in frame else 0 for column in ("participants", "refused"))
    note = f"of {asked} in {group.last_round} rounds, {len(run.started.clients)} clients{group.over('sum')}"
    found.append(("answers refused", str(refused), note))
    if "seconds" in frame and frame["seconds"].notna().any():
        note = f"{duration(frame['seconds'].mean())} a round{group.over('mean')}"
        found.append(("time", duration(frame["seconds"].sum() / len(group.runs)), note))
    return found


def _best(group: Group) -> list[tuple[str, str, str]]:
    """The best round of a run that is done, by what, and where to have it; nothing of several seeds, which have one each."""
    done = of_kind(group.first.events, RunDone)
    if len(group.runs) > 1 or not group.first.finished or (best := done[-1].best_round) is None:
        return []
    there, name = done[-1].held_out.get(str(best), {}), group.first.started.headline
    of = f" ({name} {there[name]:.4f} on {there['rows']:.0f} rows)" if {name, "rows"} <= there.keys() else ""
    return [("best round", str(best), f"by the clients' held-out rows{of}; export and evaluate take it by --round best")]
