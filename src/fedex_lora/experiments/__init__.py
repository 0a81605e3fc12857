"""Methods compared, and the paper's tables reproduced."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(a line, how many runs are done, how many there are)."""


def silent(line: str, done: int, total: int) -> None:
    """Nobody is told."""
