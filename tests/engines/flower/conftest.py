"""One deployment for all tests here: a SuperLink with TLS, three SuperNodes with registered keys.

One node starts a process for every message until a test restarts it, two have workers.
Every test starts runs of its own on it, and leaves all nodes running.
"""

import sys
import time
from pathlib import Path

import pytest

from fedex_lora.config import parse_config
from fedex_lora.engines.flower._local import local_deployment
from fedex_lora.engines.flower._trial import short_demo
from fedex_lora.engines.flower.app_folder import write_app
from fedex_lora.runs.run import run
from fedex_lora.storage.events import read_events

PATIENCE = 300.0  # seconds, for machines with other things to do
COLD, WARM = "bone", ("chest", "skin")
CLIENTS = [COLD, *WARM]


def configuration(rounds=2, **changes):
    tree = short_demo().model_dump(mode="json", exclude_none=True) | {"rounds": rounds}
    for table, values in changes.items():
        tree[table] = {**tree[table], **values}
    return parse_config(tree)


class Federation:
    """The deployment, and what tests do with it."""

    def __init__(self, deployment, root):
        self.deployment, self.root = deployment, root
        self._references = {}

    def submit(self, config, name, app=None):
        """Start a run of `config` into the run folder `name`; Flower's id of it, and the folder."""
        folder = self.root / f"app-{name}"
        if not folder.exists():
            write_app(folder, config, str(self.root / name), [])
        if app:
            app(folder)
        return self.deployment.submit(folder), self.root / name

    def finish(self, config, name, app=None, seconds=PATIENCE):
        """Run `config` to its end; the run folder, and Flower's words about the run."""
        identity, out = self.submit(config, name, app)
        return out, self.deployment.finish(identity, out, seconds)

    def reference(self, config):
        """The same run in one process, which nobody disturbs."""
        key = config.model_dump_json()
        if key not in self._references:
            out = self.root / f"reference-{len(self._references)}"
            run(config, out, lambda event, **fields: None)
            self._references[key] = out
        return self._references[key]

    def memory(self, client, out):
        """The file in which a client remembers a run."""
        name = (out / "run-id").read_text().strip()
        return self.root / "state" / client / name / client / "memory.safetensors"

    def restart(self, client):
        """Start a client's node again, as a supervisor does, until Flower takes it; from now on it has a worker."""
        self.warm(client)
        deployment = self.deployment
        before = deployment.log(client).count("SuperNode ID")
        deployment.start_node(client)

        def taken():
            if deployment.processes[client].poll() is not None:  # Flower still takes the node that was killed for alive
                deployment.stop(client)
                deployment.start_node(client)
            return deployment.log(client).count("SuperNode ID") > before

        wait_for(taken, pause=1)

    def warm(self, client):
        if f"worker-{client}" not in self.deployment.processes:
            socket = self.root / f"{client}.sock"
            self.deployment.node_config[client]["worker"] = str(socket)
            self.deployment.start(f"worker-{client}", [sys.executable, "-m", "fedex_lora.cli", "flower", "worker", str(socket)])
            wait_for(socket.exists)


def events(out, name):
    path = out / "events.jsonl"
    return [event for event in (read_events(path) if path.exists() else []) if event["event"] == name]


def wait_for(condition, seconds=PATIENCE, pause=0.1):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(pause)
    return value


@pytest.fixture(scope="session")
def federation(tmp_path_factory):
    root = tmp_path_factory.mktemp("flower")
    settings = {client: {"rows": "dealt"} | ({"worker": str(root / f"{client}.sock")} if client in WARM else {}) for client in CLIENTS}
    with local_deployment(root, CLIENTS, settings) as deployment:
        made = Federation(deployment, root)
        for client in WARM:
            made.warm(client)
        yield made
        logs = {path.name: path.read_text(errors="replace") for path in Path(root / "logs").iterdir()}
        assert not [name for name, text in logs.items() if "telemetry.flower.ai" in text or "uv sync took" in text]
