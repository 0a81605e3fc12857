"""What a server makes of the bytes that came from a client, and of a round's updates together: records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from fedex_lora.server.norm_filter import Size
from fedex_lora.types import ClientUpdate


@dataclass(frozen=True, eq=False)
class _Verdict:
    """Attributes: the client, and the round that it answers."""

    client: str
    round: int


@dataclass(frozen=True, eq=False)
class Accepted(_Verdict):
    """A valid update of the round that is going on. The caller keeps it for `Round.close`."""

    update: ClientUpdate


@dataclass(frozen=True, eq=False)
class Late(Accepted):
    """A valid update of the round before, which may be part of this round's mean."""


@dataclass(frozen=True, eq=False)
class Rejected(_Verdict):
    """What came is no part of a mean, and why: one line of at most 500 characters, safe to print."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", " ".join(self.reason.split())[:500])


@dataclass(frozen=True, eq=False)
class Failed(Rejected):
    """The client says that it has no update, or the transport that it is gone.

    Attributes:
        hopeless: the run's configuration is at fault, so it will fail whenever it is asked.
        code: why, as the client said it (a key of `protocol.failures.WORDS`: "memory", "diverged"); "" of one that is gone.
    """

    hopeless: bool = False
    code: str = ""


@dataclass(frozen=True, eq=False)
class NeedsFull(Rejected):
    """The client does not have what its message counts on: see `Round.ask_again`."""


@dataclass(frozen=True, eq=False)
class Ignored(Rejected):
    """A second answer of this client, or an answer to something that was not asked: it changes nothing."""


Verdict: TypeAlias = Accepted | Late | Rejected | Failed | NeedsFull | Ignored


class Receipt(NamedTuple):
    """What a round remembers of a valid update, whose tensors are the caller's; `base` names the model that it trained."""

    num_examples: int
    metrics: Mapping[str, float]
    size: Size
    base: str = ""


@dataclass(frozen=True)
class Complete:
    """Enough updates are there.

    Attributes:
        clients: whose updates `close` is to get, in their order.
        late: who of them answered the round before.
        rejected: valid updates that are far larger than the others', or of another base.
    """

    clients: Sequence[str]
    late: frozenset[str] = frozenset()
    rejected: Sequence[Rejected] = ()


@dataclass(frozen=True)
class Short:
    """Too few updates are there.

    Attributes:
        reason: who is missing and why.
        clients: whose updates count so far.
        hopeless: so many clients blame the run's configuration that asking again is of no use.
        rejected: see `Complete`.
    """

    reason: str
    clients: Sequence[str] = ()
    hopeless: bool = False
    rejected: Sequence[Rejected] = ()
