"""Adapters and results: `aggregate`, `verify`, `export`."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fedex_lora.cli._shared import Debug, Json, app, consoles, fail, numbers, one_line_errors, print_json
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
    state: Annotated[Optional[Path], typer.Option(help="The result folder that the adapters were trained on top of.")] = None,  # noqa: UP045
    truncate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="fedex-svd: rank=R, energy=SHARE or bytes=N; by default the adapter's rank."),
    ] = None,
    updates: Annotated[
        bool, typer.Option("--updates/--no-updates", help="Keep the adapters in OUT, so that verify can recompute the ideal.")
    ] = True,
    for_parties: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A folder to write beside OUT for the parties to go on from: it holds nobody's adapter, name or weight."),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
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

    if merge:
        other = method != "fedex" or state or truncate or not updates or audit != "auto"
        _merge(adapters, out, numbers(weights, "--weights", "120,80"), for_parties, base, other, as_json)
        return
    shares_given = numbers(weights, "--weights", "0.2,0.3,0.5")
    truncation = _truncation(truncate)
    result = aggregate_folders(adapters, out, method, shares_given, state, truncation, updates, _audit(audit), for_parties, base)
    if as_json:
        print_json(result)
        _require_exact(result)
        return
    console = consoles(False)
    shares = ", ".join(f"{client} {weight:.4g}" for client, weight in result["weights"].items())
    of = f"{len(result['weights'])} adapters" + (f" of {result['base_model']}" if result["base_model"] else "")
    console.print(f"{result['method']}: {result['modules']} modules of {of}; weights {shares}", highlight=False)
    _print_errors(console, result)
    if result["tail"]:
        console.print(f"the truncation dropped {result['tail']:.1%} of the norm of what it cut", highlight=False)
    if result["warning"]:
        console.print(f"! {result['warning']}", highlight=False)
    _print_places(console, result, out)
    _require_exact(result)


def _merge(
    regions: list[Path], out: Path, weights: list[float] | None, parties: Path | None, base: str | None, other: object, as_json: bool
) -> None:
    from fedex_lora.offline.merge_results import merge_folders

    if other:
        raise UsageError("--merge takes everything but --weights and --base from the regions' results: leave the other options out")
    result = merge_folders(regions, out, weights, parties, base)
    if as_json:
        print_json(result)
        _require_exact(result)
        return
    console = consoles(False)
    shares = ", ".join(f"{region} {weight:.4g}" for region, weight in result["weights"].items())
    console.print(f"{result['method']}: {len(result['clients'])} adapters of {len(regions)} regions; weights {shares}", highlight=False)
    console.print(f"relative error against {result['error_against']} in fp64: {result['max_relative_error']:.1e}", highlight=False)
    _print_places(console, result, out)
    _require_exact(result)


def _require_exact(result: dict[str, Any]) -> None:
    """An error that is no number is as wrong as a large one."""
    from fedex_lora.exactness.algebra import failed
    from fedex_lora.offline.verify import EXACT_BELOW

    error = result["max_relative_error"]
    if error is not None and (failed(error) or (result["exact_method"] and not error <= EXACT_BELOW)):
        fail(f"error: the result is off by {error:.1e}, and method {result['method']} is not: do not use {result['out']}", 1)


def _print_errors(console: Any, result: dict[str, Any]) -> None:
    if result["max_relative_error"] is None:
        console.print("the error was not measured")
        return
    how = " (estimated on 32 random directions; --audit exact, or `verify`, computes it)" if result["error_estimated"] else ""
    console.print(
        f"relative error against the fp64 ideal: {result['max_relative_error']:.1e}; plain averaging is off by "
        f"{result['deviation']:.1%}{how}",
        highlight=False,
    )


def _print_places(console: Any, result: dict[str, Any], out: Path) -> None:
    train = (
        f"to train on: {result.get('for_parties', out / 'trainable')}{'' if 'for_parties' in result else ' with base_delta.safetensors'}"
    )
    if result["adapter"]:
        console.print(f"stand-alone adapter: {out / 'adapter'}   {train}", highlight=False)
        return
    console.print(train, highlight=False)
    console.print("no stand-alone adapter: at rank k r it would be larger than the matrices; `export --as adapter --rank R` cuts one")


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
    base: Annotated[Optional[str], typer.Option(help="The base model: its own weights are compared too.")] = None,  # noqa: UP045
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
        _print_verified(consoles(False), result, modules, exact=why is None)
    if why:
        fail(f"error: {why}", 1)


def _print_verified(console: Any, result: dict[str, Any], modules: bool, exact: bool) -> None:
    """What was compared, and at last the one number."""
    from fedex_lora.cli.console import table
    from fedex_lora.offline.verify import EXACT_BELOW

    for row in result["rounds"]:
        title = f"{row['folder']} ({row['method']}, round {row['round']})"
        if not row["recomputed"]:
            said = "every file has its sum, and is finite; the ideal is not recomputed, because nobody's update is here"
            console.print(f"{title}: {said}", highlight=False)
        elif modules:
            rows = [[module, f"{error:.2e}"] for module, error in row["per_module"].items()]
            console.print(table(title, ["module", "relative error"], rows))
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
    source: Annotated[Path, typer.Argument(help="A run folder, a round folder, or the OUT of aggregate.")],
    form: Annotated[str, typer.Option("--as", help="merged, adapter or base+adapter.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write; must not exist or be empty.")],
    base: Annotated[Optional[str], typer.Option(help="The base model; by default as the folder says.")] = None,  # noqa: UP045
    rank: Annotated[Optional[int], typer.Option(help="adapter: cut it to this rank; the error is printed.")] = None,  # noqa: UP045
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the model for plain transformers, PEFT or vLLM. It is reloaded, and its logits compared with the run's."""
    from fedex_lora.client.training import silence_libraries
    from fedex_lora.models.export import export as export_here

    silence_libraries()
    result = export_here(source, form, out, base, rank)
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
    console.print(
        f"reloaded: logits within {result['output_error']:.1e} of the largest logit of the run's, "
        f"{result['change_error']:.1e} of what the update changes",
        highlight=False,
    )
    console.print(f"vLLM: {result['vllm']}", highlight=False)
