"""How the stand-alone adapter of a run grows, and from when on the merged model is the smaller one."""

import math
from collections.abc import Mapping
from itertools import count
from typing import NamedTuple

from fedex_lora.types import Adapter, Delta, LowRank

SERVED = 512  # the largest rank that vLLM takes


class Growth(NamedTuple):
    """Ranks of the adapter that holds all of the update, `[s B, U] [A; V]`.

    Attributes:
        rank: now; in the largest of its modules, as are the others.
        own: of the adapter that is trained.
        by: ranks that a round adds; 0 where the base gains nothing, or keeps what it gained as matrices.
        merged_from: the first round after which the merged model has fewer numbers; None: that never comes.
        unserved_from: the first round after which the rank is above what vLLM takes; None as before.
        before: ranks that the base had gained before the run.
        rounds: that the run has seen.
        bound: what it is at most, where the base keeps what it gained as matrices; 0 where it does not.
    """

    rank: int
    own: int
    by: int
    merged_from: int | None = None
    unserved_from: int | None = None
    before: int = 0
    rounds: int = 0
    bound: int = 0

    def line(self) -> str:
        """In words."""
        words = f"as one adapter it has {'at most ' if self.bound == self.rank else ''}rank {self.rank}"
        if not self.by:
            return (
                f"{words}, at most {self.bound} after more rounds"
                if self.bound > self.rank
                else f"{words}, which more rounds leave as it is"
            )
        parts = self.own + self.before + self.by * self.rounds
        most = "" if parts == self.rank else "up to "
        start = f"{self.before} of its start, " if self.before else ""
        words += f": {self.own}, {start}and {most}{self.by} a round" if parts >= self.rank else f", and {most}{self.by} more a round"
        words += f"; from round {self.merged_from} on the merged model is smaller (--as merged)" if self.merged_from else ""
        return words + (f"; from round {self.unserved_from} on vLLM takes it merged only" if self.unserved_from else "")


def growth(
    adapter: Adapter, base_delta: Mapping[str, Delta], round: int, numbers: int, before: int = 0, written: int | None = None
) -> Growth:
    """Of a state after some rounds, with as many participants in those to come.

    Args:
        adapter, base_delta: of the state.
        round: how many rounds it has seen.
        numbers: of the merged model, all parameters together.
        before: ranks that the base had gained before the first round.
        written: the rank of the adapter as it is written; None: matrices that the base keeps whole count as of full rank.

    Example:
        >>> import torch
        >>> from fedex_lora.types import LoRAPair, LowRank
        >>> pair, delta = LoRAPair(torch.zeros(8, 100), torch.zeros(100, 8)), LowRank(torch.zeros(100, 32), torch.zeros(32, 100))
        >>> growth({"q": pair}, {"q": delta}, round=2, numbers=16_000).line()
        'as one adapter it has rank 40: 8, and 16 a round; from round 5 on the merged model is smaller (--as merged)'
    """
    own = max((pair.rank for pair in adapter.values()), default=0)
    gained = {module: delta.rank if isinstance(delta, LowRank) else min(delta.shape) for module, delta in base_delta.items()}
    ranks = {module: pair.rank + gained.get(module, 0) for module, pair in adapter.items()}
    growing = [delta.rank - before for delta in base_delta.values() if isinstance(delta, LowRank)]
    by = math.ceil(max(growing, default=0) / max(round, 1))
    most = max(ranks.values(), default=0)
    rank = most if written is None else written
    whole = len(base_delta) > len(growing) and (written is None or most > rank)
    if by <= 0:
        return Growth(rank, own, 0, bound=most if whole else 0)

    def size(rounds: int) -> int:
        """Numbers of the adapter after so many rounds more; a product needs no more ranks than its smaller side has."""
        return sum(min(ranks[name] + rounds * by, min(pair.shape)) * sum(pair.shape) for name, pair in adapter.items())

    widest = max(min(pair.shape) for pair in adapter.values())
    full = math.ceil(widest / by)
    merged = next(more for more in count() if size(more) > numbers or more > full)
    unserved = max(0, math.ceil((SERVED + 1 - rank) / by))
    return Growth(
        rank,
        own,
        by,
        None if size(merged) <= numbers else round + merged,
        None if widest <= SERVED or rank + unserved * by > widest else round + unserved,
        before,
        round,
        most if whole else 0,
    )
