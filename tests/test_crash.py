"""The short form of `make crash`: a few kills and failing writes, in a run of three rounds."""

from tests.crash import campaign


def test_killed_runs_end_in_the_same_bits():
    done = campaign(kills=4, faults=3, seed=1, rounds=3, tell=lambda line: None)
    assert done["kills at an instant"] + done["kills at an operation"] + done["failed operations"] >= 7
    assert done["runs"] >= 1
