"""NVFlare's controller around `Server`: rounds, what becomes of answers, and a folder from which a job that is started again goes on."""

import json
import uuid
from collections.abc import Mapping, Sequence
from logging import WARNING
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal

from fedex_lora.aggregation.flatten import flatten_adapter, scalings_of
from fedex_lora.config import Rules
from fedex_lora.config.run import ADMISSION
from fedex_lora.engines.nvflare._exchange import TaskExchange
from fedex_lora.engines.nvflare._party import rules_of
from fedex_lora.errors import FedexLoraError, StorageError, UsageError
from fedex_lora.protocol.dumps import tensors_digest
from fedex_lora.runs.emit import Emit, log_line
from fedex_lora.runs.listening import Exchange
from fedex_lora.runs.round_loop import gather, hand_on, skip_or_stop
from fedex_lora.server.result import save_result
from fedex_lora.server.server import Server
from fedex_lora.server.verdicts import Short
from fedex_lora.storage.adapter_folder import AdapterFolder, read_adapter_folder
from fedex_lora.storage.events import Event
from fedex_lora.storage.files import ROUNDS, write_bytes, write_text
from fedex_lora.storage.run_folder import barely_begun, locked, remove, round_folder, run_rounds_of

DUMP, FEDERATION = "server.dump", "federation.json"  # files of the folder: the server between two rounds, and whose rounds they are


class FederationController(Controller):
    """The server of a federation.

    Args:
        start: the PEFT adapter folder from which all begin, on the server's machine; the server needs no model.
        clients: the sites' names.
        rounds: how many.
        rules: as `Rules(**rules)`, in plain values.
        out: the folder of rounds, dumps and the final model; a job with the same goes on with it. By default one in the job's own folder.
    """

    def __init__(
        self, start: str, clients: Sequence[str], rounds: int = 3, rules: Mapping[str, Any] | None = None, out: str | None = None
    ) -> None:
        super().__init__()
        self.start, self.clients, self.rounds, self.rules, self.out = start, list(clients), rounds, dict(rules or {}), out

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is begun before the sites are there."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Everything that is to be kept was written when its round ended."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """All rounds; an error ends the job with its one line."""
        engine = fl_ctx.get_engine()
        run_dir = Path(engine.get_workspace().get_run_dir(fl_ctx.get_job_id()))
        folder = Path(self.out).absolute() if self.out else run_dir / "federation"

        def tell(event: Event) -> None:
            if line := log_line(event):
                (self.log_warning if line[0] == WARNING else self.log_info)(fl_ctx, line[1])

        for site in sorted({client.name for client in engine.get_clients()} - set(self.clients)):
            self.log_warning(fl_ctx, f"site {site} has a part in the job and none in the federation: it is asked nothing")
        try:
            rules, start = rules_of(self.rules), read_adapter_folder(Path(self.start))
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder):
                server = self._server(folder, rules, start)
                exchange = TaskExchange(self, fl_ctx, abort_signal, rules.clients.late == "next")
                while server.state.round < self.rounds:
                    self._one_round(folder, server, exchange, tell, start, fl_ctx)
                if not (closed := run_rounds_of(folder)):
                    raise UsageError("every round was skipped, so nothing was trained")
                hand_on(folder, int(closed[0].name))
            self.log_info(fl_ctx, f"final model: {folder}   check it: fedex-lora verify {folder}")
        except FedexLoraError as error:
            self.system_panic(str(error), fl_ctx)

    def _server(self, folder: Path, rules: Rules, start: AdapterFolder) -> Server:
        """The server before the first round, or after the last one that is whole.

        Raises:
            UsageError: the folder is another federation's.
        """
        run = self._run_of(folder, rules, start)
        if (folder / DUMP).exists():
            return Server.restore((folder / DUMP).read_bytes(), rules, self.clients, run=run)
        return Server.start(rules, start.adapter, start.other, self.clients, run)

    def _run_of(self, folder: Path, rules: Rules, start: AdapterFolder) -> str:
        """What the clients know the run by, once the folder is this federation's: the same start, rules and sites, however many rounds."""
        mine = {
            "start": tensors_digest(
                flatten_adapter("", start.adapter) | start.other | dict(start.format.frozen), json.dumps(scalings_of(start.adapter))
            ),
            "clients": sorted(self.clients),
            "rules": rules.model_dump(mode="json", exclude=ADMISSION),
        }
        if not (path := folder / FEDERATION).exists():
            if not barely_begun(folder):
                raise UsageError(f"{folder} holds something else than a federation: give another out")
            run = f"{folder.name}-{uuid.uuid4().hex[:12]}"
            write_text(path, json.dumps({"run": run, **mine}, indent=1) + "\n")
            return run
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            run, other = str(theirs["run"]), [key for key, value in mine.items() if theirs[key] != value]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} cannot be read ({type(error).__name__}): give another out") from None
        if other:
            raise UsageError(f"{folder} has rounds of a federation with other {' and '.join(other)}: give another out, or the same again")
        return run

    def _one_round(self, folder: Path, server: Server, exchange: Exchange, tell: Emit, start: AdapterFolder, fl_ctx: FLContext) -> None:
        """One round: its result folder is whole before the dump that says so is there."""
        round = server.open_round()
        got = gather(round, exchange, server.rules, tell)
        if isinstance(got.ready, Short):
            skip_or_stop(round, got.ready, server.rules, tell)
        else:
            result = round.close(got.updates)
            error = "" if result.exactness is None else f": exactness error {result.exactness.max_relative_error:.1e}"
            self.log_info(fl_ctx, f"round {round.number} done{error}; {got.down / 1e6:.2f} MB down, {got.up / 1e6:.2f} MB up")
            if round_folder(folder, round.number).exists():  # killed before the dump
                remove(folder, f"{ROUNDS}/{round.number:04d}")
            save_result(round_folder(folder, round.number), result, start.format)
        write_bytes(folder / DUMP, server.dump())
