"""Which client holds which rows. (flwr-datasets would do, but its current release refuses the current `datasets`.)"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedex_lora.config import Clients
from fedex_lora.errors import DataError, counted
from fedex_lora.tasks import Task
from fedex_lora.tasks._rows import lines_of

Indices = NDArray[np.int64]


def partition(task: Task, clients: Clients, seed: int) -> dict[str, tuple[Indices, Indices]]:
    """Client id -> (training rows, held-out rows), as indices into `task.train`; every row belongs to one client.

    Args:
        task: with `classes` for Dirichlet partitions (Hsu et al., arXiv 1909.06335: each class is dealt out by `Dirichlet(alpha)`).
        clients: the rule.
        seed: of the run.

    Raises:
        DataError: a missing column, or a client without rows.
    """
    rng = np.random.default_rng(seed)
    rows = len(task.train)
    if clients.column:
        column = _column(task, clients.column)
        labels = np.unique(column)
    else:
        column, labels = task.classes, np.unique(task.classes)
    parts: Mapping[str, NDArray[Any]]
    if clients.partition == "column":
        parts = {f"{value}": np.flatnonzero(column == value) for value in labels}
    elif clients.partition == "iid":
        parts = _named(np.array_split(rng.permutation(rows), clients.count))
    else:
        dealt: list[list[Indices]] = [[] for _ in range(clients.count)]
        for label in labels:
            members = rng.permutation(np.flatnonzero(column == label))
            shares = rng.dirichlet([clients.dirichlet_alpha] * clients.count)
            cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for client, portion in zip(dealt, np.split(members, cuts), strict=True):
                client.append(portion)
        parts = _named([np.concatenate(portions) for portions in dealt])
    return {client: _hold_out(client, np.asarray(part, dtype=np.int64), clients.holdout, rng) for client, part in parts.items()}


def _named(parts: Sequence[Indices]) -> dict[str, Indices]:
    width = len(str(len(parts) - 1))
    return {f"client-{index:0{width}d}": part for index, part in enumerate(parts)}


def _column(task: Task, name: str) -> NDArray[Any]:
    if name not in task.train.columns:
        raise DataError(f"clients.column = {name!r} is no column of the training rows: they have {', '.join(map(str, task.train.columns))}")
    empty = np.flatnonzero(task.train[name].isna() | (task.train[name].astype(str).str.strip() == ""))
    if len(empty):
        where = lines_of([task.lines[row] if task.lines else row + 1 for row in empty.tolist()])
        raise DataError(
            f"clients.column = {name!r} is empty in {counted(len(empty), 'training row')} {where}: fill it in or leave such rows out"
        )
    return np.asarray(task.train[name])


def held_out(client: str, rows: int, share: float, seed: int) -> tuple[Indices, Indices]:
    """(training rows, held-out rows) of a client whose rows are all `rows` of its own file.

    Raises:
        DataError: there are none.
    """
    return _hold_out(client, np.arange(rows, dtype=np.int64), share, np.random.default_rng([seed, *client.encode()]))


def _hold_out(client: str, part: Indices, share: float, rng: np.random.Generator) -> tuple[Indices, Indices]:
    part = rng.permutation(part)
    held = min(len(part) - 1, max(1, round(share * len(part)))) if share and len(part) > 1 else 0
    if len(part) - held < 1:
        raise DataError(f"{client} gets no examples: use fewer clients or more rows (a larger clients.dirichlet_alpha is more even)")
    return np.sort(part[held:]), np.sort(part[:held])
