"""Adapters and results: `aggregate`, `verify`, `export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedex_lora.cli._shared import Debug, Json, RoundOption, app, consoles, fail, number_list, one_line_errors, print_json
from fedex_lora.errors import UsageError


@app.command()
@one_line_errors
def aggregate(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT LoRA folders, one a client; with --merge, OUTs of regional aggregates.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write; must not exist or be empty.")],
    weights: Annotated[
        str | None, typer.Option(help="Comma-separated numbers, one an adapter; by default uniform (--merge: their totals).")
    ] = None,
    method: Annotated[str, typer.Option(help="METHOD or METHOD+GAUGE; see docs/methods.md.")] = "fedex",
    state: Annotated[Path | None, typer.Option(help="The result folder that the adapters were trained on top of.")] = None,
    truncate: Annotated[
        str | None,
        typer.Option(help="fedex-svd: rank=R, energy=SHARE of |R|^2 or bytes=N a download; by default the adapter's rank."),
    ] = None,
    updates: Annotated[
        bool, typer.Option("--updates/--no-updates", help="Keep the adapters in OUT, so that verify can recompute the ideal.")
    ] = True,
    for_parties: Annotated[
        Path | None,
        typer.Option(help="A folder to write beside OUT for the parties to go on from: it holds nobody's adapter, name or weight."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The base model of all of them, where they name it differently (other paths, a 4-bit copy)."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge the results of regional servers, exactly, whatever the tree.")] = False,
    audit: Annotated[
        str, typer.Option(help="Measure the error against the fp64 ideal: exact, estimate or none; auto: exact unless that takes long.")
    ] = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Aggregate PEFT adapters from anywhere, exactly. No training, no server."""
    from fedex_lora.offline.aggregate_folders import aggregate_folders
    from fedex_lora.offline.merge_results import merge_folders

    if merge and (method != "fedex" or state or truncate or not updates or audit != "auto"):
        raise UsageError("--merge takes everything but --weights and --base from the regions' results: leave the other options out")
    given = number_list(weights, "--weights", "120,80" if merge else "0.2,0.3,0.5")
    if merge:
        result = merge_folders(adapters, out, given, for_parties, base)
    else:
        cut, how = _truncation(truncate), _audit(audit)
        result = aggregate_folders(adapters, out, method, given, state, cut, updates, how, for_parties, base)
    if as_json:
        print_json(result)
    else:
        _print_result(consoles(False), result, out)
    _require_exact(result)


def _print_result(console: Any, result: dict[str, Any], out: Path) -> None:
    """Of which adapters the mean is, how far off it is, and where it is."""
    shares = ", ".join(f"{name} {weight:.4g}" for name, weight in result["weights"].items())
    if "clients" in result:
        of = f"{len(result['clients'])} adapters of {len(result['weights'])} regions"
        lines = [f"relative error against {result['error_against']} in fp64: {result['max_relative_error']:.1e}"]
    else:
        of = f"{result['modules']} modules of {len(result['weights'])} adapters"
        of += f" of {result['base_model']}" if result["base_model"] else ""
        lines = [_errors(result)]
        lines += [f"the truncation dropped {result['tail']:.1%} of the norm of what it cut"] if result["tail"] else []
        lines += [f"! {result['warning']}"] if result["warning"] else []
    lines += [f"! {note}" for note in result["notes"]]
    train = result.get("for_parties") or f"{out / 'trainable'} with base_delta.safetensors"
    lines.append((f"stand-alone adapter: {out / 'adapter'}   " if result["adapter"] else "") + f"to train on: {train}")
    if not result["adapter"]:
        lines.append("no stand-alone adapter: at rank k r it would be larger than the matrices; `export --as adapter --rank R` cuts one")
    for line in [f"{result['method']}: {of}; weights {shares}", *lines]:
        console.print(line, highlight=False)


