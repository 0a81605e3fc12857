"""The page: sections, data, styles and the charting library in one HTML file that asks nothing of a network."""

import json
from base64 import b64encode
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from fedex_lora import __version__
from fedex_lora.config import MEMORY
from fedex_lora.errors import UsageError, require_extra
from fedex_lora.report._charts import CELLS, Chart
from fedex_lora.report._groups import grouped
from fedex_lora.report._measured import Evaluation, evaluation_section, read_evaluation
from fedex_lora.report._privacy import privacy_section
from fedex_lora.report._sections import Section, communication_section, comparison, curves, details, deviation_section
from fedex_lora.report._tables import Sortable
from fedex_lora.report._tiles import tiles
from fedex_lora.report.analysis import Run, find_runs
from fedex_lora.storage.events import ClientRejected, RoundDone, of_kind
from fedex_lora.storage.files import write_text
from fedex_lora.storage.run_folder import CONFIG, is_report

MOST = 12  # groups of runs in one report


def write_report(paths: Sequence[Path], out: Path, evaluated: Sequence[Path] = ()) -> dict[str, Any]:
    """Write the report of one or several runs as one HTML file.

    Args:
        paths: run folders, or folders that hold some.
        out: the file; a report that is there is replaced, and nothing else.
        evaluated: files of what `fedex-lora evaluate --json` printed, to be shown, too.

    Returns:
        `out`, `bytes`, `runs`, `charts`, `tables`.

    Raises:
        UsageError: no runs, or too many to compare; `out` or a file of `evaluated` is something else; or no extra `report`.
        StorageError: a run that cannot be read.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder: give the name of a file, such as {out / 'report.html'}")
    if out.exists() and not is_report(out):
        raise UsageError(f"{out} exists and is no report of fedex-lora: give another name after -o")
    for module in ("jinja2", "vl_convert"):
        require_extra(module, "report", "reports")
    runs = find_runs(paths)
    text, counts = page(runs, [read_evaluation(path) for path in evaluated])
    try:
        write_text(out, text)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}: give another name after -o") from None
    return {"out": str(out), "bytes": len(text.encode()), "runs": len(runs), **counts}


def page(runs: Sequence[Run], evaluations: Sequence[Evaluation] = ()) -> tuple[str, dict[str, int]]:
    """The HTML of a report, and how many `charts` and `tables` it has."""
    groups = grouped(runs)
    if len(groups) > MOST:
        raise UsageError(f"{len(groups)} kinds of runs are too many for one report: give at most {MOST} (seeds do not count)")
    budget = 2 * CELLS // max(1, len(groups))  # cells of heat maps, of one group
    parts = [Section("At a glance", "", [comparison(groups)])] if len(groups) > 1 else []
    parts += [curves(groups), *map(evaluation_section, evaluations), deviation_section(groups), communication_section(groups)]
    parts += [privacy_section(groups)]
    parts += [details(group, budget, folded=len(groups) > 1) for group in groups]
    parts = [part for part in parts if part.items or part.inner]
    charts, tables = [item for item in _items(parts) if isinstance(item, Chart)], sum(1 for _ in _items(parts))
    scripts = {"library": vl_library(), "script": _text("page.js")}
    html = (
        _environment()
        .get_template("page.html")
        .render(
            title=_title(runs),
            facts=_facts(runs),
            tiles=tiles(groups[0]) if len(groups) == 1 else [],
            parts=parts,
            ids={id(chart): f"chart-{number}" for number, chart in enumerate(charts)},
            data=_json([{"spec": chart.embedded(), "choices": chart.choices} for chart in charts]),
            setups=[_setup(group.label, group.first) for group in groups],
            style=_text("page.css"),
            policy=" ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts.values()),
            version=__version__,
            **scripts,
        )
    )
    return html, {"charts": len(charts), "tables": tables}


def _items(parts: Sequence[Section]) -> Iterator[Chart | Sortable]:
    for part in parts:
        yield from part.items
        yield from _items(part.inner)


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("fedex_lora.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.tests["chart"] = lambda item: isinstance(item, Chart)
    made.globals["key"] = id
    return made


@cache
def vl_library() -> str:
    """Vega, Vega-Lite and vega-embed as one JavaScript module, from vl-convert (which carries them; nothing is downloaded)."""
    import vl_convert

    script: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub forgets the default
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _text(name: str) -> str:
    return (files("fedex_lora.report") / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _title(runs: Sequence[Run]) -> str:
    tasks = list(dict.fromkeys(run.started.task for run in runs))
    methods = list(dict.fromkeys(run.started.method for run in runs))
    return f"{', '.join(methods)} on {', '.join(tasks)}" if len(methods) <= 4 else f"{len(methods)} methods on {', '.join(tasks)}"


def _facts(runs: Sequence[Run]) -> list[str]:
    """The lines under the title."""
    first = runs[0].started
    model = Path(first.base_model).name if Path(first.base_model).is_absolute() else first.base_model
    when = datetime.fromtimestamp(first.time, UTC).strftime("%Y-%m-%d %H:%M UTC") if first.time and first.time > 1e9 else ""
    trained, total = first.trainable_parameters, first.total_parameters
    lines = [f"base {model}" if model else "", f"{trained:,} of {total:,} parameters trained" if trained and total else "", when]
    going = [run.name for run in runs if not run.finished]
    if going:
        lines.append(f"not finished: {', '.join(going)}")
    return [line for line in lines if line]


def _setup(label: str, run: Run) -> dict[str, Any]:
    """Configuration, environment, and how to run it again."""
    config = run.folder / CONFIG
    text = config.read_text(encoding="utf-8") if config.is_file() else tomli_w.dumps(dict(run.config))
    started = run.started
    environment: dict[str, Any] = {**started.versions, "threads": started.torch_threads or ""}
    environment |= {key: getattr(started, key) for key in ("base_dtype", "base_quantization", "base_fingerprint") if getattr(started, key)}
    done = of_kind(run.events, RoundDone)
    missed = bool(of_kind(run.events, ClientRejected)) or any(event.skipped for event in done)
    exact = any(event.exactness_error is not None for event in done)
    own = str(run.config.get("task", {}).get("eval")).startswith(MEMORY) or set(started.train_rows.values()) == {0}
    flags = {"exact": exact, "missed": missed, "private": bool(started.privacy), "own": own}
    return {"label": label, "config": text, "environment": environment, "seed": run.config.get("seed"), **flags}
