"""This machine: `doctor`."""

from contextlib import nullcontext

from fedex_lora.cli._shared import Debug, Json, app, consoles, one_line_errors, print_json


@app.command()
@one_line_errors
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what would go wrong on this machine. Versions, devices, precision, telemetry."""
    from fedex_lora.cli.doctor import examine

    console = consoles(as_json)
    with console.status("looking") if console.is_terminal else nullcontext():
        facts, problems = examine()
    if as_json:
        print_json({"facts": facts, "problems": problems})
    else:
        for name, value in facts.items():
            console.print(f"{name:24} {value}", highlight=False)
        for problem in problems:
            console.print(f"! {problem}", highlight=False)
        console.print("nothing would go wrong" if not problems else f"{len(problems)} to look at", highlight=False)