def _errors(result: dict[str, Any]) -> str:
    if result["max_relative_error"] is None:
        return "the error was not measured"
    how = " (estimated on 32 random directions; --audit exact, or `verify`, computes it)" if result["error_estimated"] else ""
    error, deviation = result["max_relative_error"], result["deviation"]
    return f"relative error against the fp64 ideal: {error:.1e}; plain averaging is off by {deviation:.1%}{how}"


def _require_exact(result: dict[str, Any]) -> None:
    """An error that is no number is as wrong as a large one."""
    from fedex_lora.exactness.algebra import failed
    from fedex_lora.offline.verify import EXACT_BELOW

    error = result["max_relative_error"]
    if error is not None and (failed(error) or (result["exact_method"] and not error <= EXACT_BELOW)):
        fail(f"error: the result is off by {error:.1e}, and method {result['method']} is not: do not use {result['out']}", 1)


def _audit(text: str) -> Any:
    if text not in ("auto", "exact", "estimate", "none"):
        raise UsageError(f"--audit {text!r}: write auto, exact, estimate or none")
    return text


def _truncation(text: str | None) -> Any:
    from fedex_lora.config import Truncation

    if text is None:
        return None
    key, _, value = text.partition("=")
    try:
        return Truncation.model_validate({key: value})
    except ValueError:
        raise UsageError(f"--truncate {text!r}: write rank=8, energy=0.99 or bytes=1000000") from None


