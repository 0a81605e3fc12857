"""Private runs, whatever trains in them: kills, servers that try for a second release, and what the bytes of a private party hold.

Released is what left: each answer is written down, and synced, before the server has it.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from tests.messages import retold, told

import fedex_lora
from fedex_lora.client.client import Client
from fedex_lora.config import parse_config
from fedex_lora.errors import ConfigError, FedexLoraError, PrivacyError, UsageError
from fedex_lora.privacy.account import Account
from fedex_lora.privacy.accounting import privacy_plan, spent
from fedex_lora.privacy.ledger import Answered, LedgerEntry, begin_ledger, read_ledger
from fedex_lora.protocol.failures import Failure
from fedex_lora.runs import clients as pools
from fedex_lora.runs import learner as learners
from fedex_lora.runs.clients import ClientPool
from fedex_lora.runs.private import accounts_of, require_paid
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.server import Server
from fedex_lora.storage.events import PartyFailed, RunDone, Warned, of_kind, read_events

FORK = multiprocessing.get_context("fork")
NAMES = ("bone", "chest", "skin")
DELTA = 1e-3


def setting(folder, **changes):
    """Three clients of 12 rows each, who state 20."""
    tree = {
        "method": "ffa",
        "rounds": 2,
        "torch_threads": 1,
        "base": {"model": "demo"},
        "lora": {"r": 2, "alpha": 8, "target_modules": ["q_proj"]},
        "task": {"name": "demo", "train_rows": 36, "eval_rows": 9},
        "clients": {"partition": "column", "column": "hospital"},
        "training": {"learning_rate": 5e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4},
        "privacy": {"epsilon": 8, "delta": DELTA, "rows": 20, "ledger": str(folder / "ledger"), "accountant": "rdp"},
    }
    for table, values in changes.items():
        tree[table] = {**tree[table], **values} if isinstance(values, dict) else values
    return parse_config(tree)


@pytest.fixture
def ledger(tmp_path):
    begin_ledger(tmp_path / "ledger")
    return tmp_path / "ledger"


def ignore(event):
    pass


def entries(path):
    return [line for line in read_ledger(path) if isinstance(line, LedgerEntry)]


def answered(path):
    return {line.question for line in read_ledger(path) if isinstance(line, Answered)}


def epsilon(path, client):
    """Of all that a client's entries say."""
    return spent([line.mechanism for line in entries(path) if line.client == client], DELTA, "rdp")


# ---- kills


class Sent:
    """A record of everything that left: a line of a file for each answer."""

    def __init__(self, path):
        self.path = path

    def add(self, name, reply):
        said = told(reply)
        line = {"client": name, "round": said["round"], "phase": said["phase"], "body": said["body"]}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def released(self):
        """(client, round) -> the bodies that were sent, of what was trained."""
        found = {}
        for line in map(json.loads, self.path.read_text().splitlines() if self.path.exists() else ()):
            if line["phase"] == "train":
                found.setdefault((line["client"], line["round"]), set()).add(line["body"])
        return found


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def meddled(holder, name, client, before=None, after=None):
    """Replace a function by one that does something for a client, before it or after it."""
    original = getattr(holder, name)

    def changed(*args, **options):
        mine = any(client in (getattr(arg, "client", None), arg) or (isinstance(arg, Path) and client in arg.parts) for arg in args)
        if before and mine:
            before()
        result = original(*args, **options)
        if after and mine:
            after()
        return result

    setattr(holder, name, changed)


