"""The NVFlare job of a federation: it holds names of classes and plain values, and no code. And NVFlare's simulator."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.job_config.api import FedJob

from fedex_lora.engines.nvflare._party import rules_of
from fedex_lora.engines.nvflare.controller import FederationController
from fedex_lora.engines.nvflare.executor import PartyExecutor
from fedex_lora.errors import UsageError
from fedex_lora.server.checks import quorum, require_rules
from fedex_lora.storage.adapter_folder import describe_adapter_folders
from fedex_lora.storage.files import write_text

MARK = "fedex-lora-simulation"  # the file of a workspace that says so, with the names of what NVFlare makes in it
ALLOWED = "fedex_lora.engines.nvflare"  # what sites and server add to `class_allow_list` in their `local/resources.json`


def federation_job(
    name: str, start: str, clients: Sequence[str], rounds: int = 3, rules: Mapping[str, Any] | None = None, out: str | None = None
) -> FedJob:
    """A job: `simulate` tries it on this machine, its `export_job` writes it for `nvflare job submit`.

    Args:
        name: of the job.
        start, out: see `FederationController`; a path that is not absolute is one of the folder in which this is called. A start that
            is absolute and not there is taken to be the server's.
        clients, rounds, rules: see `FederationController`.

    Raises:
        UsageError: rules or names that cannot work.
        StorageError, AdapterError: `start` is no adapter.

    Example:
        >>> import tempfile, torch
        >>> from peft import LoraConfig, get_peft_model
        >>> model, start = torch.nn.Sequential(torch.nn.Linear(8, 6)), f"{tempfile.mkdtemp()}/start"
        >>> get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).save_pretrained(start)
        >>> federation_job("mine", start, ["site-1", "site-2"], rounds=2).name
        'mine'
    """
    given, begin = rules_of(rules or {}), Path(start)
    if not clients or len(set(clients)) < len(clients) or rounds < 1:
        raise UsageError(f"a federation has sites, each named once, and rounds: {', '.join(clients) or 'no sites'}, {rounds} rounds")
    require_rules(given, len(clients), False)
    if begin.exists() or not begin.is_absolute():  # else it is on the server's machine alone
        describe_adapter_folders([begin])
    job = FedJob(name=name, min_clients=quorum(given, len(clients)))
    job.set_app_packages(["fedex_lora"])  # it is installed everywhere, and its files are not copied into the job
    plain = given.model_dump(mode="json", exclude_defaults=True)
    job.to_server(FederationController(str(begin.absolute()), clients, rounds, plain, str(Path(out).absolute()) if out else None))
    job.to_clients(PartyExecutor(plain))
    return job


def simulate(job: FedJob, workspace: str | Path, clients: Sequence[str], log_config: str = "concise") -> int:
    """Run a job in NVFlare's simulator, each site in a process of its own. Returns its exit status.

    Args:
        job: see `federation_job`.
        workspace: a new folder, or one of an earlier call, which NVFlare empties first.
        clients: the sites.
        log_config: NVFlare's word for how much it says.

    Raises:
        UsageError: the folder holds something else.
    """
    whole = Path(workspace).absolute()
    folder, mark = whole / "local", whole / "local" / MARK
    ours = {"local", "startup", "server", *clients, *(mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else [])}
    if whole.exists() and not whole.is_dir():
        raise UsageError(f"{whole} is a file: give another workspace")
    if whole.exists() and (names := {path.name for path in whole.iterdir()}) and not (mark.is_file() and names <= ours):
        raise UsageError(f"{whole} holds something else than a simulation, and NVFlare empties it: give another workspace")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(mark, "\n".join(sorted(ours)) + "\n")
    allowed = {"format_version": 2, "class_allow_list": [*DEFAULT_CLASS_ALLOW_LIST, ALLOWED]}
    write_text(folder / "resources.json", json.dumps(allowed, indent=1) + "\n")
    return int(job.simulator_run(str(whole), clients=list(clients), threads=len(clients), log_config=log_config))
