"""What a trained model's predictions come to."""

from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import EvalPrediction

from fedex_lora.tasks import IGNORED


def first_output(prediction: EvalPrediction) -> EvalPrediction:
    """Some models return more than logits; they come first."""
    predictions = prediction.predictions
    return EvalPrediction(predictions=predictions[0] if isinstance(predictions, tuple) else predictions, label_ids=prediction.label_ids)


def argmax_and_loss(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids instead of logits, a vocabulary's worth less memory; and of each row the sum of its tokens' losses, and their number."""
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    ahead = labels[:, 1:].to(first.device)
    losses = nn.functional.cross_entropy(first[:, :-1].float().transpose(1, 2), ahead, ignore_index=IGNORED, reduction="none")
    return first.argmax(dim=-1), losses.sum(dim=1, keepdim=True), (ahead != IGNORED).sum(dim=1, keepdim=True)


def token_loss(prediction: EvalPrediction, kind: str) -> dict[str, float]:
    """The mean over all tokens: the mean of batches' means, which Trainer takes, depends on the batches."""
    if kind != "causal-lm":
        return {}
    _, losses, tokens = prediction.predictions  # type: ignore[misc]
    return {"loss": float(np.sum(losses, dtype=np.float64) / np.sum(tokens))}
