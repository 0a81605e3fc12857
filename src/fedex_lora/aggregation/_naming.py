"""METHOD+GAUGE: from a name to a row."""

import difflib
from collections.abc import Iterable
from dataclasses import replace

from fedex_lora.aggregation.gauges import ALIGNED, GAUGES
from fedex_lora.aggregation.methods import METHODS, Method
from fedex_lora.errors import UsageError

REMOVED = {"gl-aligned": "use procrustes or balanced"}  # gauge -> what to use in its place


def get_method(name: str) -> Method:
    """The method called `name`, a key of `METHODS` or METHOD+GAUGE with a key of `GAUGES`.

    Raises:
        UsageError: unknown (the nearest is named), or a gauge where there are no common factors to re-write.

    Example:
        >>> get_method("fedit+balanced").gauge
        'balanced'
    """
    method, plus, gauge = name.partition("+")
    _require_known("method", method, METHODS)
    row = METHODS[method]
    if not plus:
        return row
    if gauge in REMOVED:
        raise UsageError(f"method {name!r}: the gauge {gauge} was removed: {REMOVED[gauge]}")
    _require_known("gauge", gauge, GAUGES)
    if not row.lora or row.own == "B" or (row.draws and not row.own):
        reason = (
            "its clients share one A"
            if row.own
            else "its adapter is drawn anew, with a product of zero"
            if row.draws
            else "there are no factors"
        )
        raise UsageError(f"method {method} has no gauge to choose, because {reason}: write {method} alone")
    if row.own and gauge in ALIGNED:
        raise UsageError(
            f"{gauge} aligns factors with averaged ones, and clients of {method} see their own only: use balanced or orthonormal-a"
        )
    return replace(row, name=name, gauge=gauge)


def _require_known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        raise UsageError(f"unknown {what} {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"))
