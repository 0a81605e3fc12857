"""The ledger by itself: what is written survives, what is broken is refused, and no number of processes spends more than the budget."""

import json
import multiprocessing
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.errors import FedexLoraError, PrivacyError, StorageError, UsageError
from fedex_lora.privacy.account import Account, rows_digest, spendings
from fedex_lora.privacy.accounting import Mechanism, PrivacyPlan, spent
from fedex_lora.privacy.ledger import Answered, FailedRound, LedgerEntry, TrainedAgain, begin_ledger, parse_ledger, read_ledger

DELTA = 1e-5


def account(path, client="north", budget=3.0, rounds=5, sigma=2.0, rows="digest", others=(), task=""):
    plan = PrivacyPlan(Mechanism(sigma, 0.1, 10), rounds, 10, 1.0, 100, 20.0, DELTA)
    return Account(path, client, plan, budget, "rdp", rows, frozenset(others), task)


@pytest.fixture
def ledger(tmp_path):
    begin_ledger(tmp_path / "ledger")
    return tmp_path / "ledger"


def epsilon(path):
    return spent([line.mechanism for line in read_ledger(path) if isinstance(line, LedgerEntry)], DELTA, "rdp")


def test_it_begins_once_and_only_for_its_user(ledger):
    with pytest.raises(UsageError, match="is there already"):
        begin_ledger(ledger)
    assert read_ledger(ledger) == []
    assert ledger.stat().st_mode & 0o077 == 0


def test_without_a_ledger_nothing_is_trained(tmp_path):
    for act in (lambda: account(tmp_path / "none").enter("run", 1), lambda: read_ledger(tmp_path / "none")):
        with pytest.raises(PrivacyError, match=r"fedex-lora ledger .*none --begin"):
            act()
    assert not (tmp_path / "none").exists()


def test_a_round_is_entered_once_and_charged_to_all_runs(ledger):
    one = account(ledger)
    one.enter("first", 1)
    one.enter("first", 1)  # killed before its answer: the same entry
    assert [type(line) for line in read_ledger(ledger)] == [LedgerEntry, TrainedAgain]
    one.answered("first", 1, b"answer")
    one.answered("first", 1, b"answer")
    one.enter("second", 1)
    assert [type(line) for line in read_ledger(ledger)] == [LedgerEntry, TrainedAgain, Answered, LedgerEntry]
    assert one.standing().epsilon == epsilon(ledger) == spent([one.plan.round] * 2, DELTA, "rdp")
    for number in (0, 1):
        with pytest.raises(PrivacyError, match="a second release"):
            one.enter("first", number)


def test_of_two_processes_in_one_round_one_answers(ledger):
    """Both found its entry, each in a state folder of its own; the answer that stays is no stored one, either."""
    one, other = account(ledger), account(ledger)
    for each in (one, other):
        each.enter("run", 1)
    one.answered("run", 1, b"one answer")
    for _ in range(2):
        with pytest.raises(PrivacyError, match="another process answered round 1 of run run meanwhile"):
            other.answered("run", 1, b"another answer")
    one.answered("run", 1, b"one answer")  # sent again
    assert [type(line) for line in read_ledger(ledger)] == [LedgerEntry, TrainedAgain, Answered]


def test_of_two_processes_whoever_fails_ends_the_entry(ledger):
    """What the other one makes of it is no longer nobody's knowledge."""
    one, other = account(ledger, budget=50.0), account(ledger, budget=50.0)
    for each in (one, other):
        each.enter("run", 1)
    one.failed("run", 1)
    with pytest.raises(PrivacyError, match="no open entry"):
        other.answered("run", 1, b"answer")
    other.failed("run", 1)
    assert [type(line) for line in read_ledger(ledger)] == [LedgerEntry, TrainedAgain, FailedRound, LedgerEntry, FailedRound]


def test_who_is_stopped_again_and_again_pays_at_last(ledger, monkeypatch):
    """Whether a process dies may depend on rows; and what cannot be written lets nobody train."""
    one = account(ledger, budget=50.0)
    for _ in range(6):
        one.enter("run", 1)
    assert [type(line) for line in read_ledger(ledger)] == [LedgerEntry, *[TrainedAgain] * 4, LedgerEntry]
    monkeypatch.setattr(os, "write", lambda *_: 0)
    with pytest.raises(StorageError):
        one.enter("run", 1)


def test_the_last_time_that_is_free_can_answer(ledger):
    one = account(ledger)
    for _ in range(5):
        one.enter("run", 1)
    for _ in range(2):  # it is asked for again
        one.answered("run", 1, b"an answer")
    assert [type(line) for line in read_ledger(ledger)] == [LedgerEntry, *[TrainedAgain] * 4, Answered]


def test_another_task_is_another_question(ledger):
    """Whether a round fails is an answer of a kind, so it is charged."""
    for task in ("one", "other", "other"):
        account(ledger, task=task).enter("run", 1)
    assert [line.task for line in read_ledger(ledger) if isinstance(line, LedgerEntry)] == ["one", "other"]


