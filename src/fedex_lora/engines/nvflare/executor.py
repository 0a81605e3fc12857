"""NVFlare's executor around `Client`: bytes in, bytes out; what a party remembers is in its file before its answer leaves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import SystemConfigs
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.fuel.utils.config_service import ConfigService

from fedex_lora.engines.nvflare._exchange import PAYLOAD
from fedex_lora.engines.nvflare._party import ScriptLearner, party_of, rules_of
from fedex_lora.errors import StorageError, WireError
from fedex_lora.protocol.envelopes import REQUEST, answer_of, envelope_of
from fedex_lora.protocol.failures import failure_of, told_to_end
from fedex_lora.protocol.records import Request
from fedex_lora.runs.clients import ClientPool
from fedex_lora.runs.party_log import left, log_failure, party_log
from fedex_lora.storage.result import safe_name

FOLDER = "fedex_lora_folder"


class PartyExecutor(Executor):
    """One party of a federation. Whatever fails, a code leaves and no text; the text is in `party.log`, which NVFlare does not know.

    What the site says of itself, in its environment or its `local/resources.json` (the job has no say in it):
    `NVFLARE_FEDEX_LORA_PARTY`, the function that trains; `NVFLARE_FEDEX_LORA_FOLDER`, where it keeps what it remembers, by default
    `fedex-lora` in NVFlare's workspace.

    Args:
        rules: as the controller's.
    """

    def __init__(self, rules: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.rules = dict(rules or {})
        self._made: ScriptLearner | None = None

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """The answer to a message, from the site that NVFlare has authenticated."""
        name, payload = fl_ctx.get_identity_name(), shareable.get(PAYLOAD)
        own = ConfigService.get_str_var(FOLDER, conf=SystemConfigs.RESOURCES_CONF, default="")
        folder = Path(own or f"{fl_ctx.get_engine().get_workspace().get_root_dir()}/fedex-lora")
        log = party_log(folder)
        try:
            answer = self._answer(name, payload, folder)
            left(log, answer, name, payload)
        except BaseException as error:  # a panic of a library is no Exception, nor is an exit of the party's own code
            if told_to_end(error):
                raise
            failure = failure_of(error)
            log_failure(log, error, failure, name)
            answer = answer_of(payload if isinstance(payload, bytes) else b"", name, failure)
        return Shareable({PAYLOAD: answer})

    def _answer(self, name: str, payload: object, folder: Path) -> bytes:
        """The bytes of this party's update.

        Raises:
            FedexLoraError: the message is for somebody else or wrong; what trains is not there, or failed.
        """
        if not isinstance(payload, bytes):
            raise WireError("the server's message is not of this protocol: use one version of fedex-lora everywhere")
        run = folder / safe_name(envelope_of(payload, Request, REQUEST)[0].run)
        if self._made is None:
            self._made = party_of(name)
        try:
            (run / safe_name(name)).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"this site cannot keep its state in {run}: {error.strerror}: set {FOLDER}") from None
        pool = ClientPool(rules_of(self.rules), self._made, alone=True)
        pool.take_up(run)
        return pool.answer(name, payload)
