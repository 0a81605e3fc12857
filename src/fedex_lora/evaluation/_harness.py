"""`evaluate --lm-eval`: any task of EleutherAI's lm-evaluation-harness, on any run, round or export."""

import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from fedex_lora.config import nearest
from fedex_lora.errors import DataError, UsageError, require_extra
from fedex_lora.evaluation._model import open_source


def evaluate_harness(
    source: str, tasks: Sequence[str], base: str | None = None, batch_size: int = 16, rows: int | None = None, include: Path | None = None
) -> dict[str, dict[str, float]]:
    """The harness's numbers of a causal LM.

    Args:
        source: see `open_source`.
        tasks: names of the harness's tasks, or of those in `include`.
        base: the model below an adapter or a result.
        batch_size: requests at once.
        rows: only so many of each task.
        include: a folder with task files of your own.

    Returns:
        Task -> metric (`acc,none`) -> value.

    Raises:
        UsageError: the harness is not installed, has no such task, or this is a launch of several processes.
        DataError: a task's data cannot be had.
        ModelError, StorageError: see `open_source`.
    """
    require_extra("lm_eval", "lm-eval", "tasks of lm-evaluation-harness")
    if PartialState().num_processes > 1:
        raise UsageError("--lm-eval runs in one process: export --as merged, and give the folder to `accelerate launch -m lm_eval`")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel("ERROR")
    manager = TaskManager(include_path=str(include), include_defaults=False) if include else None
    if manager is None or not set(tasks) <= set(manager.all_tasks):  # reading the harness's own thousands of files takes a while
        manager = TaskManager(include_path=str(include) if include else None)
    for task in tasks:
        if task not in manager.all_tasks:
            near = nearest(task, list(manager.all_tasks))
            raise UsageError(f"lm-evaluation-harness has no task {task!r}: " + (f"did you mean {near!r}?" if near else "see `lm_eval ls`"))
    try:
        manager.load(list(tasks))
    except Exception as error:  # datasets, hub and network each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"the data of {', '.join(tasks)} cannot be had: go online, or check the task's file ({reason})") from None
    opened = open_source(source, "causal-lm", base)
    opened.model.to(PartialState().device)
    model = HFLM(pretrained=opened.model, tokenizer=opened.processor, batch_size=batch_size)
    result = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, limit=rows, log_samples=False, bootstrap_iters=0)
    return {
        task: {metric: float(value) for metric, value in numbers.items() if isinstance(value, int | float)}
        for task, numbers in result["results"].items()
    }
