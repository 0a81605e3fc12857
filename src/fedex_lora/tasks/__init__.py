"""The tasks: one file a family, one row here."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fedex_lora import config
from fedex_lora.errors import DataError
from fedex_lora.tasks import arithmetic, commonsense, custom, demo, e2e, glue
from fedex_lora.tasks._completions import IGNORED, prompt_ids
from fedex_lora.tasks._images import ImageCollator
from fedex_lora.tasks._task import Generation, Task, limit, text_collator, usable
from fedex_lora.tasks.scoring.choices import CHOICES

__all__ = ["IGNORED", "TASKS", "Generation", "Task", "collator", "limit", "load_task", "prompt_ids", "usable"]

TASKS: dict[str, Callable[[config.TaskSettings], Task]] = {
    **{f"glue/{name}": partial(glue.load, name) for name in glue.GLUE},
    "e2e": e2e.load,
    **{f"arithmetic/{name}": partial(arithmetic.load, name) for name in arithmetic.TESTS},
    **{f"commonsense/{name}": partial(commonsense.load, name) for name in CHOICES},
    "custom": custom.load,
    "demo": demo.load,
}


def collator(kind: str, processor: Any) -> Any:
    """Rows of a task of this kind to a batch."""
    return ImageCollator(processor) if kind == config.IMAGES else text_collator(kind, processor)


def load_task(settings: config.TaskSettings, seed: int) -> Task:
    """The task called `settings.name`, with at most `train_rows` and `eval_rows` rows, drawn with `seed`.

    Raises:
        DataError: unknown name (the nearest is named), or the task's own complaint.
        UsageError: the extra `tasks` is not installed, and its metrics are needed.
    """
    if settings.name not in TASKS:
        near = config.nearest(settings.name, list(TASKS))
        raise DataError(f"unknown task {settings.name!r}: " + (f"did you mean {near!r}?" if near else f"known: {', '.join(TASKS)}"))
    return TASKS[settings.name](settings).limited(settings.train_rows, settings.eval_rows, seed)
