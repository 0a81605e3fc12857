"""The clients' driver: protocol objects, what trains for them, and the files in which they are kept."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as states
from fedex_lora.client.client import Client, Model, Shared
from fedex_lora.client.received import NeedsFull, StoredAnswer, Train
from fedex_lora.config import Config, Privacy, Rules
from fedex_lora.errors import FedexLoraError, LacksError, PrivacyError, StorageError, UnreadableError
from fedex_lora.privacy.account import Account
from fedex_lora.protocol.failures import told_to_end
from fedex_lora.storage.adapter_folder import Format, write_adapter_folder
from fedex_lora.storage.files import write_bytes
from fedex_lora.storage.result import safe_name
from fedex_lora.types import Adapter, ClientUpdate, Delta, ServerState

FILE = "memory.safetensors"


class Learner(Model, Protocol):
    """One model on which clients train in turn.

    Attributes:
        folder: where they keep their files, in a folder each; set by whoever drives them.
    """

    folder: Path | None

    @property
    def first(self) -> Adapter:
        """The initial adapter: the same for everyone who has the configuration and the base."""

    @property
    def base(self) -> Mapping[str, Delta]:
        """What the frozen base has gained before the first round; as `first`."""

    @property
    def rows(self) -> Mapping[str, int]:
        """Client -> how many training rows it has, or states where it is private, of the clients that are here."""

    def measure(self, client: str) -> dict[str, float]:
        """The model as it stands on the client's held-out rows, as `held_out_NAME`; nothing where it has none, or is private."""

    def train(self, client: str, round: int, optimizer: Mapping[str, Any] | None) -> tuple[ClientUpdate, Mapping[str, Any] | None]:
        """Train the model as it stands: the update, and the optimiser's state.

        Raises:
            TrainingError: see `client.training.local_update`.
        """