def test_a_round_with_other_noise_has_an_entry_of_its_own(ledger):
    """Nothing left under the first one, and yet it counts: never less than what was released."""
    account(ledger).enter("run", 1)
    account(ledger, sigma=3.0).enter("run", 1)
    assert [line.sigma for line in read_ledger(ledger)] == [2.0, 3.0]


def test_the_budget_is_of_all_runs_and_of_one_party(ledger):
    """One client's entries are another's unless they are known to be of other rows."""
    budget = spent([account(ledger).plan.round] * 2, DELTA, "rdp")
    for number in (1, 2):
        account(ledger, budget=budget).enter(f"run {number}", 1)
    with pytest.raises(PrivacyError, match=r"run third epsilon would be .* and its budget is .* \(2 rounds before it"):
        account(ledger, budget=budget).enter("third", 1)
    with pytest.raises(PrivacyError, match="its rows are spent"):
        account(ledger, "south", budget).enter("third", 1)
    with pytest.raises(PrivacyError, match="its rows are spent"):
        account(ledger, "south", budget, others={"another digest"}).enter("third", 1)
    account(ledger, "south", budget, rows="of the south", others={"digest"}).enter("third", 1)
    assert account(ledger, budget=budget).standing().paid == 0


def test_an_answer_without_its_entry_stays(ledger):
    with pytest.raises(PrivacyError, match="so its answer stays"):
        account(ledger).answered("run", 1, b"answer")
    account(ledger).enter("run", 1)
    ledger.unlink()
    with pytest.raises(StorageError, match="cannot be read: embedded null"):
        read_ledger(ledger.with_name("a\0b"))
    with pytest.raises(PrivacyError, match="there is no ledger"):
        account(ledger).answered("run", 1, b"answer")
    begin_ledger(ledger)  # another one in its place
    with pytest.raises(PrivacyError, match="so its answer stays"):
        account(ledger).answered("run", 1, b"answer")


def test_a_last_line_that_lacks_its_end_counts(ledger):
    """An editor cuts it; what it says was spent."""
    one = account(ledger)
    one.enter("run", 1)
    one.answered("run", 1, b"answer")
    whole = ledger.read_bytes()
    ledger.write_bytes(whole[:-1])
    assert len(read_ledger(ledger)) == 2
    with pytest.raises(PrivacyError, match="a second release"):
        one.enter("run", 1)
    one.enter("run", 2)
    assert ledger.read_bytes().startswith(whole)
    assert len(read_ledger(ledger)) == 3


def test_an_entry_whose_training_failed_is_spent(ledger):
    """Whoever was told that it failed had an answer; one that was killed said nothing."""
    one = account(ledger, budget=50.0)
    for _ in range(2):
        one.enter("run", 1)
    one.failed("run", 1)
    one.enter("run", 1)
    assert [type(line) for line in read_ledger(ledger)] == [LedgerEntry, TrainedAgain, FailedRound, LedgerEntry]
    assert one.standing().epsilon == spent([one.plan.round] * 2, DELTA, "rdp")


def test_a_run_spends_no_more_than_its_epsilon(ledger):
    """Whatever the budget: rounds beyond its last one, and those that failed, are no way to spend more."""
    one = account(ledger, budget=50.0)
    one = replace(one, plan=replace(one.plan, epsilon=spent([one.plan.round] * 5, DELTA, "rdp")))
    for round in (1, 2, 3, 4, 5):
        one.enter("run", round)
        one.answered("run", round, b"answer")
    with pytest.raises(PrivacyError, match="with round 6 of 5"):
        one.enter("run", 6)
    for round in (1, 2, 2, 3, 4):
        one.enter("other", round)
        one.failed("other", round) if round == 2 else one.answered("other", round, b"answer")
    with pytest.raises(PrivacyError, match="that failed"):
        one.enter("other", 5)
    one.enter("another", 1)
    standing = one.standing("other")
    assert (standing.ahead, standing.paid, standing.failed) == (1, 0, True)


