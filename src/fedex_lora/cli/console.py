"""What a person sees of a run: progress bars on a terminal, one line a round anywhere else."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedex_lora.storage import events as told
from fedex_lora.storage.event_tail import tail_events
from fedex_lora.storage.events import Event
from fedex_lora.storage.run_folder import EVENTS

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
        self._progress = _bars(console, "{task.description}", "{task.fields[note]}", clock)
        self._bars: dict[str, TaskID] = {}
        self._clock, self._started = clock, clock()

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        handler = getattr(self, f"_on_{event.name}", None)
        if handler:
            handler(event)

    def _on_started(self, event: told.Started) -> None:
        self._rounds, self._started = event.rounds, self._started or self._clock()
        line = f"{event.method} on {event.task or 'a task'}: {len(event.clients)} clients"
        if event.trainable_parameters is not None and event.total_parameters is not None:
            line += f", {event.trainable_parameters:,} of {event.total_parameters:,} parameters trained"
        if event.disk_bytes is not None:
            line += f", up to {decimal(event.disk_bytes, precision=1)} of disk"
        self._print(line)
        if event.start:
            on, whole = event.start, int(event.start.get("matrices", 0))
            gained = [f"rank {on['base_rank']}"] if on["base_rank"] or not whole else []
            gained += [f"a whole matrix in {whole} module{'s' if whole > 1 else ''}"] if whole else []
            said = f"round {on['round']} of {on['method']}, whose base gained {' and '.join(gained)}"
            self._print(f"goes on from {on['folder']}: {said}")
        if event.settings:
            self._print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in event.settings.items()))
        self._print(f"round 0/{self._rounds}  {numbers(event.metrics)}")
        self._bar("rounds", self._rounds)

    def _on_resumed(self, event: told.Resumed) -> None:
        self._rounds = event.rounds
        self._print(f"going on with round {min(event.round, self._rounds)} of {self._rounds}")
        if "rounds" not in self._bars:
            self._bar("rounds", self._rounds, event.round - 1)

    def _on_finished(self, event: told.Finished) -> None:
        self._print(f"all {event.rounds} rounds are there: nothing is left to do")

    def _on_round_started(self, event: told.RoundStarted) -> None:
        for name in {"clients", "steps"} & self._bars.keys():
            self._progress.remove_task(self._bars.pop(name))
        self._bar("clients", len(event.clients))

    def _on_step(self, event: told.Step) -> None:
        if "steps" not in self._bars:
            self._bar("steps", None)
        self._progress.update(self._bars["steps"], completed=event.step, total=event.steps, note=event.client)

    def _on_client_done(self, event: told.ClientDone) -> None:
        if "clients" in self._bars:
            self._progress.update(self._bars["clients"], advance=1, note=numbers({"loss": event.train_loss}))

    def _on_round_done(self, event: told.RoundDone) -> None:
        if "rounds" in self._bars:
            self._progress.update(self._bars["rounds"], completed=event.round)
        metrics = numbers(event.metrics) or "no global model: see the clients' own rows"
        said = (
            ("  exactness error {:.1e}", event.exactness_error),
            (" ({})", _layers(event.realised_error, event.floor)),
            ("  averaging alone is off by {:.1%}", event.deviation),
            ("  truncation dropped {:.1%}", event.dropped),
            ("  no number: {}", ", ".join(event.not_finite) or None),
            ("  down {}", decimal(event.bytes_down, precision=2)),
            (" up {}", decimal(event.bytes_up, precision=2)),
            ("  {:.1f} s", event.seconds),
        )
        more = "".join(text.format(value) for text, value in said if value is not None)
        self._print(f"round {event.round}/{self._rounds}  {metrics}{more}")

    def _on_warning(self, event: told.Warned) -> None:
        where = f"round {event.round}: " if event.round is not None else ""
        self._print(f"! {where}{event.message}")

    def _on_party_failed(self, event: told.PartyFailed) -> None:
        self._print(f"! {event.client} failed: {event.message}")

    def _on_rejected(self, event: told.ClientRejected) -> None:
        self._print(f"! round {event.round}: client {event.client} is left out: {event.reason}")

    def _on_waiting(self, event: told.Waiting) -> None:
        since = time.strftime("%H:%M:%S", time.localtime(event.since))
        again = f": {event.reason}; asking again in {event.seconds:.0f} s" if event.reason else ""
        who = ", ".join(event.clients[:5]) + (f" and {len(event.clients) - 5} more" if len(event.clients) > 5 else "")
        self._print(f"round {event.round}: waiting for {who} since {since}{again}")

    def _on_held_out(self, event: told.HeldOut) -> None:
        if event.round:
            self._print(f"  the clients' own held-out rows after round {event.round}: {numbers(event.metrics)}")

    def _on_run_done(self, event: told.RunDone) -> None:
        if event.skipped:
            self._print(f"! {len(event.skipped)} of {event.rounds} rounds were skipped")
        best, by = event.best_round, f" by {event.headline}" if event.headline else ""
        note = (
            f"final/ is round {event.rounds}; best on the clients' held-out rows{by} is round {best}"
            + ("" if best == event.rounds else f" (rounds/{best:04d}; export and evaluate take it by --round best)")
            if best
            else "no round is called best: not every client measured every round, or nothing finite (on private rows nothing is measured)"
        )
        self._print(f"{note}; {self._clock() - self._started:.0f} s in all")

    def _bar(self, name: str, total: int | None, completed: int = 0) -> None:
        self._bars[name] = self._progress.add_task(name, total=total, completed=completed, note="")

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
        for event in tail_events(folder / EVENTS, None if once else every):
            now[0] = (event and event.time) or time.time()
            if isinstance(event, told.Unreadable):
                if event.complaint:
                    console.print(f"(a line that says {event.event!r} cannot be shown)", highlight=False, markup=False)
            elif event:
                display(event)
            done = isinstance(event, told.RunDone)
    return done


@contextmanager
def runs_shown(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Shows the runs of a comparison: a line for each that is done, and on a terminal a bar of how many."""
    with _bars(console, "runs", "") as progress:
        bar = progress.add_task("runs", total=None)

        def tell(line: str, done: int, total: int) -> None:
            if total:
                progress.update(bar, completed=done, total=total)
            console.print(f"{done}/{total}  {line}" if total else line, highlight=False, markup=False)

        yield tell


def _bars(console: Console, before: str, after: str, clock: Callable[[], float] | None = None) -> Progress:
    """Bars with a text on either side, on a terminal only."""
    left, right = (TextColumn(text, markup=False) for text in (before, after))
    columns = (left, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), right)
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True, get_time=clock)


def numbers(metrics: Mapping[str, float | None]) -> str:
    """Metrics on one line, the loss last; those that are none are left out."""
    shown = {name: value for name, value in metrics.items() if name not in HIDDEN and value is not None}
    return " ".join(f"{name} {value:.4f}" for name, value in sorted(shown.items(), key=lambda item: item[0] == "loss"))


def console_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of text and numbers; where it is too wide, headings and text fold, and numbers stay whole."""
    made = Table(title=Text(title, "table.title"), title_justify="left")
    for index, column in enumerate(columns):
        cells = [row[index] for row in rows]
        text = index == 0 or any(cell[:1].isalpha() and " " in cell for cell in cells)
        widest = max(map(len, [*([] if text else cells), *column.split()]), default=1)
        made.add_column(Text(column), justify="left" if text else "right", min_width=widest, overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made
