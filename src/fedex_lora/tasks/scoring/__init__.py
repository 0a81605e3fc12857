"""Official metrics of generated texts, from texts alone: no model, no task."""

from fedex_lora.tasks.scoring.choices import CHOICES, extract_choice
from fedex_lora.tasks.scoring.e2e import METRICS, read_predictions, read_references, require_e2e, score_e2e
from fedex_lora.tasks.scoring.mathematics import equivalent, extract_answer, extract_number, normal_form

__all__ = [
    "CHOICES",
    "METRICS",
    "equivalent",
    "extract_answer",
    "extract_choice",
    "extract_number",
    "normal_form",
    "read_predictions",
    "read_references",
    "require_e2e",
    "score_e2e",
]
