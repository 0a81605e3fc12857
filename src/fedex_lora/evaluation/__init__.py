"""Models measured after training: by a task's own metric, on predictions or on generated texts, and by lm-evaluation-harness."""

from fedex_lora.evaluation._classes import ClassScore, ClassScores
from fedex_lora.evaluation._evaluate import Measured, Options, measure, task_of
from fedex_lora.evaluation._generation import generate
from fedex_lora.evaluation._harness import evaluate_harness

__all__ = ["ClassScore", "ClassScores", "Measured", "Options", "evaluate_harness", "generate", "measure", "task_of"]