def torn_entry(client):
    """Killed with half of an entry's line on the disk."""
    original = os.write

    def write(descriptor, data):
        if b'"entry"' in data and client.encode() in data:
            original(descriptor, data[: len(data) // 2])
            kill()
        return original(descriptor, data)

    os.write = write


STEPS = {
    "before the entry": lambda client: meddled(Account, "enter", client, before=kill),
    "in the entry": torn_entry,
    "after the entry": lambda client: meddled(Account, "enter", client, after=kill),
    "in training": None,
    "after training": lambda client: meddled(learners, "local_update", client, after=kill),
    "before the answer is kept": lambda client: meddled(pools, "write_bytes", client, before=kill),
    "before the answer is in its place": lambda client: meddled(Path, "replace", client, before=kill),
    "after the answer is kept": lambda client: meddled(pools, "write_bytes", client, after=kill),
    "before it is answered": lambda client: meddled(Account, "answered", client, before=kill),
    "before it is sent": lambda client: meddled(Account, "answered", client, after=kill),
    "after it is sent": lambda client: meddled(Sent, "add", client, after=kill),
}
"""Where a round of a client is killed."""


def attempt(config, out, sent, step, client):
    """In a process of its own, which is killed, or ends with 0: finished; 4: an answer left that the ledger does not have."""
    answer = ClientPool.answer

    def recorded(pool, name, payload):
        reply = answer(pool, name, payload)
        said = told(reply)
        if said["phase"] == "train" and not any(question[::2] == (name, said["round"]) for question in answered(config.privacy.ledger)):
            os._exit(4)
        sent.add(name, reply)
        return reply

    def steps(event):
        if step == "in training" and getattr(event, "client", "") == client and getattr(event, "step", 0) == 2:
            kill()

    ClientPool.answer = recorded
    if step and STEPS[step]:
        STEPS[step](client)
    run(config, out, steps, resume=True)
    os._exit(0)


def child(*args):
    process = FORK.Process(target=attempt, args=args)
    process.start()
    process.join()
    return process.exitcode


def test_a_kill_at_each_step_leaves_a_ledger_that_says_no_less_than_what_was_released(ledger, tmp_path):
    """One run, killed once at each step, by the clients in turn, and resumed: each round of a client leaves once, under one entry."""
    config, sent, out = setting(tmp_path, rounds=4), Sent(tmp_path / "sent"), tmp_path / "run"
    privacy_plan(config, "bone")  # the children have it then
    for number, step in enumerate(STEPS):
        client, round = (NAMES[number % 3], number // 3 + 1) if number < 9 else ("skin", 3)  # whose answer is kept, and asked for again
        assert child(config, out, sent, step, client) == -signal.SIGKILL, step
        released, entered = sent.released(), Counter((line.client, line.round) for line in entries(ledger))
        said = {(name, number) for name, _, number in answered(ledger)}
        assert all(len(bodies) == 1 for bodies in released.values()), step
        assert released.keys() <= said <= entered.keys(), step
        where = [(client, round) in those for those in (entered, said, released)]
        assert where == [number > 1, number > 8, number > 9], step
    assert child(config, out, sent, None, "") == 0
    everything = {(client, round) for client in NAMES for round in range(1, 5)}
    assert sent.released().keys() == everything
    assert Counter((line.client, line.round) for line in entries(ledger)) == Counter(everything)
    for client in NAMES:
        assert epsilon(ledger, client) == privacy_plan(config, client).epsilon <= 8
    assert of_kind(read_events(out / "events.jsonl"), RunDone)
    run(config, out, ignore, resume=True)  # it is over, and nothing is left to pay for


def test_a_run_goes_on_without_a_client_whose_private_training_fails(ledger, tmp_path, monkeypatch):
    """Two of three are enough; what its row said stays in this console; the entry stays, and the next round has its own."""
    original, said = learners.local_update, []

    def update(model, client, round, *args, **options):
        if (client, round) == ("chest", 1):
            raise MemoryError("Quagmire has bed 4")
        return original(model, client, round, *args, **options)

    monkeypatch.setattr(learners, "local_update", update)
    run(setting(tmp_path, clients={"quorum": 0.6}), tmp_path / "run", said.append)
    assert [(event.client, "Quagmire" in event.message) for event in said if isinstance(event, PartyFailed)] == [("chest", True)]
    folder = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"Quagmire" not in folder
    assert b"or its private training failed: it says no more" in folder
    run_of = entries(ledger)[0].run
    assert {(client, run_of, round) for client in NAMES for round in (1, 2)} - answered(ledger) == {("chest", run_of, 1)}
    assert len(entries(ledger)) == 6


# ---- servers that try


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and what trains on it; each test has a pool and a ledger of its own."""
    folder = tmp_path_factory.mktemp("place")
    begin_ledger(folder / "ledger")
    return LocalSimulation(setting(folder), ignore)


def pool_of(place, folder, run="run", **changes):
    config = setting(folder, **changes)
    pool = ClientPool(config, place.pool.learner, alone=True, accounts=accounts_of(config, NAMES, {name: f"of {name}" for name in NAMES}))
    pool.remember_in(folder / run, lambda version: {}, run)
    return pool


def server_of(place, **changes):
    return Server(setting(Path(), **changes), place.initial(), NAMES, run="run")


def one_round(server, pool):
    round = server.open_round()
    answers = {name: pool.answer(name, message) for name, message in round.messages.items()}
    round.close([server.receive(name, answer).update for name, answer in answers.items()])
    return answers


def refused(pool, message, words, client="chest"):
    """Nothing is released, and nothing is entered."""
    before = read_ledger(pool.accounts[client].path)
    with pytest.raises(PrivacyError, match=words):
        pool.answer(client, message)
    assert read_ledger(pool.accounts[client].path) == before


def test_who_asks_twice_gets_the_same_bytes(ledger, place, tmp_path):
    pool, round = pool_of(place, tmp_path), server_of(place).open_round()
    answer = pool.answer("chest", round.messages["chest"])
    assert pool.answer("chest", round.messages["chest"]) == answer
    assert pool_of(place, tmp_path).answer("chest", round.messages["chest"]) == answer  # another process
    assert pool.answer("chest", round.ask_again(["chest"], full=True)["chest"]) == answer
    assert len(entries(ledger)) == len(answered(ledger)) == 1


def test_a_server_that_resets_its_round_or_tells_another_story_gets_nothing(ledger, place, tmp_path):
    pool, server = pool_of(place, tmp_path), server_of(place)
    last = None
    for _ in range(2):
        last = server.open_round().messages["chest"]
        one_round(server, pool)
    refused(pool, retold(last, run="another"), "answered round 2 of run run, and another answer to round 2 would be a second release")
    anew = server_of(place).open_round().ask_again(["chest"], full=True)["chest"]
    for message in (anew, retold(anew, history="another")):
        refused(pool, message, "another answer to round 1 would be a second release")
    third = server.open_round().ask_again(["chest"], full=True)["chest"]
    refused(pool, third, r"with round 3 of 2 run run would come to epsilon .*: begin a new run")
    assert len(entries(ledger)) == 6


def test_another_run_is_charged_to_the_same_budget(ledger, place, tmp_path):
    """And so is one of another seed, batch size or number of rounds: what counts is what was trained."""
    one_round(server_of(place), pool_of(place, tmp_path))
    one_round(server_of(place), pool_of(place, tmp_path, "other"))
    refused(pool_of(place, tmp_path, "third"), server_of(place).open_round().messages["chest"], "its rows are spent")
    assert epsilon(ledger, "chest") == privacy_plan(setting(tmp_path), "chest").epsilon


def test_another_process_in_the_same_round_answers_nothing(ledger, place, tmp_path):
    """Each has a state folder of its own and finds the entry; both train; and what the second has kept stays for ever."""
    message = server_of(place).open_round().messages["chest"]
    first, second = (pool_of(place, tmp_path, folder) for folder in ("a", "b"))
    for pool in (first, second):
        pool._run = "run"
    original, answers = Account.enter, []

    def meanwhile(account, run, round):
        original(account, run, round)
        if not answers:
            answers.append(b"")
            answers[0] = first.answer("chest", message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Account, "enter", meanwhile)
        for _ in range(2):
            with pytest.raises(PrivacyError, match="another process answered round 1"):
                second.answer("chest", message)
    assert first.answer("chest", message) == answers[0]
    assert len(entries(ledger)) == len(answered(ledger)) == 1


def test_another_deal_of_the_same_rows_is_charged_to_the_same_budget(ledger, tmp_path):
    """Clients of other names, and other numbers of them, hold the same rows; one of the same deal holds none of another's."""
    budget = spent([privacy_plan(setting(tmp_path, rounds=1), "client-0").round], DELTA, "rdp")

    def dealt_to(count, **changes):
        clients = {"partition": "iid", "column": None, "count": count}
        config = setting(tmp_path, rounds=1, clients=clients, privacy={"budget": budget}, **changes)
        return LocalSimulation(config, ignore).pool.accounts

    for account in dealt_to(2).values():
        account.enter("first", 1)
    for accounts in (dealt_to(6), dealt_to(2, seed=1)):
        for account in accounts.values():
            with pytest.raises(PrivacyError, match="its rows are spent"):
                account.enter("second", 1)
    assert len(entries(ledger)) == 2


def test_an_answer_that_is_gone_is_not_made_again(ledger, place, tmp_path):
    pool, server = pool_of(place, tmp_path), server_of(place)
    one_round(server, pool)
    shutil.rmtree(tmp_path / "run" / "chest")
    round = server_of(place).open_round()
    refused(pool_of(place, tmp_path), round.messages["chest"], "a second release")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "there is no ledger"),
        (lambda path: path.open("a").write("garbage\n"), "line 3 is none of a ledger"),
        (lambda path: (path.unlink(), begin_ledger(path)), "so its answer stays"),
    ],
    ids=["removed", "garbage", "begun anew"],
)
def test_a_ledger_that_is_lost_while_a_round_is_trained(spoil, words, ledger, place, tmp_path, monkeypatch):
    """The answer is kept, and stays, also when it is asked for again."""
    original = learners.local_update

    def update(*args, **options):
        spoil(ledger)
        return original(*args, **options)

    pool, message = pool_of(place, tmp_path), server_of(place).open_round().messages["chest"]
    monkeypatch.setattr(learners, "local_update", update)
    with pytest.raises(PrivacyError, match=words):
        pool.answer("chest", message)
    monkeypatch.undo()
    with pytest.raises(FedexLoraError, match=words) as caught:
        pool.answer("chest", message)
    assert Failure(caught.value.code).private.code == "privacy"


