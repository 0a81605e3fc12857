"""The server of a federation as a protocol object: it gets bytes and gives bytes, and never reads, writes or waits."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedex_lora.aggregation.methods import get_method
from fedex_lora.aggregation.server_state import init
from fedex_lora.config import Rules
from fedex_lora.errors import UsageError
from fedex_lora.protocol.dumps import pack, unpack
from fedex_lora.protocol.frame import printable
from fedex_lora.server.checks import require_rules, sample
from fedex_lora.server.dump import server_state_of, server_table, unanswered_of, unanswered_table
from fedex_lora.server.registry import ClientRegistry, ServerContext, Unanswered
from fedex_lora.server.requests import Phase
from fedex_lora.server.round import Round
from fedex_lora.server.verdicts import Rejected, Verdict
from fedex_lora.types import Adapter, ServerState


class Server(ServerContext):
    """One run's server. UsageError where there are no clients, two have one name, or the rules need something that is not given.

    Args:
        rules: what server and clients agree on.
        state: from which it goes on: `aggregation.server_state.init`, or a later one.
        clients: the names of all clients.
        ranks: client -> its rank, where they differ.
        run: one word that no other run of these clients has.
        registry: who holds what; by default nobody anything.
        base: `AdaptedModel.base.name`, the base that all stand on; "": the one that most updates of the first mean name. An update of
            another base is rejected.

    Attributes:
        round: the one that was opened last; None before. For the others see `ServerContext`.

    Example:
        >>> import torch
        >>> from fedex_lora.client.client import Client
        >>> from fedex_lora.types import ClientUpdate, LoRAPair
        >>> rules, first = Rules(), {"q": LoRAPair(A=torch.randn(2, 6), B=torch.zeros(4, 2))}
        >>> server, updates = Server.start(rules, first, {}, ["a", "b"]), []
        >>> round = server.open_round()
        >>> for name, message in round.messages.items():
        ...     client = Client(rules, name, first)
        ...     work = client.receive(message)
        ...     trained = {"q": LoRAPair(A=work.start["q"].A, B=torch.randn(4, 2))}
        ...     answer = client.reply(10, {}, update=ClientUpdate(name, trained, 10))
        ...     updates.append(server.receive(name, answer).update)
        >>> result = round.close(updates)
        >>> result.state.round, result.exactness.max_relative_error < 1e-6
        (1, True)
    """

    def __init__(
        self,
        rules: Rules,
        state: ServerState,
        clients: Collection[str],
        ranks: Mapping[str, int] | None = None,
        run: str = "run",
        registry: ClientRegistry | None = None,
        base: str = "",
    ) -> None:
        if get_method(rules.method).core and not all("C" in pair.parts for pair in state.adapter.values()):
            raise UsageError(f"method {rules.method} trains cores between fixed factors: start from `AdaptedModel.cores()`")
        if rules.clients.ranks and not ranks:
            raise UsageError("clients.ranks is of a run's configuration: build Server(rules, state, clients, ranks={client: rank})")
        super().__init__(rules, [], dict(ranks or {}), run, state, registry or ClientRegistry(), base=base)
        self.round: Round | None = None
        self.set_clients(clients)

    @classmethod
    def start(
        cls, rules: Rules, adapter: Adapter, other: Mapping[str, Tensor], clients: Collection[str], run: str = "run", base: str = ""
    ) -> "Server":
        """The server before the first round.

        Args:
            rules, clients, run, base: see the class.
            adapter: the initial one, which every client has.
            other: the other trained tensors.

        Raises:
            UsageError: the method averages no adapters, `rules.clients.ranks` is set (see the class), or see `set_clients`.
        """
        method = get_method(rules.method)
        if method.centralised or (adapter and not method.lora):
            raise UsageError(f"method {rules.method} averages no adapters of several parties: use fedex or another one of docs/methods.md")
        return cls(rules, init(adapter, other, rules.method, rules.seed), clients, run=run, base=base)

    def set_clients(self, clients: Collection[str]) -> None:
        """Set the names of all clients, between two rounds. Who is not among them is gone for good; a new one is sent everything.

        Raises:
            UsageError: nobody is left, two have one name, or the rules do not go with them.
        """
        if not clients or isinstance(clients, str) or not all(clients) or len(set(clients)) < len(clients):
            raise UsageError("a server needs a list of clients, each under a name of its own")
        require_rules(self.rules, len(clients), bool(self.ranks))
        self.clients = sorted(clients)
        self.registry = self.registry.with_clients(self.clients)
        here = self.unanswered
        stay = {client: sent for client, sent in here.downloads.items() if client in self.clients}
        self.unanswered = Unanswered(stay, here.gained)
        personal = {client: own for client, own in self.state.personal.items() if client in self.clients}
        self.state = replace(self.state, personal=personal)

    def open_round(self, participants: Sequence[str] | None = None, phase: Phase = "train") -> Round:
        """Begin a round. A round that is still open is given up; the server keeps of it only who holds what.

        Args:
            participants: whom to ask; by default the share of the clients that `clients.fraction` says, drawn by the run's seed.
            phase: "evaluate" asks for numbers on the clients' own rows, of the model as it is; such a round is not closed.

        Raises:
            UsageError: participants that are none, or come twice, or are no clients.
        """
        if participants is None:
            participants = sample(self.clients, self.rules.clients.fraction, self.rules.seed, self.state.round + 1)
        if not participants or len(set(participants)) < len(participants) or not set(participants) <= set(self.clients):
            raise UsageError(f"a round asks some of {', '.join(self.clients)}, each once")
        if self.round is not None and not self.round.ended:
            self.round.leave()
        self.round = Round(self, phase, participants)
        return self.round

    def reopen(self, payload: bytes) -> Round:
        """Resume the round of this `dump`, on a server restored from the dump of the same moment.

        Raises:
            StorageError: it is no such dump.
        """
        self.round = Round.restore(self, payload)
        return self.round

    def receive(self, client: str, payload: bytes) -> Verdict:
        """Judge what came from a client, whom the transport has authenticated, as an answer to this round's message or the last round's.

        The caller keeps the update of an `Accepted` or `Late` verdict for `Round.close`.
        """
        if self.round is None or self.round.ended:
            return Rejected(printable(client), self.state.round, "no round is open")
        return self.round.receive(client, payload)

    def dump(self) -> bytes:
        """Everything that the server knows between two rounds; a round that is open has a dump of its own."""
        tensors, about = server_table(self.state, self.registry, whole=True)
        more, said = unanswered_table(self.unanswered)
        return pack("server", tensors | more, about | {"unanswered": said, "base": self.base})

    @classmethod
    def restore(
        cls, payload: bytes, rules: Rules, clients: Collection[str], ranks: Mapping[str, int] | None = None, run: str = "run"
    ) -> "Server":
        """The inverse of `dump`.

        Raises:
            StorageError: it is no such dump.
            UsageError: it is of another method.
        """
        tensors, about = unpack("server", payload)
        state, registry = server_state_of(tensors, about)
        if state.method != rules.method:
            raise UsageError(f"the dump is of method {state.method}, and the rules say {rules.method}: give those that it was made with")
        server = cls(rules, state, clients, ranks, run, registry, str(about.get("base", "")))
        server.unanswered = unanswered_of(tensors, about.get("unanswered", {}), state.method)
        server.set_clients(clients)  # of who was taken off since, no late answer counts
        return server
