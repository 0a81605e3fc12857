"""`doctor`: facts about this machine and installation, and problems."""

import os
import platform
import shutil
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from fedex_lora.cli._shared import Debug, Json, app, consoles, one_line_errors, print_json
from fedex_lora.errors import counted, installed


@app.command()
@one_line_errors
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what would go wrong on this machine. Versions, devices, precision, telemetry."""
    console = consoles(as_json)
    with console.status("looking") if console.is_terminal else nullcontext():
        facts, problems = examine()
    if as_json:
        print_json({"facts": facts, "problems": problems})
        return
    for line in [*(f"{name:24} {value}" for name, value in facts.items()), *(f"! {problem}" for problem in problems)]:
        console.print(line, highlight=False)
    console.print(counted(len(problems), "problem") if problems else "no problems found", highlight=False)


def examine() -> tuple[dict[str, str], list[str]]:
    """(facts, problems), both in words."""
    found, problems = installed()
    facts = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", **found}
    for name, use in (("bitsandbytes", "base.quantization"), ("pillow", "images")):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = f"not installed ({use} would need it)"
    flower, complaints = _flower()
    facts, problems = facts | flower, problems + complaints
    facts |= _devices()
    facts["hub"] = "offline (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online if the network allows"
    facts["hub telemetry"] = (
        "off" if os.environ.get("HF_HUB_DISABLE_TELEMETRY") == "1" else "on unless HF_HUB_DISABLE_TELEMETRY=1 (runs switch it off)"
    )
    free = shutil.disk_usage(".").free
    facts["free disk here"] = f"{free / 1e9:.1f} GB"
    if free < 2e9:
        problems.append("less than 2 GB of disk are free here: give --out on another disk")
    error = _exactness_here()
    facts["exactness here"] = f"{error:.1e} relative error of a test aggregation"
    if not error <= 1e-6:
        problems.append(f"a test aggregation is off by {error:.1e}: this build of torch computes fp32 with less than fp32 (TF32?)")
    return facts, problems


def _flower() -> tuple[dict[str, str], list[str]]:
    """Its version, what it tells others, and whether a SuperLink of this machine can be reached from outside."""
    from packaging.requirements import Requirement

    try:
        found = version("flwr")
    except PackageNotFoundError:
        return {"flwr": "not installed (the extra `flower`: runs between organisations)"}, []
    facts, problems = {"flwr": found}, []
    for wanted in map(Requirement, requires("fedex-lora") or []):
        if wanted.name == "flwr" and "flower" in str(wanted.marker) and not wanted.specifier.contains(found):
            problems.append(f"flwr {found} does not satisfy {wanted.specifier}: pip install '.[flower]'")
    off = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    on = [f"{name}={value}" for name, value in off.items() if os.environ.get(name) != value]
    facts["flwr telemetry, update checks"] = "off" if not on else f"on unless {' '.join(on)} (flower try switches them off)"
    for words in commands_of_this_machine("flower-superlink"):
        problems += superlink_problems(words)
    return facts, problems


def superlink_problems(words: list[str]) -> list[str]:
    """What is unsafe about a command line of `flower-superlink`."""
    problems = []
    if (host := _option(words, "--host", "127.0.0.1")) not in ("127.0.0.1", "localhost", "::1"):
        problems.append(
            f"a SuperLink listens on {host}: whoever reaches it can submit code to every node: give it --host 127.0.0.1, and let "
            "nodes in by a proxy (docs/deployment.md)"
        )
    if "--enable-supernode-auth" not in words and "--simulation" not in words:
        problems.append("a SuperLink takes any node: start it with --enable-supernode-auth and register keys (docs/deployment.md)")
    if "--disable-runtime-dependency-installation" not in words:
        problems.append("a SuperLink fetches packages at every run: start it with --disable-runtime-dependency-installation")
    return problems


def commands_of_this_machine(name: str) -> list[list[str]]:
    """The command lines of running processes whose program has this name."""
    import psutil

    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in lines if any(Path(word).name == name for word in words[:2])]


def _option(words: list[str], name: str, default: str) -> str:
    given = [
        word.partition("=")[2] or following for word, following in zip(words, [*words[1:], ""], strict=True) if word.split("=")[0] == name
    ]
    return given[-1] if given else default


def _devices() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return {
            "device": names if count < 2 else f"the first of {names} (see CUDA_VISIBLE_DEVICES)",
            "bf16": str(torch.cuda.is_bf16_supported()),
            "tf32 matmul": str(torch.backends.cuda.matmul.allow_tf32),
        }
    if torch.backends.mps.is_available():
        return {"device": "cpu (the Apple GPU is not used)"}
    return {
        "device": f"cpu, {torch.get_num_threads()} threads",
        "bf16": f"in software or AVX512 ({torch.backends.cpu.get_cpu_capability()})",
    }


def _exactness_here() -> float:
    """The relative error of one small aggregation on this machine, against fp64."""
    import torch

    from fedex_lora.aggregation import server_state as server
    from fedex_lora.exactness import measure
    from fedex_lora.types import ClientUpdate, LoRAPair

    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(0)

    def pair() -> LoRAPair:
        draw = [torch.randn(*shape, generator=generator, device=device) for shape in ((8, 96), (64, 8))]
        return LoRAPair(A=draw[0], B=draw[1], scaling=2.0)

    before = server.init({"m": pair()}, {})
    updates = [ClientUpdate(f"c{index}", {"m": pair()}, index + 1) for index in range(3)]
    after, result = server.step(before, updates)
    return measure.audit(before, updates, result.weights, after).max_relative_error
