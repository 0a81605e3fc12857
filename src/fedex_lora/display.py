"""What a person sees of a run: progress bars on a terminal, one line a round anywhere else."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedex_lora.storage import followed_events

HIDDEN = ("rows", "runtime")


class Display:
    """An `Emit` that shows a run on a console.

    Args:
        console: where; bars are drawn only on a terminal.
        label: in front of every line.
        clock: what time it is, in seconds; the times of the events where past ones are shown.
    """

    def __init__(self, console: Console, label: str = "", clock: Callable[[], float] = time.perf_counter) -> None:
        self._console, self._label, self._rounds = console, f"{label}  " if label else "", 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True, get_time=clock)
        self._bars: dict[str, TaskID] = {}
        self._clock, self._started = clock, clock()

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: str, **fields: Any) -> None:
        """Show one event."""
        handler = getattr(self, f"_on_{event}", None)
        if handler:
            handler(fields)

    def _on_started(self, fields: dict[str, Any]) -> None:
        clients = len(fields["clients"])
        self._rounds, self._started = fields["rounds"], self._started or self._clock()
        trained, total = fields["trainable_parameters"], fields["total_parameters"]
        self._console.print(
            f"{self._label}{fields['method']} on {fields['task']}: {clients} clients, {trained:,} of {total:,} parameters trained, "
            f"up to {fields['disk_bytes'] / 1e6:.0f} MB of disk"
        )
        self._console.print(f"{self._label}round 0/{self._rounds}  {numbers(fields['metrics'])}")
        self._bars["rounds"] = self._progress.add_task("rounds", total=self._rounds, note="")

    def _on_resumed(self, fields: dict[str, Any]) -> None:
        self._rounds = fields["rounds"]
        self._console.print(f"{self._label}going on with round {min(fields['round'], self._rounds)} of {self._rounds}")
        if "rounds" not in self._bars:
            self._bars["rounds"] = self._progress.add_task("rounds", total=self._rounds, completed=fields["round"] - 1, note="")

    def _on_round_started(self, fields: dict[str, Any]) -> None:
        for name in ("clients", "steps"):
            if name in self._bars:
                self._progress.remove_task(self._bars.pop(name))
        self._bars["clients"] = self._progress.add_task("clients", total=len(fields["clients"]), note="")
        self._bars["steps"] = self._progress.add_task("steps", total=None, note="")

    def _on_step(self, fields: dict[str, Any]) -> None:
        self._progress.update(self._bars["steps"], completed=fields["step"], total=fields["steps"], note=fields["client"])

    def _on_client_done(self, fields: dict[str, Any]) -> None:
        self._progress.update(self._bars["clients"], advance=1, note=f"loss {fields.get('train_loss', float('nan')):.4f}")

    def _on_round_done(self, fields: dict[str, Any]) -> None:
        self._progress.update(self._bars["rounds"], completed=fields["round"])
        metrics = numbers(fields["metrics"]) or "no global model: see the clients' own rows"
        line = f"{self._label}round {fields['round']}/{self._rounds}  {metrics}"
        if "exactness_error" in fields:
            line += (
                f"  exactness error {fields['exactness_error']:.1e} (layers {fields['realised_error']:.1e}, floor {fields['floor']:.1e})"
            )
            line += f"  averaging alone is off by {fields['deviation']:.1%}"
        if "compaction_error" in fields:
            line += f"  compaction keeps all but {fields['compaction_error']:.1%} of the base delta"
        if "dropped" in fields:
            line += f"  truncation dropped {fields['dropped']:.1%}"
        self._console.print(
            f"{line}  down {size(fields['bytes_down'])} up {size(fields['bytes_up'])}  {fields['seconds']:.1f} s", highlight=False
        )

    def _on_warning(self, fields: dict[str, Any]) -> None:
        where = f"round {fields['round']}: " if "round" in fields else ""
        self._console.print(f"{self._label}! {where}{fields['message']}", highlight=False, markup=False)

    def _on_refused(self, fields: dict[str, Any]) -> None:
        self._console.print(
            f"{self._label}! round {fields['round']}: client {fields['client']} is left out: {fields['reason']}",
            highlight=False,
            markup=False,
        )

    def _on_waiting(self, fields: dict[str, Any]) -> None:
        since = time.strftime("%H:%M:%S", time.localtime(fields["since"]))
        again = f": {fields['reason']}; asking again in {fields['seconds']:.0f} s" if "reason" in fields else ""
        who = ", ".join(fields["clients"][:5]) + (f" and {len(fields['clients']) - 5} more" if len(fields["clients"]) > 5 else "")
        self._console.print(f"{self._label}round {fields['round']}: waiting for {who} since {since}{again}", highlight=False, markup=False)

    def _on_held_out(self, fields: dict[str, Any]) -> None:
        if fields["round"]:
            self._console.print(
                f"{self._label}  the clients' own held-out rows after round {fields['round']}: {numbers(fields['metrics'])}",
                highlight=False,
            )

    def _on_run_done(self, fields: dict[str, Any]) -> None:
        best, skipped = fields["best_round"], fields.get("skipped", [])
        if skipped:
            self._console.print(f"{self._label}! {len(skipped)} of {fields['rounds']} rounds were skipped", highlight=False)
        note = (
            f"best round on the clients' held-out rows: {best}; last: {fields['rounds']}"
            if best
            else "no round is called best: not every client measured every round"
        )
        self._console.print(f"{self._label}{note}; {self._clock() - self._started:.0f} s in all", highlight=False)


def watch(folder: Path, console: Console, once: bool = False, every: float = 1.0) -> bool:
    """Show a run that another process or machine works on, from its `events.jsonl`, until it is done.

    Args:
        folder: the run folder.
        console: where.
        once: only what there is by now.
        every: seconds between looks at the file.

    Returns:
        Is the run done?

    Raises:
        UsageError: no run folder.
    """
    now, done = [0.0], False
    with Display(console, clock=lambda: now[0]) as display:
        for event in followed_events(folder / "events.jsonl", None if once else every):
            now[0] = event["time"] if event else time.time()
            if event:
                display(event["event"], **{key: value for key, value in event.items() if key not in ("event", "time")})
                done = done or event["event"] == "run_done"
    return done


class Runs:
    """Shows the runs of a comparison: a line for each that is done, and on a terminal a bar of how many."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._console, self._bar = console, self._progress.add_task("runs", total=None)

    def __enter__(self) -> "Runs":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, line: str, done: int, total: int) -> None:
        if total:
            self._progress.update(self._bar, completed=done, total=total)
        self._console.print(f"{done}/{total}  {line}" if total else line, highlight=False)


def numbers(metrics: dict[str, float]) -> str:
    """Metrics on one line, the loss last."""
    shown = {name: value for name, value in metrics.items() if name not in HIDDEN}
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(shown.items(), key=lambda item: item[0] == "loss"))


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is text and the others numbers."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made
