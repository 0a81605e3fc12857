"""The short form of `make crash`: a few kills and failing writes, in a run of three rounds."""

import pytest
from tests.crash import campaign, sweep

pytestmark = pytest.mark.campaign


def test_killed_runs_end_in_the_same_bits():
    done = campaign(kills=4, faults=3, seed=1, rounds=3, tell=lambda line: None)
    assert done["kills at an instant"] + done["kills at an operation"] + done["failed operations"] >= 7
    assert done["runs"] >= 1


def test_a_failing_operation_stops_the_run_with_one_line_and_it_goes_on():
    """Every 40th of them; all with `make crash`."""
    done = sweep(rounds=1, step=40, first=3, tell=lambda line: None)
    assert done["stops"] >= 1