def test_an_evaluation_says_the_stated_number_and_no_more(ledger, place, tmp_path):
    round = server_of(place).open_round(phase="evaluate")
    said = told(pool_of(place, tmp_path).answer("chest", round.messages["chest"]))
    assert (said["phase"], said["num_examples"], said["metrics"]) == ("evaluate", 20, {})
    assert read_ledger(ledger) == []


def test_a_pool_without_accounts_does_not_train(place, tmp_path):
    with pytest.raises(PrivacyError, match="has an account"):
        ClientPool(place.host.place.config, place.pool.learner)
    with pytest.raises(PrivacyError, match=r"^privacy\.epsilon is set, and a Client of one's own trains plainly"):
        Client(place.host.place.config, "bone", place.pool.learner.first)


# ---- what is wrong before anything is written


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"privacy": {"ledger": "nowhere"}}, r"there is no ledger .*nowhere: .* fedex-lora ledger .*nowhere --begin"),
        ({"privacy": {"ledger": "pyproject.toml"}}, r"pyproject\.toml is no ledger: give another path"),
        ({"privacy": {"ledger": None}}, r"privacy\.ledger is not set"),
        ({"privacy": {"rows": None}}, "^clients bone, chest, skin: no number of rows is stated"),
        (
            {"privacy": {"rows": {"bone": 20, "chest": 20, "skim": 20}}},
            r"privacy\.rows\.skim is no client: did you mean skin\?; client skin: no number",
        ),
        ({"privacy": {"rows": {"bone": 3, "chest": 20, "skin": 20}}}, "^client bone: 3 rows are stated, and a batch has 4"),
        ({"privacy": {"delta": 0.05}}, r"^clients bone, chest, skin: privacy\.delta = 0\.05 is not below 1 / 20 rows"),
        ({"privacy": {"epsilon": 1e-6}}, r"privacy\.epsilon = 1e-06: no noise is enough for 10 steps"),
        (
            {"privacy": {"budget": 0.5}},
            r"^clients bone, chest, skin: epsilon 0 of the budget of 0\.5 .* 0 of the 2 rounds .*: the run alone spends 7.*, so raise",
        ),
        ({"privacy": {"ledger": None, "rows": 3, "delta": 0.5}}, "^clients bone, chest, skin: 3 rows .*ledger is not set"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(changes, words, ledger, tmp_path):
    if changes["privacy"].get("ledger") == "nowhere":
        changes = {"privacy": {"ledger": str(tmp_path / "nowhere")}}
    with pytest.raises(ConfigError, match=words) as caught:
        run(setting(tmp_path, **changes), tmp_path / "run", ignore)
    assert "\n" not in str(caught.value)
    assert caught.value.code == "privacy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger"]
    assert read_ledger(ledger) == []


