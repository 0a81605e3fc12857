"""What a finished run says of privacy: report and card have the numbers of its manifest, and of a plain run they say nothing."""

import dataclasses

import pytest
from tests.finished_runs import small_run, synthetic, written
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import parse_config
from fedex_lora.models.card import model_card
from fedex_lora.models.export import export
from fedex_lora.privacy.ledger import begin_ledger
from fedex_lora.report import page
from fedex_lora.report.analysis import find_runs
from fedex_lora.runs.privacy import privacy_facts
from fedex_lora.storage.events import Started, Warned, of_kind, read_events
from fedex_lora.storage.files import read_manifest
from fedex_lora.storage.result import read_result

TABLES = {
    "base": {"model": "demo"},
    "task": {"name": "demo"},
    "privacy": {"epsilon": 3, "rows": {"site-000": 300, "site-001": 280}, "accountant": "rdp", "clip_norm": 0.5},
}
CARD = {"format": "adapter", "method": "ffa", "round": 2, "base_model": "demo", "fedex-lora": "1", "dtype": "float32"}
SAME, OTHER = "comes out the same, to the last bit", "gives other noise and other bits, and each repeat spends epsilon again"
NUMBERS = {"rank": 2, "update_error": 0.0, "output_error": 0.0, "output_bound": None, "tokens": None}


@pytest.fixture(scope="module")
def facts():
    return privacy_facts(parse_config(TABLES), ["site-000", "site-001"])


def html_of(folder, facts):
    first, *rest = synthetic(rounds=2, clients=2)
    return page(find_runs([written(folder, [first | facts, *rest])]))[0]


def test_a_report(facts, tmp_path):
    html = html_of(tmp_path / "private", facts)
    sigma = facts["private_clients"]["site-001"]["sigma"]
    assert f">{sigma:.4g}</td>" in html
    assert "What it says of a single record" in html
    assert "add or remove one" in html
    assert "single record" not in html_of(tmp_path / "plain", {})
    flower = html_of(tmp_path / "flower", {"privacy": facts["privacy"]})
    assert "What was asked of each party" in flower
    assert "by the rows that it states" not in flower
    assert [("own numbers are in its ledger" in one) for one in (html, flower)] == [False, True]


@pytest.fixture(scope="module")
def private_run(tmp_path_factory):
    """Of fedex, so that there is something to warn of."""
    folder = tmp_path_factory.mktemp("private")
    begin_ledger(folder / "ledger.jsonl")
    privacy = {"epsilon": 8, "delta": 1e-3, "rows": 32, "ledger": str(folder / "ledger.jsonl"), "accountant": "rdp"}
    return small_run(folder / "run", privacy=privacy)


def test_a_private_run_says_it_itself(private_run):
    """Events, manifests of rounds, and what parties are handed, which is nothing of single clients."""
    events = read_events(private_run / "events.jsonl")
    started, warned = of_kind(events, Started)[0], [event.message for event in of_kind(events, Warned)]
    assert (started.privacy["epsilon"], started.privacy["unit"]) == (8, "record")
    assert {client: row["rows"] for client, row in started.private_clients.items()} == dict.fromkeys(("bone", "chest", "skin"), 32)
    assert sum("noise meets noise" in message for message in warned) == 1
    last, final = (read_result(private_run / folder).manifest for folder in ("rounds/0002", "final"))
    assert last["privacy"] == final["privacy"] == started.privacy
    assert last["private_clients"] == started.private_clients
    assert "private_clients" not in final
    html = page(find_runs([private_run]))[0]
    assert "What it says of a single record" in html
    assert (SAME in html, OTHER in html) == (False, True)
    assert "epsilon 8 at delta 0.001" in (private_run / "final" / "trainable" / "README.md").read_text()


def test_an_export_says_it(private_run, tmp_path):
    export(private_run, "adapter", tmp_path / "adapter")
    assert read_manifest(tmp_path / "adapter")["privacy"] == read_result(private_run / "final").manifest["privacy"]


def test_the_console_says_what_is_promised_and_what_is_spent(private_run):
    done = CliRunner().invoke(app, ["run", str(private_run / "config.toml"), "--out", str(private_run), "--resume"])
    said = done.stdout.replace("\n", "")
    assert f"private: epsilon 8 at delta 0.001 for each client, ledger {private_run.parent / 'ledger.jsonl'}" in said
    epsilon = of_kind(read_events(private_run / "events.jsonl"), Started)[0].private_clients["bone"]["epsilon"]
    assert f"clients bone, chest, skin: epsilon {epsilon:.4g} of the budget of 8 is spent at delta 0.001 (" in said


def test_what_a_start_learnt_is_not_covered(private_run, tmp_path):
    """It is said at the start, in every manifest, and on the card; of a start of a start, too."""
    begin_ledger(tmp_path / "ledger")
    privacy = {"epsilon": 8, "delta": 1e-3, "rows": 32, "ledger": str(tmp_path / "ledger"), "accountant": "rdp", "budget": 100}
    small_run(tmp_path / "plain", rounds=1)
    same = {"rounds": 1, "privacy": privacy, "lora": {}}
    for name, start, promised, words in (
        ("one", tmp_path / "plain", "none", "base.start final was trained without privacy"),
        ("two", tmp_path / "one", "epsilon 8 at delta 0.001, after none", "was trained without privacy (in all: epsilon 8"),
        ("three", private_run, "epsilon 8 at delta 0.001", "base.start final has its own (epsilon 8 at delta 0.001)"),
    ):
        out = small_run(tmp_path / name, **same, base={"model": "demo", "start": str(start / "final")})
        final = read_result(out / "final")
        assert final.manifest["start"]["privacy"] == promised
        assert [words in event.message for event in of_kind(read_events(out / "events.jsonl"), Warned)].count(True) == 1
        card = model_card(CARD, NUMBERS, final, "causal-lm")
        assert f"It went on from final, whose own privacy was: {promised}. What was learnt there" in card
    assert "It went on from" not in model_card(CARD, NUMBERS, read_result(private_run / "final"), "causal-lm")


def test_more_rounds_would_spend_more(private_run):
    done = CliRunner().invoke(app, ["run", str(private_run / "config.toml"), "--out", str(private_run), "--resume", "--rounds", "3"])
    assert done.exit_code != 0
    assert "over which privacy.epsilon = 8 was spread" in done.stderr


def test_a_card(facts, tmp_path):
    result = read_result(small_run(tmp_path / "run", rounds=1) / "final")
    plain = model_card(CARD, NUMBERS, result, "causal-lm")
    private = model_card(CARD, NUMBERS, dataclasses.replace(result, manifest={**result.manifest, **facts}), "causal-lm")
    assert "## Privacy" not in plain
    for words in ("epsilon =\n3 at delta = 1e-05", "one record", "add or remove one", "rdp", "norm 0.5"):
        assert words in private
    assert "privacy" not in result.manifest
    html = page(find_runs([tmp_path / "run"]))[0]
    assert (SAME in html, OTHER in html) == (True, False)
