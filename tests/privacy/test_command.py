"""`fedex-lora privacy`, and what a run says of itself: against the plan, the model that is really built, and the run's own Trainer."""

import json
import math
import re
import tomllib

import pytest
from tests.kinds import BASES
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import parse_config, read_config, write_config
from fedex_lora.errors import ConfigError
from fedex_lora.models.loading import load_base
from fedex_lora.models.lora import add_lora, read_model, set_trained, trainable_parameters
from fedex_lora.models.outline import outline
from fedex_lora.privacy.account import Account
from fedex_lora.privacy.accounting import privacy_plan, spent
from fedex_lora.privacy.ledger import begin_ledger
from fedex_lora.privacy.noise import noise_of_update
from fedex_lora.runs.privacy import factor_noise, noise_warning, plans_of, privacy_facts
from fedex_lora.runs.private import digests_of
from fedex_lora.server.checks import require_consistent
from fedex_lora.tasks.dealt import dealt

CONFIG = """
method = "fedex"
rounds = 3
[base]
model = "demo"
[task]
name = "demo"
[clients]
partition = "column"
column = "hospital"
[privacy]
epsilon = 3
rows = { chest = 360, bone = 400, skin = 300 }
accountant = "rdp"
[training]
per_device_train_batch_size = 30
num_train_epochs = 2
learning_rate = 5e-3
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run.toml").write_text(CONFIG)
    return tmp_path / "run.toml"


def config_of(**tables):
    given = {
        "base": {"model": "demo"},
        "task": {"name": "demo"},
        "rounds": 3,
        "training": {"per_device_train_batch_size": 30, "num_train_epochs": 2, "learning_rate": 5e-3},
        "privacy": {"epsilon": 3, "rows": {"chest": 360, "bone": 400, "skin": 300}, "accountant": "rdp"},
    }
    return parse_config(given | tables)


def ask(file, *words):
    done = CliRunner().invoke(app, ["privacy", str(file), *words])
    return done.exit_code, done.stdout, done.stderr


def test_what_the_command_says_is_the_plan(file):
    status, text, _ = ask(file, "--json")
    said = json.loads(text)
    assert status == 0
    for client, row in said["clients"].items():
        plan = privacy_plan(config_of(), client)
        assert (row["sigma"], row["epsilon"], row["rows"]) == (plan.round.sigma, plan.epsilon, plan.rows)
        assert row["steps"] == 3 * math.ceil(2 * plan.rows / 30)
        assert row["epsilon"] <= 3
        assert row["noise"] == pytest.approx(plan.round.sigma / 30 * math.sqrt(said["trained"]))
        sigmas = [said["allows"][client][epsilon]["sigma"] for epsilon in ("1", "3", "8")]
        assert sigmas == sorted(sigmas, reverse=True)
        assert sigmas[1] == plan.round.sigma
    assert "noise meets noise" in said["notes"][-1]


def test_it_reads_well(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text, _ = ask(file, "--set", "method=ffa", "--set", "privacy.rows=360")
    assert status == 0
    assert "each of 3" in text
    assert "noise meets noise" not in text
    begin_ledger(tmp_path / "ledger")
    status, text, _ = ask(file, "--set", "privacy.rows=360", "--set", "privacy.epsilon=1", "--set", "privacy.ledger=ledger")
    assert "noise meets noise" in text
    assert re.search(r"paid.* 3 of 3 ", text, re.DOTALL)
    assert {path.name for path in tmp_path.iterdir()} == {"run.toml", "ledger"}  # nothing else is left in the working folder


def test_before_anybody_asks_for_privacy(tmp_path):
    """Without an epsilon it says what the rows would allow."""
    (tmp_path / "run.toml").write_text(CONFIG.replace("epsilon = 3\n", ""))
    status, text, _ = ask(tmp_path / "run.toml")
    assert status == 0
    assert "this run is not private" in text
    assert "what the rows allow" in text


def test_privacy_without_epsilon_is_no_plain_run(tmp_path):
    """A line that is commented out, say; but the clip norm alone is what nodes take of a run."""
    (tmp_path / "run.toml").write_text(CONFIG.replace("epsilon = 3\n", ""))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert "[privacy] says rows, accountant and no epsilon" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    for key, value in (("delta", 1e-3), ("rows", 5), ("budget", 2), ("ledger", "ledger")):
        with pytest.raises(ConfigError, match=f"says {key} and no epsilon"):
            require_consistent(config_of(privacy={key: value}), 3)
    require_consistent(config_of(privacy={"clip_norm": 0.5}), 3)


def test_nothing_is_held_out_of_a_private_run():
    assert (config_of().clients.holdout, config_of(privacy={}).clients.holdout) == (0, 0.1)
    assert config_of(clients={"holdout": 0}).clients.holdout == 0
    assert tomllib.loads(write_config(config_of(clients={"count": 2})))["clients"]["holdout"] == 0


def test_what_is_left_of_the_budget(file, tmp_path):
    """By the ledger, of each client: rounds that were entered are charged to it, and to nobody else."""
    ledger = tmp_path / "ledger.jsonl"
    words = ("--set", f"privacy.ledger={ledger}", "--set", "privacy.budget=3.5", "--json")
    assert "spent" not in json.loads(ask(file, *words)[1])["clients"]["bone"]  # there is none yet
    begin_ledger(ledger)
    plan = privacy_plan(config_of(), "bone")
    rows = digests_of(*dealt(read_config(file)))
    for number in (1, 2):
        Account(ledger, "bone", plan, 3.5, "rdp", rows["bone"]).enter("earlier", number)
    clients = json.loads(ask(file, *words)[1])["clients"]
    used = plan.round._replace(steps=2 * plan.round.steps)
    assert clients["bone"]["spent"] == spent([used], 1e-5, "rdp")
    left = [count for count in range(4) if spent([used._replace(steps=(2 + count) * plan.round.steps)], 1e-5, "rdp") <= 3.5]
    assert clients["bone"]["rounds_paid"] == max(left) < 3
    assert (clients["chest"]["spent"], clients["chest"]["rounds_paid"]) == (0, 3)
    together = json.loads(ask(file, *words, "--set", "privacy.rows=400")[1])["clients"]["each of 3"]
    assert together["spent"] == clients["bone"]["spent"]  # of the one that has spent most
    Account(ledger, "client-0", plan, 3.5, "rdp", "another deal").enter("another", 1)  # of whose rows, nobody knows
    clients = json.loads(ask(file, *words)[1])["clients"]
    assert clients["chest"]["spent"] == spent([plan.round], 1e-5, "rdp")


def test_a_ledger_is_beside_the_file_that_names_it(file, tmp_path, monkeypatch):
    file.write_text(CONFIG.replace("epsilon = 3\n", 'epsilon = 3\nledger = "own.jsonl"\n'))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_config(file).privacy.ledger == tmp_path / "own.jsonl"
    assert read_config(file, ["privacy.ledger=mine.jsonl"]).privacy.ledger == tmp_path / "elsewhere" / "mine.jsonl"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "privacy.delta=0.01"), "client bone: privacy.delta = 0.01 is not below 1 / 400 rows"),
        (("--set", "privacy.rows=20"), "20 rows are stated, and a batch has 30"),
        (("--set", "privacy.rows={ chest = 20, bone = 20, skin = 300 }"), "clients bone, chest: 20 rows are stated"),
        (("--set", "privacy.rows=0"), "privacy.rows = 0: give a whole number from 1 up, or one for each client"),
        (("--set", "privacy.rows={ chest = 25.5 }"), "privacy.rows = {'chest': 25.5}: give a whole number"),
        (("--set", "clients.holdout=0.1"), "clients.holdout = 0.1 does not go with privacy.epsilon"),
        (("--set", "privacy.epsilon=1e-9"), "no noise is enough"),
        (("--set", "privacy.rows={ chest = 360 }"), "clients bone, skin: no number of rows is stated"),
    ],
)
def test_bad_input_is_one_line(file, words, said):
    status, _, line = ask(file, *words)
    assert status != 0
    assert said in line
    assert "constrained" not in line
    assert line.strip().count("\n") == 0
    if "delta" in words[1]:
        assert "client chest" in line  # of all clients at once


@pytest.mark.parametrize("method", ["fedex", "ffa", "rolora"])
@pytest.mark.parametrize("kind", sorted(BASES))
def test_the_outline_is_the_model(bases, kind, method):
    """Shapes, scalings and numbers of the model that has its weights; A as large as PEFT draws it."""
    config = config_of(method=method, base={"model": str(bases / kind)}, lora={"r": 2, "target_modules": "all-linear"})
    classes = {"num_labels": 3}
    made = outline(config, "classification", classes)
    model = add_lora(load_base(config.base, "classification", **classes), config.lora, "classification")
    real, numbers = read_model(model), []
    for part in ("AB",) if method == "fedex" else ("B",) if method == "ffa" else ("A", "B"):
        set_trained(model, part)
        numbers.append(trainable_parameters(model)[0])
    assert made.trained == max(numbers)
    assert {name: (pair.shape, pair.rank, pair.scaling) for name, pair in made.adapter.items()} == {
        name: (pair.shape, pair.rank, pair.scaling) for name, pair in real.items()
    }
    assert _size(made.adapter) == pytest.approx(_size(real), rel=0.2)


def _size(adapter):
    return sum(float(pair.A.square().sum()) for pair in adapter.values())


def test_noise_of_a_factor_is_that_of_the_run_s_own_optimiser():
    """SGD, constant: rate times noise times the root of the steps. Adam, falling: a step is at most about its rate, whatever the noise."""
    plain = {
        "per_device_train_batch_size": 30,
        "num_train_epochs": 2,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
    }
    config = config_of(training=plain)
    plan = privacy_plan(config, "chest")
    assert factor_noise(config, plan) == pytest.approx(0.5 * plan.round.sigma / 30 * math.sqrt(plan.round.steps), rel=0.03)
    low, high = (config_of(privacy={"epsilon": epsilon, "rows": 360, "accountant": "rdp"}) for epsilon in (8, 1))
    found = [factor_noise(one, privacy_plan(one, "chest")) for one in (low, high)]
    assert found[0] == pytest.approx(found[1], rel=0.01)
    assert 5e-3 < found[0] < 5e-3 * 24
    spread = config_of(local={"schedule": "run"})
    assert factor_noise(spread, plan) > factor_noise(config_of(), plan)  # the rate falls over three rounds, not in each


def test_the_warning_has_the_formula_s_numbers():
    config = config_of(weights="uniform")
    adapter = outline(config, "causal-lm", {}).adapter
    clients = ("chest", "bone", "skin")
    t = [factor_noise(config, plan) for plan in plans_of(config, clients).values()]
    found = noise_of_update(adapter, t, [1 / 3] * 3)
    assert f"of norm {found.residual:.2g} in round 1, where noise makes {found.first:.2g}" in noise_warning(config, adapter, clients)
    dropped = noise_warning(config_of(method="fedit", weights="uniform"), adapter, clients)
    assert f"of norm {found.means:.2g} (in the residual, which is dropped, {found.residual:.2g})" in dropped
    assert f"of norm {found.products:.2g}" in noise_warning(config_of(method="reinit", weights="uniform"), adapter, clients)
    for method in ("ffa", "fedsvd", "rolora"):
        assert noise_warning(config_of(method=method), adapter, clients) == ""
    assert noise_warning(config_of(privacy={}), adapter, clients) == ""
    assert "where the rows are stated" in noise_warning(config_of(privacy={"epsilon": 3}), adapter, clients)


def test_facts_are_the_plan_s_and_no_function_of_rows():
    config = config_of()
    facts = privacy_facts(config, ["bone", "chest", "skin"])
    assert facts["privacy"] == {
        "epsilon": 3, "delta": 1e-5, "clip_norm": 1.0, "accountant": "rdp", "unit": "record", "relation": "add or remove one", "rounds": 3,
    }  # fmt: skip
    assert facts["private_clients"]["bone"]["sigma"] == privacy_plan(config, "bone").round.sigma
    assert privacy_facts(config_of(privacy={"epsilon": 3}), ["ward-a"]).keys() == {"privacy"}  # over Flower: each node's own word
    assert privacy_facts(config_of(privacy={}), ["bone"]) == {}