def test_a_schedule_that_does_not_work_costs_no_epsilon(ledger, tmp_path):
    with pytest.raises(ConfigError, match=r"refused by transformers: .*num_decay_steps"):
        run(setting(tmp_path, training={"lr_scheduler_type": "warmup_stable_decay"}), tmp_path / "run", ignore)
    assert read_ledger(ledger) == []


def test_what_is_measured_is_not_what_is_trained_on(ledger, tmp_path):
    """Metrics are told without noise."""
    for name in ("a", "b", "other"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"bed {n}", "label": n % 2}) + "\n" for n in range(12)))
    task = {"name": "custom", "data": str(tmp_path), "train": "a.jsonl", "labels": ["0", "1"], "train_rows": None, "eval_rows": None}
    for clients in ({"count": 1}, {"data": {"north": "a.jsonl", "south": "b.jsonl"}}):
        for measured in ["a.jsonl", "./a.jsonl", *["b.jsonl"] * ("data" in clients)]:
            config = {
                **setting(tmp_path).model_dump(mode="json", exclude_none=True),
                "task": {**task, "eval": measured},
                "clients": clients,
            }
            if "data" in clients:
                config["task"].pop("train")
            with pytest.raises(ConfigError, match=r"task\.eval = '.*[ab]\.jsonl' has the rows to train on"):
                run(parse_config(config), tmp_path / "run", ignore)
            assert not (tmp_path / "run").exists()
    copied = config | {"task": {**task, "eval": "other.jsonl"}, "clients": {"count": 1}}
    with pytest.raises(ConfigError, match=r"^of the rows of task\.eval 12 are trained on"):
        run(parse_config(copied), tmp_path / "run", ignore)
    chats = [{"id": n, "messages": [{"role": "user", "content": f"bed {n}"}, {"role": "assistant", "content": "yes"}]} for n in range(12)]
    for name, first in (("chats", 0), ("copy", 100)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row | {"id": first + row["id"]}) + "\n" for row in chats))
    talk = {"name": "custom", "kind": "chat", "data": str(tmp_path), "train": "chats.jsonl", "eval": "copy.jsonl"}
    with pytest.raises(ConfigError, match=r"^of the rows of task\.eval 12 are trained on"):
        run(parse_config(copied | {"task": talk}), tmp_path / "run", ignore)
    table = pd.read_json(tmp_path / "a.jsonl", lines=True)
    unsaid = {key: value for key, value in copied.items() if key not in ("task", "clients")}
    kind = {"kind": "classification", "labels": ["0", "1"]}
    with pytest.raises(ConfigError, match="are trained on, and metrics are told without noise"):
        fedex_lora.run({**unsaid, "task": kind}, rows={"north": table}, eval=table, out=tmp_path / "run")