class ClientPool:
    """Clients that train in turn on one learner: all of a federation in one process, or one alone on its own machine.

    Each knows what it was sent itself and nothing else, as on its own machine.

    Args:
        rules: of the run.
        learner: what trains.
        alone: nobody else on this machine knows what the client was sent, so its file holds its base delta too.
        accounts: client -> what it may spend by its ledger; of all clients, where training is private.

    Raises:
        PrivacyError: training is private, and accounts are missing.
    """

    def __init__(self, rules: Rules, learner: Learner, alone: bool = False, accounts: Mapping[str, Account] | None = None) -> None:
        self.learner, self.alone = learner, alone
        self._rules, self._shared, self.accounts = rules, Shared(), accounts or {}
        if isinstance(rules, Config) and rules.privacy.is_on and self.accounts.keys() != learner.rows.keys():
            raise PrivacyError("a private client has an account: give those of runs.private.accounts_of")
        if isinstance(rules, Config):  # privacy is this pool's, and none of its clients'
            self._rules = rules.model_copy(update={"privacy": Privacy()})
        self.clients = dict[str, Client]()
        self._folder: Path | None = None
        self._run = ""
        for name in learner.rows:
            self.forget(name)

    def remember_in(self, folder: Path, base_of: Callable[[int], Mapping[str, Delta] | None], run: str = "") -> None:
        """Keep the clients in `folder/CLIENT`, and take up those that are there.

        Args:
            folder: of this run.
            base_of: the server's base delta of a version, for files that do not hold it; None where it is gone.
            run: one word that no other run has, for the ledgers of private clients.

        Raises:
            StorageError: one of them is broken.
        """
        self._folder, self._run = folder, run
        self.learner.folder = folder
        for name in self.clients:
            if (path := self._path(name)).exists():
                self.clients[name] = self._forgetting(self._restored(path, name, base_of))

    def take_up(self, folder: Path, run: str = "") -> None:
        """What one party alone remembers, as `remember_in`; a file that is broken is set aside, and what it had is asked for anew.

        Raises:
            UnreadableError: it cannot be read now, and may be whole.
        """
        try:
            self.remember_in(folder, lambda version: {}, run)
        except UnreadableError:
            raise
        except StorageError:
            for path in map(self._path, self.clients):
                path.replace(path.with_name(f"{FILE}.broken"))

    def forget(self, name: str) -> None:
        """The client knows nothing any more, as one that begins anew."""
        self.clients[name] = Client(self._rules, name, self.learner.first, self._shared, self.learner.base)

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / safe_name(name) / FILE

    def _restored(self, path: Path, name: str, base_of: Callable[[int], Mapping[str, Delta] | None]) -> Client:
        try:
            learner = self.learner
            return Client.restore(path.read_bytes(), self._rules, name, learner.first, self._shared, base_of, learner.base)
        except OSError as error:
            raise UnreadableError(f"{path} cannot be read: {error.strerror}") from None
        except StorageError as error:
            raise type(error)(f"{path}: {error}") from None

    def _forgetting(self, client: Client) -> Client:
        """The client without its last answer, which its file has."""
        client.state = replace(client.state, reply=b"")
        return client

    def answer(self, name: str, payload: bytes) -> bytes:
        """What the client says to a message; to a round that it answered already, the same again.

        What a private client says was written into its ledger before.

        Raises:
            WireError: the message is wrong; a `LacksError` where the client does not have what it counts on.
            TrainingError: see `Learner.train`.
            PrivacyError: the client's ledger does not allow an answer, or its private training failed.
        """
        client, account = self.clients[name], self.accounts.get(name)
        work = client.receive(payload)
        if isinstance(work, NeedsFull):
            raise LacksError(work.reason)  # for this machine's user; what leaves is `work.reply`
        if isinstance(work, StoredAnswer):
            reply = work.reply or self._restored(self._path(name), name, lambda version: {}).state.reply
            if account:
                account.answered(self._run, client.state.round, reply)
            return reply
        if not isinstance(work, Train):
            client.load(self.learner)
            return client.reply(self.learner.rows[name], self.learner.measure(name))
        return self._privately(client, work, account) if account else self._trained(client, work)

    def _privately(self, client: Client, work: Train, account: Account) -> bytes:
        """Entry, training, the answer on the disk, "answered": whatever happens in between, the ledger says no less than what left."""
        if self._folder is None:
            raise PrivacyError(f"client {client.name} is private, and keeps its answers: call remember_in before")
        account.enter(self._run, work.round)
        try:
            reply = self._trained(client, work)
        except BaseException as error:  # of which one row may be the reason
            if told_to_end(error):
                raise
            with suppress(FedexLoraError):  # of a ledger that is broken or gone, by which there is no other round
                account.failed(self._run, work.round)
            raise PrivacyError(f"client {client.name}: {type(error).__name__}: {error}") from error
        try:
            account.answered(self._run, work.round, reply)
        except FedexLoraError as error:
            raise PrivacyError(f"client {client.name}: {error}") from error
        return reply

    def _trained(self, client: Client, work: Train) -> bytes:
        name, learner = client.name, self.learner
        client.load(learner)
        measured = learner.measure(name)
        update, moments = learner.train(name, work.round, work.moments)
        rows, metrics = update.num_examples, {**update.metrics, **measured}
        if name in self.accounts:
            rows, metrics = learner.rows[name], {}
        reply = client.reply(rows, metrics, moments, update)
        if self._folder:
            write_bytes(self._path(name), client.dump(whole=self.alone))
            self._forgetting(client)
        return reply

    def save_personal(self, state: ServerState, folder: Path, ranks: Mapping[str, int], format: Format) -> None:
        """Under a personalised method each client's model is its own: its adapter, as a PEFT folder, in `CLIENT/adapter`."""
        if get_method(state.method).exactness != "personalised":
            return
        for name, client in self.clients.items():
            kept = client.state.trained
            adapter, _ = states.start_of(state.method, state.adapter, ranks.get(name), kept[max(kept)] if kept else None)
            write_adapter_folder(folder / safe_name(name) / "adapter", adapter, state.other, format)
