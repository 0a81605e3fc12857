"""One deployment for all tests of a process: a SuperLink with TLS, three SuperNodes with registered keys.

Every test starts runs of its own on it, and leaves all nodes running. Nodes have workers, which import the libraries once; without one a
node imports them for every message, seven seconds, so of `cold_federation` one node does.
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
        return out, self.deployment.finish(identity, seconds)

    def reference(self, config):
        """The same run in one process, which nobody disturbs."""
        key = config.model_dump_json()
        if key not in self._references:
            out = self.root / f"reference-{len(self._references)}"
            run(config, out, lambda event: None)
            self._references[key] = out
        return self._references[key]

    def memory(self, client, out):
        """The file in which a client remembers a run."""
        name = (out / "run-id").read_text().strip()
        return self.root / "state" / client / name / client / "memory.safetensors"

    def restart(self, client, worker=True):
        """Start a client's node again, as a supervisor does, until Flower takes it: one that was killed counts as alive for a minute."""
        deployment = self.deployment
        deployment.node_config[client].pop("worker", None)
        if worker:
            self.warm(client)
        before = deployment.log(client).count("SuperNode ID")
        deployment.start_node(client)

        def taken():
            if deployment.processes[client].poll() is not None:
                deployment.stop(client)
                deployment.start_node(client)
            return deployment.log(client).count("SuperNode ID") > before

        wait_for(taken, pause=3)

    def warm(self, *clients):
        """Let nodes that start from now on have a worker."""
        sockets = {client: self.root / f"{client}.sock" for client in clients}
        for client, socket in sockets.items():
            self.deployment.node_config[client]["worker"] = str(socket)
            if f"worker-{client}" not in self.deployment.processes:
                self.deployment.start(f"worker-{client}", [sys.executable, "-m", "fedex_lora.cli", "flower", "worker", str(socket)])
        wait_for(lambda: all(socket.exists() for socket in sockets.values()))

    def having(self, client, worker):
        """Itself, with a node that has a worker, or has none."""
        if ("worker" in self.deployment.node_config[client]) != worker:
            self.deployment.stop(client)
            self.restart(client, worker)
        return self


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
def deployed(tmp_path_factory):
    root = tmp_path_factory.mktemp("flower")
    settings = {client: {"rows": "dealt"} | ({"worker": str(root / f"{client}.sock")} if client in WARM else {}) for client in CLIENTS}
    with local_deployment(root, CLIENTS, settings) as deployment:
        made = Federation(deployment, root)
        made.warm(*WARM)
        yield made
        logs = {path.name: path.read_text(errors="replace") for path in Path(root / "logs").iterdir()}
        assert not [name for name, text in logs.items() if "telemetry.flower.ai" in text or "uv sync took" in text]


@pytest.fixture
def federation(deployed):
    return deployed.having(COLD, worker=True)


@pytest.fixture
def cold_federation(deployed):
    return deployed.having(COLD, worker=False)