def test_classes_come_from_the_configuration(ledger, tmp_path):
    task = {"name": "custom", "train": "rows.csv", "eval": "rows.csv"}
    config = parse_config({**setting(tmp_path).model_dump(mode="json", exclude_none=True), "task": task, "clients": {}})
    with pytest.raises(ConfigError, match=r"^task\.labels is not set: name all classes there"):
        accounts_of(config, ["client-0"])


def test_two_clients_with_the_same_rows_are_refused_and_would_be_charged_for_each_other(ledger, tmp_path):
    """What one trains, the other's rows would pay for, too; other rows do not."""
    config = setting(tmp_path)
    run(config, tmp_path / "run", ignore)
    lines = read_ledger(ledger)
    held = {line.client: line.rows for line in lines if isinstance(line, LedgerEntry)}
    assert len(accounts_of(config, NAMES, held)["bone"].history(lines)) == config.rounds
    alike = [
        line.model_copy(update={"rows": held["bone"]}) if isinstance(line, LedgerEntry) and line.client == "chest" else line
        for line in lines
    ]
    bone = replace(accounts_of(config, NAMES, held)["bone"], others=frozenset({held["skin"]}))
    assert len(bone.history(alike)) == 2 * config.rounds
    with pytest.raises(ConfigError, match="clients bone, chest hold the same rows, so that each record would be paid for 2 times"):
        accounts_of(config, NAMES, held | {"chest": held["bone"]})