def test_a_torn_last_line_is_dropped_wherever_it_is_torn(ledger):
    account(ledger).enter("run", 1)
    whole = ledger.read_bytes()
    account(ledger).enter("run", 2)
    longer = ledger.read_bytes()
    for cut in range(len(whole), len(longer) - 1):
        ledger.write_bytes(longer[:cut])
        assert len(read_ledger(ledger)) == 1
    account(ledger).enter("run", 2)
    assert [line.round for line in read_ledger(ledger)] == [1, 2]
    assert ledger.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text.replace('"sigma"', '"sigmb"', 1), "line 2 is none of a ledger"),
        (lambda text: text.replace('"steps":10', '"steps":-10', 1), "line 2 is none of a ledger"),
        (lambda text: text.replace('"sigma":2.0', '"sigma":NaN', 1), "line 2 is none of a ledger"),
        (lambda text: text.replace("\n", "\n\n", 1), "line 2 is none of a ledger"),
        (lambda text: text + "garbage\n", "line 4 is none of a ledger"),
        (lambda text: text.partition("\n")[2], "line 1 does not follow"),
        (lambda text: "".join(text.splitlines(True)[::2]), "line 2 does not follow"),
        (lambda text: text * 2, "line 4 does not follow"),
        (lambda text: "", "is no ledger"),
        (lambda text: "{}\n", "is no ledger: give another path"),
    ],
)
def test_a_ledger_that_is_broken_is_refused_and_left(ledger, spoil, words):
    account(ledger).enter("run", 1)
    account(ledger).answered("run", 1, b"answer")
    ledger.write_text(spoil(ledger.read_text()))
    before = ledger.read_bytes()
    one = account(ledger)
    for act in (lambda: read_ledger(ledger), lambda: one.enter("run", 2), lambda: one.answered("run", 1, b"answer")):
        with pytest.raises(StorageError, match=words) as caught:
            act()
        assert "\n" not in str(caught.value)
    assert ledger.read_bytes() == before


def test_a_line_that_cannot_be_synced_is_not_there(ledger, monkeypatch):
    """Else a second try would find it, and train, though no disk has it."""

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    before = ledger.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="No space left"):
            account(ledger).enter("run", 1)
    assert ledger.read_bytes() == before


def spend(path, number, budget):
    for round in range(1, 30):
        try:
            account(path, budget=budget, rounds=30).enter(f"run {number}", round)
            account(path, budget=budget, rounds=30).answered(f"run {number}", round, b"answer")
        except FedexLoraError:
            os._exit(3)


def test_processes_at_once_spend_no_more_than_one_would(ledger):
    """One of them is killed on the way."""
    budget = spent([account(ledger).plan.round] * 12, DELTA, "rdp")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=spend, args=(ledger, number, budget)) for number in range(4)]
    for process in processes:
        process.start()
    while len(read_ledger(ledger)) < 2:
        pass
    processes[0].kill()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes[1:]] == [3, 3, 3]
    entries = [line for line in read_ledger(ledger) if isinstance(line, LedgerEntry)]
    assert len(entries) == len({line.question for line in entries}) == 12
    assert epsilon(ledger) <= budget


def test_a_digest_is_of_the_records_and_not_of_their_order():
    rows = [{"text": f"bed {number}", "label": 1.5} for number in range(5)]
    assert rows_digest(rows) == rows_digest(rows[::-1]) != rows_digest([*rows[:4], {**rows[4], "text": "bed 9"}])
    assert rows_digest([{"image": b"x"}]) != rows_digest([{"image": b"y"}])


def test_the_table(ledger):
    for client, run, round in (("north", "a", 1), ("north", "a", 2), ("north", "[b]", 1), ("south", "a", 1)):
        account(ledger, client, 100).enter(run, round)
    account(ledger, "north", 100).answered("a", 1, b"answer")
    listed = spendings(parse_ledger(ledger.read_bytes(), "x"), DELTA, "rdp")
    assert [(one.client, one.run, one.rounds, one.answered, one.steps) for one in listed] == [
        ("north", "a", 2, 1, 20),
        ("north", "[b]", 1, 0, 10),
        ("south", "a", 1, 0, 10),
        ("north", "", 3, 1, 30),
        ("south", "", 1, 0, 10),
        ("", "", 4, 1, 40),
    ]
    assert listed[3].epsilon == spent([Mechanism(2.0, 0.1, 30)], DELTA, "rdp")
    done = CliRunner().invoke(app, ["ledger", str(ledger), "--accountant", "rdp", "--json"])
    said = json.loads(done.stdout)
    assert [one["epsilon"] for one in said["spent"]] == [one.epsilon for one in listed]
    shown = CliRunner().invoke(app, ["ledger", str(ledger), "--accountant", "rdp"]).stdout
    assert "[b]" in shown
    assert "if one party" in shown.splitlines()[-1]
    assert f"{listed[3].epsilon:.3f}" in shown


def test_the_command_begins_and_refuses(tmp_path):
    path = str(tmp_path / "new")
    missing = CliRunner().invoke(app, ["ledger", path])
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    nowhere = CliRunner().invoke(app, ["ledger", str(tmp_path / "no" / "such"), "--begin"])
    assert "there is no folder" in nowhere.stderr
    assert "give the path of a ledger" in CliRunner().invoke(app, ["ledger", str(tmp_path)]).stderr.replace("\n", " ")
    assert "--begin" in missing.stderr
    assert "is begun" in CliRunner().invoke(app, ["ledger", path, "--begin"]).stdout
    assert CliRunner().invoke(app, ["ledger", path, "--begin"]).exit_code == 2
    assert "nothing was trained" in CliRunner().invoke(app, ["ledger", path]).stdout
    assert CliRunner().invoke(app, ["ledger", path, "--delta", "2"]).exit_code == 2
