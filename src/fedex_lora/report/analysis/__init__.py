"""What happened in a run, as data frames: from its events, and from its round folders where the events are not enough. No retraining.

Example:
    >>> from fedex_lora.report.analysis import rounds
    >>> from fedex_lora.storage.events import RoundDone
    >>> events = [RoundDone(round=1, metrics={"accuracy": 0.5}, bytes_down=4, bytes_up=3)]
    >>> rounds(events)[["round", "accuracy", "bytes_total"]].to_dict("records")
    [{'round': 1, 'accuracy': 0.5, 'bytes_total': 7}]
"""

from fedex_lora.report.analysis._frames import clients, communication, messages, participation, refusals, rounds, sent
from fedex_lora.report.analysis._modules import across_rounds, module_frame, modules, parse_module_paths, spectrum
from fedex_lora.report.analysis._observations import observations
from fedex_lora.report.analysis._runs import Run, find_runs, labels, read_run

__all__ = [
    "Run",
    "across_rounds",
    "clients",
    "communication",
    "find_runs",
    "labels",
    "messages",
    "module_frame",
    "modules",
    "observations",
    "parse_module_paths",
    "participation",
    "read_run",
    "refusals",
    "rounds",
    "sent",
    "spectrum",
]