def test_two_files_with_the_same_rows_are_twins(ledger, tmp_path):
    """Of `[clients.data]`, each client's own: also of two files, and of one that both name."""
    texts = {name: "text,label\n" + "".join(f"{name} {number},red\n" for number in range(12)) for name in ("one", "two")}
    for name, text in {"a": texts["one"], "copy": texts["one"], "b": texts["two"]}.items():
        (tmp_path / f"{name}.csv").write_text(text)
    task = {"name": "custom", "kind": "causal-lm", "prompt": "{text}", "completion": " {label}", "train_rows": None, "eval_rows": None}
    for other in ("copy", "a", "b"):
        clients = {"partition": "iid", "column": None, "data": {"north": "a.csv", "south": f"{other}.csv"}}
        config = setting(tmp_path, task={**task, "data": str(tmp_path), "eval": "b.csv"}, clients=clients)
        with pytest.raises(ConfigError) as found:
            LocalSimulation(config, ignore)
        assert ("clients north, south hold the same rows" in str(found.value)) == (other != "b")


def test_a_budget_that_ends_before_the_run_is_said_and_a_run_that_it_began_goes_on(ledger, tmp_path):
    """Rounds that are entered already are not paid for again."""
    one = privacy_plan(setting(tmp_path), "bone").round
    budget, said = spent([one], DELTA, "rdp"), []
    config = setting(tmp_path, privacy={"budget": budget})
    with pytest.raises(FedexLoraError, match="its privacy does not allow an answer"):
        run(config, tmp_path / "run", said.append)
    assert "pays for 1 of the 2 rounds ahead" in next(event.message for event in said if isinstance(event, Warned))
    assert len(entries(ledger)) == len(answered(ledger)) == 3
    with pytest.raises(ConfigError, match=r"pays for 0 of the 1 rounds ahead .* so raise privacy\.budget$"):
        run(config, tmp_path / "run", ignore, resume=True)
    more = setting(tmp_path, privacy={"budget": 8})
    accounts = accounts_of(more, NAMES, {client.client: client.rows for client in entries(ledger)})
    assert require_paid(accounts, entries(ledger)[0].run) == []
    assert len(require_paid(accounts, "")) == 1  # a new run would not be paid to its end, which is said once
    assert all(client in require_paid(accounts, "")[0] for client in NAMES)
    with pytest.raises(UsageError, match="another configuration"):
        run(setting(tmp_path, privacy={"budget": 8, "clip_norm": 2.0}), tmp_path / "run", ignore, resume=True)
    begin_ledger(tmp_path / "new")
    with pytest.raises(ConfigError, match="new has no entry of this run, which has rounds: is it the right ledger"):
        run(setting(tmp_path, privacy={"budget": 8, "ledger": str(tmp_path / "new")}), tmp_path / "run", ignore, resume=True)
    moved = ledger.rename(tmp_path / "moved")
    run(setting(tmp_path, privacy={"budget": 8, "ledger": str(moved)}), tmp_path / "run", ignore, resume=True)
    assert len(entries(moved)) == len(answered(moved)) == 6


# ---- what the server's side has


def test_nothing_of_the_true_numbers_is_in_events_and_manifests(ledger, tmp_path):
    out = tmp_path / "run"
    run(setting(tmp_path), out, ignore)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert events[0]["train_rows"] == dict.fromkeys(NAMES, 20)
    for event in events:
        if event["event"] == "client_done":
            assert event.keys() == {"event", "time", "round", "client", "num_examples", "bytes_up"}
            assert event["num_examples"] == 20
    assert not [event for event in events if event["event"] == "held_out"]
    assert (events[-1]["event"], events[-1]["best_round"]) == ("run_done", None)
    assert all(metrics == {} for metrics in events[-1]["held_out"].values())
    said = [json.loads(path.read_text()) for path in out.rglob("manifest.json")]
    assert [count for one in said for count in re.findall(r'"num_examples": (\d+)', json.dumps(one))] == ["20"] * 6
    assert [one["train_rows"] for one in said if "train_rows" in one] == [dict.fromkeys(NAMES, 20)] * 2
