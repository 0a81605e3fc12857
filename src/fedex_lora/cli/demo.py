"""`fedex-lora demo`: the embedded default, four methods side by side."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal

from fedex_lora.cli.console import Display, console_table
from fedex_lora.config import write_config
from fedex_lora.errors import UsageError
from fedex_lora.exactness.algebra import worst
from fedex_lora.report import write_report
from fedex_lora.report.analysis import sent
from fedex_lora.runs.run import run
from fedex_lora.storage.events import RoundDone, Started, of_kind, read_events
from fedex_lora.storage.files import TEMPORARY, finite_json, write_text
from fedex_lora.storage.run_folder import CONFIG, EVENTS, barely_begun, is_report, remove, strays
from fedex_lora.tasks.demo import ROUNDS, configuration

SHOWN = ("fedex", "fedit", "ffa", "centralised")
RESULT, REPORT = "demo.json", "report.html"


def run_demo(out: Path, rounds: int | None, console: Console) -> dict[str, Any]:
    """Run all four methods into `out`, print the table, and return it.

    Raises:
        UsageError: `out` holds something that is not an earlier demo's.
    """
    if out.exists():
        _clear(out)
    write_text(out / RESULT, "{}\n")
    console.print("three hospitals write triage notes, each about its own symptoms; none can learn the rule for all alone\n")
    rows = {}
    for method in SHOWN:
        with Display(console, f"{method:11}") as display:
            run(configuration(method, rounds or ROUNDS), out / method, display)
        rows[method] = demo_summary(out / method)
        console.print()
    base = rows["fedex"]["base_accuracy"]
    columns = ["method", "accuracy", "deviation of plain averaging", "exactness error", "sent down", "sent up"]
    body = [[method, *_cells(row)] for method, row in rows.items()]
    console.print(
        console_table(f"accuracy on the notes of all three hospitals (the base alone: {base:.3f}, chance: {1 / 3:.3f})", columns, body)
    )
    console.print(
        "one run a method does not say which is better: with 20 seeds on such notes exactness alone gained 1.2 +- 0.9 points, momentum "
        "and balanced factors three to five each; on real data exactness gained little or nothing (docs/when-exactness-matters.md)",
        highlight=False,
    )
    result = {"base_accuracy": base, "methods": rows}
    write_text(out / RESULT, finite_json(result) + "\n")
    try:
        page = write_report([out / method for method in SHOWN], out / REPORT)
        console.print(f"what happened, in charts: {page['out']} (open it in a browser)", highlight=False)
    except UsageError as error:
        console.print(f"without charts: {error}", highlight=False)
    console.print(f"all files: {out}   check the exact one again: fedex-lora verify {out / 'fedex'}", highlight=False)
    return result


def _clear(out: Path) -> None:
    """Remove an earlier demo, whole or killed; a folder that holds anything else is left as it is."""
    if not out.is_dir() or not (barely_begun(out) or (out / RESULT).is_file()):
        raise UsageError(f"{out} exists and is no earlier demo: give another --out")
    for path in out.iterdir():
        mine = {REPORT: is_report, RESULT: _is_table, **dict.fromkeys(SHOWN, _is_demo)}.get(path.name)
        ours = mine is not None and mine(path)
        if not ours and not path.name.startswith(TEMPORARY):
            raise UsageError(f"{path} is no part of a demo, so the demo in {out} is not replaced: give another --out, or move that away")
    for method in SHOWN:
        if (out / method).is_dir():
            remove(out / method)


def _is_table(path: Path) -> bool:
    """As `run_demo` writes it, at its start or at its end."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(found, dict) and found.keys() in (set(), {"base_accuracy", "methods"})


def _is_demo(folder: Path) -> bool:
    """Is it a demo's run of the method that it is named after, for any number of rounds, and nothing else?"""

    def settled(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("rounds = ")]

    if not folder.is_dir() or strays(folder):
        return False
    mark = folder / CONFIG
    return not mark.exists() or settled(mark.read_text(encoding="utf-8")) == settled(write_config(configuration(folder.name)))


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['accuracy']:.3f}",
        f"{row['deviation']:.1%}",
        f"{row['exactness_error']:.1e}",
        decimal(int(row["bytes_down"]), precision=2),
        decimal(int(row["bytes_up"]), precision=2),
    ]


def demo_summary(folder: Path) -> dict[str, Any]:
    """The numbers of one run, from its events."""
    events = read_events(folder / EVENTS)
    rounds = of_kind(events, RoundDone)
    accuracies = [event.metrics["accuracy"] for event in rounds]
    return {
        "base_accuracy": of_kind(events, Started)[0].metrics["accuracy"],
        "accuracy": accuracies[-1],
        "accuracies": accuracies,
        **{error: worst(getattr(event, error) for event in rounds) for error in ("deviation", "exactness_error", "realised_error")},
        **dict(zip(("bytes_down", "bytes_up"), sent(events), strict=True)),
        "seconds": sum(event.seconds or 0.0 for event in rounds),
    }
