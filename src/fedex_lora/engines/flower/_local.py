"""A real deployment on this machine: a SuperLink with TLS, SuperNodes with registered keys, each in processes of its own."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w

from fedex_lora.engines.flower._files import flower_environment
from fedex_lora.engines.flower._keys import make_certificates, make_node_key
from fedex_lora.engines.flower._register import listens
from fedex_lora.errors import FedexLoraError, TrainingError

CONNECTION = "local-deployment"  # in Flower's configuration file, which is in the deployment's folder
ENDED = ("finished:completed", "finished:failed", "finished:stopped")
_PORTS = (20_000 + (97 * os.getpid() + number) % 12_000 for number in itertools.count())


def free_port() -> int:
    """A TCP port of this machine that nobody has just now.

    It is below those that the system gives away by itself, and other processes begin elsewhere, so nobody takes it before it is used.
    """
    return next(port for port in _PORTS if _free(port))


def _free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


@dataclass
class LocalDeployment:
    """What runs, and where it logs: `folder/logs/NAME.log`. Used as `with local_deployment(...) as deployment`.

    Attributes:
        folder: of certificates, keys, logs, Flower's own files and clients' states.
        node_config: client -> more of its node's settings.
        port: of the SuperLink.
        processes: name -> its process, which leads a group of its own.
    """

    folder: Path
    node_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: Flower's own files in our folder, nothing told to anybody, our interpreter's commands first."""
        return {**flower_environment(), "FLWR_HOME": str(self.folder / "flwr"), "PYTHONUNBUFFERED": "1"}

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process that logs to `logs/NAME.log`."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.processes[name] = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=self.environment, start_new_session=True
            )

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM, patience: float = 10.0) -> None:
        """Stop a process and all that it started, as a machine stops when `how` is SIGKILL."""
        family = self.family(name)
        process = self.processes.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        if how != signal.SIGKILL:
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def family(self, name: str) -> list[psutil.Process]:
        """All that a process has started and that runs; Flower puts some of it into groups of its own."""
        with suppress(psutil.NoSuchProcess):
            return list(psutil.Process(self.processes[name].pid).children(recursive=True))
        return []

    def log(self, name: str) -> str:
        """What a process has said."""
        path = self.folder / "logs" / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def stop_all(self) -> None:
        """Stop every process that was started here."""
        for name in list(self.processes):
            self.stop(name)

    def connect(self, line: str) -> None:
        """Tell the `flwr` command where the SuperLink is, and how it is trusted."""
        home = self.folder / "flwr"
        home.mkdir(parents=True, exist_ok=True)
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{self.port}"\n{line}\n'
        (home / "config.toml").write_text(text, encoding="utf-8")

    def start_superlink(self, *options: str) -> None:
        """The server's process, by default `flower server`; with options a SuperLink of those. It is ready when this returns."""
        if options:
            place = ["--host", "127.0.0.1", "--port", str(self.port), "--disable-runtime-dependency-installation"]
            self.start("superlink", ["flower-superlink", *place, *options])
        else:
            files = {"ssl_certfile": "server.pem", "ssl_keyfile": "server.key", "ssl_ca_certfile": "ca.crt"}
            self.start("superlink", self._from_file("server", {"port": self.port, **files}))
        end = time.monotonic() + 90
        while not listens("127.0.0.1", self.port):
            if self.processes["superlink"].poll() is not None or time.monotonic() > end:
                said = self.log("superlink").strip()[-300:]
                raise TrainingError(f"the SuperLink does not listen (see {self.folder / 'logs' / 'superlink.log'}): {said}")
            time.sleep(0.2)

    def start_node(self, client: str, **options: str) -> None:
        """A party's process, `flower node`; `options` are of its file, and hold over what it has else."""
        link = {
            "superlink": f"127.0.0.1:{self.port}",
            "port": free_port(),
            "root_certificates": "ca.crt",
            "auth_supernode_private_key": client,
        }
        about = {"client": client, "state": str(self.folder / "state" / client), **self.node_config.get(client, {})}
        self.start(client, self._from_file("node", {**link, **about, **options}, client))

    def _from_file(self, kind: str, given: Mapping[str, Any], name: str = "server") -> list[str]:
        """The command that starts what a new file of this name, beside the keys, says."""
        file = self.folder / "keys" / f"{name}.{kind}.toml"
        file.write_text(tomli_w.dumps(given), encoding="utf-8")
        return [sys.executable, "-m", "fedex_lora.cli", "flower", kind, str(file)]

    def flwr(self, *words: str) -> dict[str, Any]:
        """What a `flwr` command says, as JSON.

        Raises:
            FedexLoraError: it fails.
        """
        command = ["flwr", *words, "--format", "json"]
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            raise FedexLoraError(f"flwr {words[0]} does not answer: is the SuperLink at work? See {self.folder / 'logs'}") from None
        try:
            result: dict[str, Any] = json.loads(done.stdout[done.stdout.find("{") :])
        except ValueError:
            result = {"success": False, "error-message": done.stderr or done.stdout}
        if done.returncode or not result.get("success", True):
            raise FedexLoraError(f"flwr {words[0]} failed: {' '.join(str(result.get('error-message')).split())[:300]}")
        return result

    def register(self, client: str) -> None:
        """Make the client's key if it has none, and let the server know it by its name."""
        key = self.folder / "keys" / client
        if not key.exists():
            make_node_key(key)
        self.flwr("supernode", "register", f"{key}.pub", CONNECTION, "--name", client)

    def submit(self, app: Path, *options: str) -> str:
        """Start a run of an app folder, with more options of `flwr run`; its id."""
        return str(self.flwr("run", str(app), CONNECTION, *options)["run-id"])

    def run_status(self, run: str) -> dict[str, Any]:
        """A run as `flwr ls` has it."""
        found = self.flwr("ls", CONNECTION, "--run-id", run)["runs"]
        return dict(found[0])

    def is_over(self, run: str) -> bool:
        """Does the SuperLink's log say that a run has ended? Asking `flwr` starts a process each time."""
        return re.search(rf"Finished task \d+ of run {run}\b", self.log("superlink")) is not None

    def finish(self, run: str, seconds: float) -> dict[str, Any]:
        """Wait for the end of a run.

        Raises:
            TrainingError: it failed, or took too long.
        """
        end, looked = time.monotonic() + seconds, time.monotonic()
        while not self.is_over(run):
            if time.monotonic() > end:
                raise TrainingError(f"run {run} has not ended after {seconds:g} seconds: see {self.folder / 'logs'}")
            if time.monotonic() - looked > 30:  # of an app that was killed the log says nothing
                looked = time.monotonic()
                if self.run_status(run)["status"] in ENDED:
                    break
            time.sleep(0.5)
        while (status := self.run_status(run))["status"] not in ENDED and time.monotonic() < end:
            time.sleep(1)
        if status["status"] != ENDED[0]:
            raise TrainingError(f"the run ended as {status['status']}: {status.get('status-details', '')}: see {self.folder / 'logs'}")
        return status


@contextmanager
def local_deployment(folder: Path, clients: Sequence[str], node_config: Mapping[str, Mapping[str, Any]]) -> Iterator[LocalDeployment]:
    """SuperLink with TLS and one registered SuperNode for each client; all of it is stopped at the end, whatever happened.

    Args:
        folder: see `LocalDeployment`.
        clients: names.
        node_config: client -> more of its node's settings.
    """
    deployment = LocalDeployment(folder, node_config)
    try:
        make_certificates(folder / "keys", ["localhost", "127.0.0.1"])
        deployment.connect(f'root-certificates = "{folder / "keys" / "ca.crt"}"')
        deployment.start_superlink()
        for client in clients:
            deployment.register(client)
            deployment.start_node(client)
        yield deployment
    finally:
        deployment.stop_all()
