"""`fedex-lora demo`: the embedded default, four methods side by side."""

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from fedex_lora.analysis import sent
from fedex_lora.config import DEMO, Config, parse_config
from fedex_lora.display import Display, size, table
from fedex_lora.errors import UsageError
from fedex_lora.report import write_report
from fedex_lora.runner import run
from fedex_lora.storage import read_events, write_text

METHODS = ("fedex", "fedit", "ffa", "centralised")
ROUNDS = 5
RESULT = "demo.json"


def configuration(method: str, rounds: int = ROUNDS) -> Config:
    """The demo's run of one method: every hospital is a client."""
    return parse_config(
        {
            "method": method,
            "rounds": rounds,
            "torch_threads": 1,  # the model is too small to share out
            "base": {"model": DEMO},
            "lora": {"r": 4, "alpha": 8, "target_modules": "all-linear"},
            "task": {"name": "demo"},
            "clients": {"partition": "column", "column": "hospital"},
            "training": {
                "learning_rate": 5e-3,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 32,
                "per_device_eval_batch_size": 200,
            },
        }
    )


def run_demo(out: Path, rounds: int | None, console: Console) -> dict[str, Any]:
    """Run all four methods into `out`, print the table, and return it.

    Raises:
        UsageError: `out` holds something that is not an earlier demo.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RESULT).exists())):
        raise UsageError(f"{out} exists and is no earlier demo: give another --out")
    shutil.rmtree(out, ignore_errors=True)
    write_text(out / RESULT, "{}\n")
    console.print("three hospitals write triage notes, each about its own symptoms; none can learn the rule for all alone\n")
    rows = {}
    for method in METHODS:
        with Display(console, f"{method:11}") as display:
            run(configuration(method, rounds or ROUNDS), out / method, display)
        rows[method] = summary(out / method)
        console.print()
    base = rows["fedex"]["base_accuracy"]
    columns = ["method", "accuracy", "deviation of plain averaging", "exactness error", "sent down", "sent up"]
    body = [[method, *_cells(row)] for method, row in rows.items()]
    console.print(table(f"accuracy on the notes of all three hospitals (the base alone: {base:.3f}, chance: {1 / 3:.3f})", columns, body))
    page = write_report([out / method for method in METHODS], out / "report.html")
    console.print(f"what happened, in charts: {page['out']} (open it in a browser)", highlight=False)
    console.print(f"all files: {out}   check the exact one again: fedex-lora verify {out / 'fedex'}", highlight=False)
    result = {"base_accuracy": base, "methods": rows}
    write_text(out / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['accuracy']:.3f}",
        f"{row['deviation']:.1%}",
        f"{row['exactness_error']:.1e}",
        size(row["bytes_down"]),
        size(row["bytes_up"]),
    ]


def summary(folder: Path) -> dict[str, Any]:
    """The numbers of one run, from its events."""
    events = read_events(folder / "events.jsonl")
    rounds = [event for event in events if event["event"] == "round_done"]
    return {
        "base_accuracy": next(event["metrics"]["accuracy"] for event in events if event["event"] == "started"),
        "accuracy": rounds[-1]["metrics"]["accuracy"],
        "accuracies": [event["metrics"]["accuracy"] for event in rounds],
        "deviation": max(event["deviation"] for event in rounds),
        "exactness_error": max(event["exactness_error"] for event in rounds),
        "realised_error": max(event["realised_error"] for event in rounds),
        **dict(zip(("bytes_down", "bytes_up"), sent(events), strict=True)),
        "seconds": sum(event["seconds"] for event in rounds),
    }
