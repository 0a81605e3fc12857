"""The NVFlare job of a federation: it holds names of classes and plain values, and no code. And NVFlare's simulator."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.job_config.api import FedJob
from pydantic import ValidationError

from fedex_lora.config import Rules
from fedex_lora.engines.nvflare.controller import FederationController
from fedex_lora.engines.nvflare.executor import PartyExecutor
from fedex_lora.errors import ConfigError, UsageError
from fedex_lora.server.checks import quorum, require_rules
from fedex_lora.storage.files import write_text

ALLOWED = "fedex_lora.engines.nvflare"  # what sites and server add to `class_allow_list` in their `local/resources.json`


def federation_job(
    name: str, start: str, clients: Sequence[str], rounds: int = 3, rules: Mapping[str, Any] | None = None, out: str | None = None
) -> FedJob:
    """A job: `simulate` tries it on this machine, its `export_job` writes it for `nvflare job submit`.

    Args:
        name: of the job.
        start, clients, rounds, rules, out: see `FederationController`.

    Raises:
        UsageError: rules or names that cannot work.

    Example:
        >>> job = federation_job("mine", "start", ["site-1", "site-2"], rounds=2)        # doctest: +SKIP
        >>> simulate(job, "workspace", ["site-1", "site-2"])                             # doctest: +SKIP
    """
    try:
        given = Rules.model_validate(rules or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"rules: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if not clients or len(set(clients)) < len(clients) or rounds < 1:
        raise UsageError(f"a federation has sites, each named once, and rounds: {', '.join(clients) or 'no sites'}, {rounds} rounds")
    require_rules(given, len(clients), False)
    job = FedJob(name=name, min_clients=quorum(given, len(clients)))
    job.set_app_packages(["fedex_lora"])  # it is installed everywhere, and its files are not copied into the job
    plain = given.model_dump(mode="json", exclude_defaults=True)
    job.to_server(FederationController(start, clients, rounds, plain, out))
    job.to_clients(PartyExecutor(plain))
    return job


def simulate(job: FedJob, workspace: str | Path, clients: Sequence[str], log_config: str = "concise") -> int:
    """Run a job in NVFlare's simulator, each site in a process of its own. Returns its exit status.

    Args:
        job: see `federation_job`.
        workspace: a folder that NVFlare empties first.
        clients: the sites.
        log_config: NVFlare's word for how much it says.
    """
    folder = Path(workspace).absolute() / "local"
    folder.mkdir(parents=True, exist_ok=True)
    allowed = {"format_version": 2, "class_allow_list": [*DEFAULT_CLASS_ALLOW_LIST, ALLOWED]}
    write_text(folder / "resources.json", json.dumps(allowed, indent=1) + "\n")
    return int(job.simulator_run(str(folder.parent), clients=list(clients), threads=len(clients), log_config=log_config))
