"""What a person sees of a run: progress bars on a terminal, one line a round anywhere else."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedex_lora.storage.events import tail_events

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
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
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
        self._rounds, self._started = fields["rounds"], self._started or self._clock()
        line = f"{fields['method']} on {fields.get('task', 'a task')}: {len(fields['clients'])} clients"
        if {"trainable_parameters", "total_parameters"} <= fields.keys():
            line += f", {fields['trainable_parameters']:,} of {fields['total_parameters']:,} parameters trained"
        if "disk_bytes" in fields:
            line += f", up to {fields['disk_bytes'] / 1e6:.0f} MB of disk"
        self._print(line)
        if settings := fields.get("settings"):
            self._print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items()))
        self._print(f"round 0/{self._rounds}  {numbers(fields['metrics'])}")
        self._bars["rounds"] = self._progress.add_task("rounds", total=self._rounds, note="")

    def _on_resumed(self, fields: dict[str, Any]) -> None:
        self._rounds = fields["rounds"]
        self._print(f"going on with round {min(fields['round'], self._rounds)} of {self._rounds}")
        if "rounds" not in self._bars:
            self._bars["rounds"] = self._progress.add_task("rounds", total=self._rounds, completed=fields["round"] - 1, note="")

    def _on_finished(self, fields: dict[str, Any]) -> None:
        self._print(f"all {fields['rounds']} rounds are there: nothing is left to do")

    def _on_round_started(self, fields: dict[str, Any]) -> None:
        for name in {"clients", "steps"} & self._bars.keys():
            self._progress.remove_task(self._bars.pop(name))
        self._bars["clients"] = self._progress.add_task("clients", total=len(fields["clients"]), note="")

    def _on_step(self, fields: dict[str, Any]) -> None:
        if "steps" not in self._bars:
            self._bars["steps"] = self._progress.add_task("steps", total=None, note="")
        self._progress.update(self._bars["steps"], completed=fields["step"], total=fields["steps"], note=fields["client"])

    def _on_client_done(self, fields: dict[str, Any]) -> None:
        if "clients" in self._bars:
            self._progress.update(self._bars["clients"], advance=1, note=numbers({"loss": fields.get("train_loss")}))

    def _on_round_done(self, fields: dict[str, Any]) -> None:
        if "rounds" in self._bars:
            self._progress.update(self._bars["rounds"], completed=fields["round"])
        metrics = numbers(fields["metrics"]) or "no global model: see the clients' own rows"
        line = f"round {fields['round']}/{self._rounds}  {metrics}"
        said = {
            "exactness_error": "  exactness error {:.1e}",
            "layers": " ({})",
            "deviation": "  averaging alone is off by {:.1%}",
            "dropped": "  truncation dropped {:.1%}",
        }
        fields = {**fields, "layers": _layers(fields.get("realised_error"), fields.get("floor"))}
        line += "".join(text.format(fields[key]) for key, text in said.items() if fields.get(key) is not None)
        if odd := fields.get("not_finite"):
            line += f"  no number: {', '.join(odd)}"
        seconds = f"  {fields['seconds']:.1f} s" if "seconds" in fields else ""
        self._print(
            f"{line}  down {decimal(int(fields['bytes_down']), precision=2)} up {decimal(int(fields['bytes_up']), precision=2)}{seconds}"
        )

    def _on_warning(self, fields: dict[str, Any]) -> None:
        where = f"round {fields['round']}: " if "round" in fields else ""
        self._print(f"! {where}{fields['message']}")

    def _on_party_failed(self, fields: dict[str, Any]) -> None:
        self._print(f"! {fields['client']} failed: {fields['message']}")

    def _on_refused(self, fields: dict[str, Any]) -> None:
        self._print(f"! round {fields['round']}: client {fields['client']} is left out: {fields['reason']}")

    def _on_waiting(self, fields: dict[str, Any]) -> None:
        since = time.strftime("%H:%M:%S", time.localtime(fields["since"]))
        again = f": {fields['reason']}; asking again in {fields['seconds']:.0f} s" if "reason" in fields else ""
        who = ", ".join(fields["clients"][:5]) + (f" and {len(fields['clients']) - 5} more" if len(fields["clients"]) > 5 else "")
        self._print(f"round {fields['round']}: waiting for {who} since {since}{again}")

    def _on_held_out(self, fields: dict[str, Any]) -> None:
        if fields["round"]:
            self._print(f"  the clients' own held-out rows after round {fields['round']}: {numbers(fields['metrics'])}")

    def _on_run_done(self, fields: dict[str, Any]) -> None:
        best, skipped = fields["best_round"], fields.get("skipped", [])
        if skipped:
            self._print(f"! {len(skipped)} of {fields['rounds']} rounds were skipped")
        note = (
            f"final/ is round {fields['rounds']}; best on the clients' held-out rows is round {best}"
            + ("" if best == fields["rounds"] else f" (rounds/{best:04d}: give that folder to export and evaluate)")
            if best
            else "no round is called best: not every client measured every round"
        )
        self._print(f"{note}; {self._clock() - self._started:.0f} s in all")

    def _print(self, line: str) -> None:
        """As it is: names and reasons come from elsewhere."""
        self._console.print(f"{self._label}{line}", highlight=False, markup=False)


def _layers(error: float | None, floor: float | None) -> str | None:
    """How exact the model's own layers are, in words; the floor is what rounding in their precision costs by itself, next to the update.

    >>> _layers(9e-7, 4e-6), _layers(21.0, 7.0)
    ('the layers within their rounding', 'the layers are off by 21 of the update, rounding alone costs 7')
    """
    if error is None or floor is None:
        return None
    return (
        "the layers within their rounding"
        if error <= floor
        else f"the layers are off by {error:.2g} of the update, rounding alone costs {floor:.2g}"
    )


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
        for event in tail_events(folder / "events.jsonl", None if once else every):
            now[0] = (event or {}).get("time") or time.time()
            if event:
                try:
                    display(event["event"], **{key: value for key, value in event.items() if key not in ("event", "time")})
                except (KeyError, TypeError, ValueError, AttributeError):
                    console.print(f"(a line that says {event['event']!r} cannot be shown)", highlight=False, markup=False)
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
        self._console.print(f"{done}/{total}  {line}" if total else line, highlight=False, markup=False)


def numbers(metrics: dict[str, float | None]) -> str:
    """Metrics on one line, the loss last; those that are none are left out."""
    shown = {name: value for name, value in metrics.items() if name not in HIDDEN and value is not None}
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(shown.items(), key=lambda item: item[0] == "loss"))


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table of text and numbers; where it is too wide, headings and text fold, and numbers stay whole."""
    made = Table(title=escape(title), title_justify="left")
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        text = index == 0 or any(cell[:1].isalpha() and " " in cell for cell in cells)
        widest = max(map(len, [*([] if text else cells), *column.split()]), default=1)
        made.add_column(escape(column), justify="left" if text else "right", min_width=widest, overflow="fold")
    for row in rows:
        made.add_row(*map(escape, row))
    return made
