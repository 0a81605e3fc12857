"""Models measured after training: by a task's own metric, on predictions or on generated texts, and by lm-evaluation-harness."""

from fedex_lora.evaluation._classes import ClassScore, ClassScores
from fedex_lora.evaluation._evaluate import Measured, Options, evaluate_source, measure, task_of
from fedex_lora.evaluation._generation import generate
from fedex_lora.evaluation._harness import evaluate_harness
from fedex_lora.evaluation._model import open_source

__all__ = [
    "ClassScore",
    "ClassScores",
    "Measured",
    "Options",
    "evaluate_harness",
    "evaluate_source",
    "generate",
    "measure",
    "open_source",
    "task_of",
]
