"""Models measured after training: by a task's own metric, on predictions or on generated texts, and by lm-evaluation-harness."""

from fedex_lora.evaluation._evaluate import Options, evaluate_source, task_of
from fedex_lora.evaluation._generation import generate
from fedex_lora.evaluation._harness import evaluate_harness
from fedex_lora.evaluation._model import open_source

__all__ = ["Options", "evaluate_harness", "evaluate_source", "generate", "open_source", "task_of"]
