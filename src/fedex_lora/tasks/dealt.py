"""A run's task, and which client holds which of its rows: one file that is dealt out, or a file for each client."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import numpy as np
import pandas as pd

from fedex_lora.config import Config, TaskSettings
from fedex_lora.tasks import Task, load_task
from fedex_lora.tasks._rows import each
from fedex_lora.tasks.partition import Indices, held_out, partition

Load: TypeAlias = Callable[[TaskSettings, int], Task]
"""(settings, the run's seed) -> the task."""


def dealt(config: Config, load: Load = load_task) -> tuple[Task, dict[str, tuple[Indices, Indices]]]:
    """The task, and client -> (training rows, held-out rows), as indices into its `train`.

    A private client trains on all that it holds: which rows are held out depends on how many there are.

    Of a file for each client (`clients.data`) the held-out rows are those that a node with that file holds out.

    Raises:
        DataError: see `load_task` and `partition`; of several files, what is wrong with each.
    """
    clients = config.clients.model_copy(update={"holdout": 0.0}) if config.privacy.is_on else config.clients
    if not clients.data:
        task = load(config.task, config.seed)
        return task, partition(task, clients, config.seed)
    tasks, parts, first = _tasks(config, load), dict[str, tuple[Indices, Indices]](), 0
    for client, own in tasks.items():
        mine, held = held_out(client, len(own.train), clients.holdout, config.seed)
        parts[client], first = (first + mine, first + held), first + len(own.train)
    return _together(tasks), parts


def _tasks(config: Config, load: Load) -> dict[str, Task]:
    """Each client's own, checked as on a machine of its own."""
    own = dict(sorted(config.clients.data.items()))
    settings = (config.task.model_copy(update={"train": file}) for file in own.values())
    return dict(zip(own, each(partial(load, one, config.seed) for one in settings), strict=True))


def _together(tasks: Mapping[str, Task]) -> Task:
    train = pd.concat([task.train for task in tasks.values()], ignore_index=True).astype(object)
    return replace(
        next(iter(tasks.values())),
        train=train.where(train.notna(), None),  # columns that only some files have
        classes=np.concatenate([task.classes for task in tasks.values()]),
        notes=list(dict.fromkeys(note for task in tasks.values() for note in task.notes)),
        lines=tuple(line for task in tasks.values() for line in task.lines),
    )
