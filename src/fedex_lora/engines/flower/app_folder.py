"""The app folder that `flwr run` takes: three small files and the run's configuration."""

import re
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fedex_lora import __version__
from fedex_lora.aggregation import get_method
from fedex_lora.config import Config, write_config
from fedex_lora.errors import UsageError
from fedex_lora.server.checks import require_epsilon
from fedex_lora.storage.files import write_text

FLOWER = "flwr>=1.41,<1.42"  # tested with 1.41.0
MODULE = "federation"
APPS = {
    "server_app.py": '"""The server."""\n\nfrom pathlib import Path\n\nfrom fedex_lora.engines.flower.server import server_app\n\n'
    'app = server_app(Path(__file__).with_name("config.toml"))\n',
    "client_app.py": '"""A party."""\n\nfrom pathlib import Path\n\nfrom fedex_lora.engines.flower.client import client_app\n\n'
    'app = client_app(Path(__file__).with_name("config.toml"))\n',
    "__init__.py": '"""A federation of fedex-lora."""\n',
}


def require_federated(config: Config, clients: Sequence[str]) -> None:
    """The method leaves rows where they are, and parties that hold rows of their own (`clients`) say themselves where.

    Raises:
        UsageError: else.
    """
    if clients and config.clients.data:
        raise UsageError("clients.data names files of one machine: remove it; each node names its own, by data= and train=")
    if get_method(config.method).centralised:
        raise UsageError(f"method {config.method} pools all rows in one place, so it has no federation: run it by fedex-lora run")


def write_app(folder: Path, config: Config, out: str, clients: list[str]) -> None:
    """Write an app folder.

    Args:
        folder: new, or empty.
        config: the run.
        out: the run folder, on the server's machine.
        clients: the parties that hold rows of their own; none: the configuration deals its rows.

    Raises:
        UsageError: the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty: give another folder, or remove it")
    require_federated(config, clients)
    require_epsilon(config)
    if len(set(clients)) < len(clients) or any('"' in client for client in clients):
        raise UsageError(f"clients {', '.join(clients)}: give each name once, without double quotes")
    if clients and config.task.needs_labels:
        raise UsageError("task.labels is not set: parties with rows of their own need all classes, so name them in the configuration")
    name = re.sub(r"[^a-z0-9-]+", "-", folder.absolute().name.lower()).strip("-") or MODULE
    project = {
        "project": {
            "name": name,
            "version": "1.0.0",
            "description": "A federation of fedex-lora",
            "license": "Apache-2.0",
            "dependencies": [f"fedex-lora=={__version__}", FLOWER],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedex-lora",
                    "components": {"serverapp": f"{MODULE}.server_app:app", "clientapp": f"{MODULE}.client_app:app"},
                    "config": {"out": out, "clients": ",".join(clients)},
                }
            }
        },
    }
    for file, text in APPS.items():
        write_text(folder / MODULE / file, text)
    write_text(folder / MODULE / "config.toml", write_config(config))
    write_text(folder / "pyproject.toml", tomli_w.dumps(project))
