"""Metrics of classes and scores, by scikit-learn and scipy (the extra `tasks`)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from transformers import EvalPrediction

from fedex_lora.errors import require_extra


def measuring(*names: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """The function that gives the named metrics of predictions.

    Raises:
        UsageError: the extra is not installed.
    """
    require_extra("sklearn", "tasks", "metrics of classes and scores")
    return partial(class_metrics, names=names)


def class_metrics(prediction: EvalPrediction, names: tuple[str, ...]) -> dict[str, float]:
    """The named metrics of logits (`rows x classes`) against classes, or of scores (`rows`, or `rows x 1`) against scores.

    A correlation of constant scores, which have none, is zero. Of outputs that are no numbers all are NaN.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error

    labels, outputs = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    if "pearson" in names:
        labels, values = (numbers.astype(np.float64).reshape(len(labels)) for numbers in (labels, outputs))
    else:
        values = outputs.argmax(axis=-1)
    if np.isnan(outputs).any() or not np.isfinite(values).all():  # `argmax` calls NaN the first class
        return dict.fromkeys(names, math.nan)

    def correlation(measure: Any) -> float:
        constant = len(labels) < 2 or np.ptp(values) == 0 or np.ptp(labels) == 0
        return 0.0 if constant else float(measure(values, labels)[0])

    formulas = {
        "accuracy": lambda: accuracy_score(labels, values),
        "f1": lambda: f1_score(labels, values, zero_division=0.0),
        "macro_f1": lambda: f1_score(labels, values, average="macro", zero_division=0.0),
        "mcc": lambda: matthews_corrcoef(labels, values),
        "mse": lambda: mean_squared_error(labels, values),
        "pearson": lambda: correlation(pearsonr),
        "spearman": lambda: correlation(spearmanr),
    }
    return {name: float(formulas[name]()) for name in names}