@app.command()
@one_line_errors
def verify(
    path: Annotated[Path, typer.Argument(help="A run folder, a round folder, or the OUT of aggregate; of an export, its files' sums.")],
    base: Annotated[str | None, typer.Option(help="The base model: its own weights are compared too.")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="List every module's error, too.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Recompute the ideal update, and print how far a result is off. In fp64, from the stored updates; per module and in total."""
    from fedex_lora.client.training import silence_libraries
    from fedex_lora.offline.verify import complaint, export_form
    from fedex_lora.offline.verify import verify as verify_here

    silence_libraries()
    if (form := export_form(path)) is not None:
        said = f"{path} is an export ({form}): its sums are right; export compared its logits when it was made"
        if as_json:
            print_json({"export": form, "recomputed": False, "said": said})
        else:
            consoles(False).print(said, highlight=False, markup=False)
        return
    result = verify_here(path, base)
    why = complaint(result)
    if as_json:
        print_json(result)
    else:
        for note in result["notes"]:
            consoles(False).print(f"! {note}", highlight=False)
        _print_verified(consoles(False), result, modules, exact=why is None)
    if why:
        fail(f"error: {why}", 1)


def _print_verified(console: Any, result: dict[str, Any], modules: bool, exact: bool) -> None:
    """What was compared, and at last the one number."""
    from fedex_lora.cli.console import console_table
    from fedex_lora.offline.verify import EXACT_BELOW

    for row in result["rounds"]:
        title = f"{row['folder']} ({row['method']}, round {row['round']})"
        if not row["recomputed"]:
            said = "every file has its sum, and is finite; the ideal is not recomputed, because nobody's update is here"
            console.print(f"{title}: {said}", highlight=False)
        elif modules:
            rows = [[module, f"{error:.2e}"] for module, error in row["per_module"].items()]
            console.print(console_table(title, ["module", "relative error"], rows))
    if result["final"]:
        last = result["rounds"][-1]["round"]
        best = _best({**result, "round": last}, Path(result["final"]).parent)
        console.print(f"{result['final']} is the last round, {last}, bit for bit{best}", highlight=False)
    if "realised_error" in result:
        for line in _in_words(result):
            console.print(line, highlight=False)
    if not result["recomputed"]:
        return
    worst, total = result["max_relative_error"], result["total_relative_error"]
    if not result["exact_method"]:
        console.print(f"{result['method']} is not exact: off by {worst:.1e} in the worst module, {total:.1e} in all", highlight=False)
    elif exact:
        console.print(f"exact: worst {worst:.1e} (limit {EXACT_BELOW:.0e})", highlight=False)


def _best(result: dict[str, Any], run: Path) -> str:
    """Which round of a run was best, if it is not the one at hand, and where it is."""
    best = result["best_round"]
    if best in (None, result["round"]):
        return ""
    folder = run / "rounds" / f"{best:04d}"
    where = f"its model is in {folder}" if folder.exists() else "and keep_rounds has removed its folder"
    return f"; best on the clients' held-out rows was round {best}, {where}"


def _in_words(result: dict[str, Any]) -> list[str]:
    """The errors of the model itself; relative to a small update, rounding alone may be many times the update."""
    compute, error, floor = result["compute_dtype"], result["realised_error"], result["floor"]
    lines = [f"the model's own layers are off by {_times(error)} the update; rounding in their precision alone costs {_times(floor)} it"]
    for kind, suffix in dict([(compute, ""), ("float32", "_float32")]).items():
        off, alone = result[f"output_share{suffix}"], result[f"output_share_floor{suffix}"]
        change = result[f"output_error{suffix}"]
        lines.append(
            f"its logits, computed in {kind}, are off by {off:.1e} of themselves (without the base delta by {alone:.1e}), which is "
            f"{_times(change)} what the base delta changes"
        )
    if not result["base_checked"]:
        lines.append("these adapters came without a fingerprint of their base: whether this is the one was not checked")
    return lines


def _times(share: float) -> str:
    return f"{share:.1e} of" if share < 1 else f"{share:.3g} times"


@app.command()
@one_line_errors
def export(
    source: Annotated[Path, typer.Argument(help="A run folder (its last round), a round folder, or the OUT of aggregate.")],
    form: Annotated[str, typer.Option("--as", help="merged: one model; adapter: one adapter for the base; base+adapter: both, to go on.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write; must not exist or be empty.")],
    base: Annotated[str | None, typer.Option(help="The base model; by default as the folder says.")] = None,
    rank: Annotated[int | None, typer.Option(help="adapter: cut it to this rank; the error is printed.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16 or float16; what that costs is printed.")] = None,
    max_shard_size: Annotated[str | None, typer.Option(help="The largest size of a model's file, such as 2GB; by default 50GB.")] = None,
    round: RoundOption = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model for plain transformers, PEFT or vLLM. It is reloaded, and its logits compared with the run's."""
    from fedex_lora.client.training import silence_libraries
    from fedex_lora.models.export import export as export_here
    from fedex_lora.storage.run_folder import folder_after

    silence_libraries()
    source = folder_after(source, round)
    result = export_here(source, form, out, base, rank, dtype, max_shard_size)
    if as_json:
        print_json(result)
        return
    console = consoles(False)
    cut = f"; of the update {result['update_error']:.2e} is missing" if result["update_error"] else ""
    console.print(f"{form} of round {result['round']} in {out}, rank {result['rank']}{cut}{_best(result, source)}", highlight=False)
    if result["tokens"]:
        console.print(
            f"the base must have {result['tokens']} tokens first: base.resize_token_embeddings({result['tokens']})", highlight=False
        )
    for line in (_reloaded(result), result["growth"]):
        if line:
            console.print(line, highlight=False)
    console.print(f"vLLM: {result['vllm']}", highlight=False)
    for note in result["notes"]:
        console.print(f"! {note}", highlight=False)


def _reloaded(result: dict[str, Any]) -> str:
    """How far the export is from the run, and whether its dtype explains that."""
    error, bound, change = result["output_error"], result["output_bound"], result["change_error"]
    line = f"reloaded: logits within {error:.1e} of the largest logit of the run's, {change:.1e} of what the update changes"
    if bound is None:
        return line
    line += f"; every weight is the nearest in {result['dtype']}, whose rounding explains up to {bound:.1e}"
    line += " (this is more: measure the export by `evaluate`)" if error > bound else ""
    return line + ("; rounding outweighs the update: --dtype float32 keeps it" if change > 1 else "")
