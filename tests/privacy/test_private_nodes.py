"""A private party over Flower, its `Node` driven directly: its own word counts, and its bytes hold nothing that one row changes."""

import json
import math
import re
import secrets
import string
from itertools import count

import numpy as np
import pytest
import torch
from tests.messages import tensors_of, told

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from fedex_lora.config import Privacy, base_folder, parse_config, write_config
from fedex_lora.engines.flower._files import node_file
from fedex_lora.engines.flower._messages import from_record, to_record
from fedex_lora.engines.flower._node import Node
from fedex_lora.engines.flower._request import NodeRequest
from fedex_lora.engines.flower._settings import node_settings
from fedex_lora.engines.flower.app_folder import write_app
from fedex_lora.engines.flower.client import client_app
from fedex_lora.errors import ConfigError
from fedex_lora.privacy.accounting import privacy_plan, spent
from fedex_lora.privacy.ledger import LedgerEntry, begin_ledger, read_ledger
from fedex_lora.privacy.settings import require_private
from fedex_lora.protocol.envelopes import envelope_of
from fedex_lora.protocol.records import Apology
from fedex_lora.runs import learner as learners
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.server import Server
from fedex_lora.tasks.dealt import dealt

ROWS = [{"prompt": f"bed {number} :", "completion": " red"} for number in range(12)]
OWN = {"epsilon": 4.0, "delta": 1e-3, "stated_rows": 20, "accountant": "rdp"}


def ignore(event):
    pass


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def setting(file, **changes):
    """A run that says nothing of privacy."""
    tree = {
        "method": "ffa",
        "rounds": 2,
        "torch_threads": 1,
        "base": {"model": "demo"},
        "lora": {"r": 2, "alpha": 8, "target_modules": ["q_proj"]},
        "task": {"name": "custom", "kind": "causal-lm", "train": str(file), "eval": str(file)},
        "clients": {"count": 1},
        "training": {"learning_rate": 5e-3, "num_train_epochs": 1, "per_device_train_batch_size": 4},
    }
    for table, values in changes.items():
        tree[table] = {**tree.get(table, {}), **values} if isinstance(values, dict) else values
    return parse_config(tree)


class Party:
    """A private party on its machine: its rows, its ledger, its state."""

    def __init__(self, folder, rows=ROWS, **settings):
        folder.mkdir()
        write(folder / "rows.jsonl", rows)
        begin_ledger(folder / "ledger")
        self.ledger, self.folder = folder / "ledger", folder
        self.node = {
            "client": "ward",
            "data": str(folder),
            "train": "rows.jsonl",
            "state": str(folder / "state"),
            "ledger": str(self.ledger),
        }
        self.node |= {**OWN, **settings}

    def reply(self, payload, config, run="run", node=None):
        return Node(ignore).reply(NodeRequest(payload, "ward", run, "", write_config(config), self.node if node is None else node))

    def entries(self):
        return [line for line in read_ledger(self.ledger) if isinstance(line, LedgerEntry)]

    def log(self):
        return (self.folder / "state" / "party.log").read_text()


@pytest.fixture(scope="module")
def server_side(tmp_path_factory):
    """The server's file, and the state before round 1."""
    file = write(tmp_path_factory.mktemp("server") / "rows.jsonl", ROWS)
    return file, LocalSimulation(setting(file), ignore).initial()


def question(server_side, phase="train", run="run"):
    file, state = server_side
    return Server(setting(file), state, ["ward"], run=run).open_round(phase=phase).messages["ward"]


def code_of(reply):
    said = envelope_of(reply, Apology)[0]
    return said.code, said.rows


def test_a_node_s_privacy_is_its_own_word(tmp_path, server_side):
    """Of the run's it takes the clip norm, and an epsilon that is smaller; what it lacks is named in one line."""
    file, _ = server_side
    theirs = {"epsilon": 100.0, "delta": 0.01, "rows": 10**6, "budget": 90.0, "ledger": "/tmp/theirs", "clip_norm": 2.0}
    node = {"data": "/srv", "ledger": "/srv/ledger", **OWN, "accountant": ""}
    for run in ({}, theirs):
        privacy = node_settings(node).applied(setting(file, privacy=run)).privacy
        assert (privacy.epsilon, privacy.delta, privacy.rows, privacy.budget) == (4.0, 1e-3, 20, 4.0)
        assert (str(privacy.ledger), privacy.accountant, privacy.clip_norm) == ("/srv/ledger", "prv", run.get("clip_norm", 1.0))
    assert node_settings({**node, "budget": 9.0}).applied(setting(file, privacy={**theirs, "epsilon": 0.5})).privacy.epsilon == 0.5
    del (unsaid := dict(node))["delta"]
    assert node_settings(unsaid).applied(setting(file, privacy=theirs)).privacy.delta == 1e-5
    assert node_settings({**node, "delta": 0.04}).applied(setting(file, privacy=theirs)).privacy.delta == 0.01  # as the run's card says
    assert not node_settings({"data": "/srv"}).applied(setting(file)).privacy.is_on
    for said, run, words in (
        ({"data": "/srv"}, theirs, r"^this run is private, and this node's file lacks epsilon .*, stated_rows .*, ledger .*: add them$"),
        ({**node, "ledger": ""}, {}, r"^this node is private, and this node's file lacks ledger \(where .*\): add it$"),
        ({"data": "/srv", "delta": 0.1}, {}, "lacks epsilon"),
        ({**node, "delta": 2.0}, {}, "^this node's privacy: delta = 2.0: input should be less than 1$"),
        ({**node, "max_rows": 6, "budget": 3.0}, {}, "^this node's privacy: budget = 3 does not pay .*; max_rows does not go with privacy"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            node_settings(said).applied(setting(file, privacy=run))
        assert caught.value.code == "privacy"
    for name, value in (("epsilon", -1.0), ("epsilon", 0), ("epsilon", math.nan), ("stated-rows", 0), ("budget", 0.0), ("delta", 0.0)):
        with pytest.raises(ConfigError, match=f"node config {name} = {value:g}: give a number above 0"):
            node_settings({name: value})


def test_who_cannot_read_a_configuration_may_be_private(tmp_path):
    """And says no more; a parser raises what it likes."""
    for text in ("[", "a = " + "[" * 3000 + "]" * 3000):
        request = NodeRequest(b"", "ward", "run", "", text, {"state": str(tmp_path)})
        assert code_of(Node(ignore).reply(request)) == ("privacy", 0)


def test_an_app_with_privacy_and_no_epsilon_is_not_written(tmp_path, server_side):
    with pytest.raises(ConfigError, match="says rows and no epsilon"):
        write_app(tmp_path / "app", setting(server_side[0], privacy={"rows": 20}), "run", ["ward"])
    assert not (tmp_path / "app").exists()


def test_a_private_node_answers_tells_its_own_log_and_nobody_else(tmp_path, server_side):
    party, config = Party(tmp_path / "a"), setting(server_side[0])
    reply = party.reply(question(server_side), config)
    assert (told(reply)["num_examples"], told(reply)["metrics"]) == (20, {})
    plan = privacy_plan(node_settings(party.node).applied(config), "ward")
    assert [line.mechanism for line in party.entries()] == [plan.round]
    epsilon = spent([plan.round], 1e-3, "rdp")
    assert f"ward: epsilon {epsilon:.4g} of the budget of 4 is spent at delta 0.001, which pays for 1 of the 1 rounds ahead" in party.log()
    assert re.search(r"INFO ward: round 1: of (\d+) rows that were drawn, \1 were used\n", party.log())
    assert b"epsilon" not in reply
    assert party.reply(question(server_side), config) == reply  # a new process
    assert len(party.entries()) == 1


def test_a_run_that_is_private_gets_nothing_from_a_node_that_has_not_said_so(tmp_path, server_side):
    party = Party(tmp_path / "a")
    plain = {key: party.node[key] for key in ("client", "data", "train", "state")}
    private = setting(server_side[0], privacy={"epsilon": 8.0, "rows": 20, "delta": 1e-3, "ledger": str(party.ledger)})
    assert code_of(party.reply(question(server_side), private, node=plain)) == ("privacy", 0)
    assert party.entries() == []


def test_a_server_that_lies_on_the_run_spends_no_more_than_the_budget(tmp_path, server_side):
    """Other epsilons, rounds, batches and names of runs, until nothing is left; each entry is what was trained then."""
    party, file = Party(tmp_path / "a", budget=6.0), server_side[0]
    lies = [
        {"privacy": {"epsilon": 100.0, "delta": 0.9, "rows": 10**6, "clip_norm": 1.0}, "rounds": 1},
        {"rounds": 50},
        {"training": {"per_device_train_batch_size": 16}},
        {"training": {"num_train_epochs": 9}},
    ]
    released, codes = [], []
    for number in count():
        config = setting(file, **lies[number % len(lies)])
        reply = party.reply(question(server_side, run=f"run {number}"), config, run=f"run {number}")
        if told(reply)["kind"] == "update":
            released.append(privacy_plan(node_settings(party.node).applied(config), "ward").round)
        else:
            codes.append(code_of(reply))
        if len(codes) == 3:
            break
    assert set(codes) == {("privacy", 0)}
    assert [line.mechanism for line in party.entries()] == released
    assert len(released) > 1
    assert spent(released, 1e-3, "rdp") <= 6


def test_the_name_of_a_client_does_not_open_another_budget(tmp_path, server_side):
    """A node that has not said who it is answers to any name, by one ledger."""
    party = Party(tmp_path / "a")
    party.node |= {"client": ""}
    file, state = server_side
    for number, name in enumerate(("ward", "other", "third")):
        message = Server(setting(file), state, [name], run="run").open_round().messages[name]
        reply = Node(ignore).reply(NodeRequest(message, name, "run", "", write_config(setting(file)), party.node))
        assert told(reply)["kind"] == ("update" if number < 2 else "failure"), name
    assert len(party.entries()) == 2


CHANGED = [*ROWS[:5], {"prompt": "bed 5 has a fever and a rash :", "completion": " blue and green"}, *ROWS[6:]]


@pytest.mark.parametrize("rows", [CHANGED, ROWS[:-1], [CHANGED[5], *ROWS]], ids=["changed", "removed", "added"])
def test_the_bytes_hold_nothing_that_one_row_changes_but_the_parameters(rows, tmp_path, server_side, monkeypatch):
    """The secret numbers are the same ones, so that only the row differs."""
    monkeypatch.setattr(secrets, "token_bytes", lambda count: np.random.default_rng(88).bytes(count))
    config = setting(server_side[0], clients={"holdout": 0.1}, training={"per_device_train_batch_size": 16})  # of 20: each row is drawn
    replies = {}
    for name, own in (("these", ROWS), ("those", rows)):
        party = Party(tmp_path / name, own)
        replies[name] = [party.reply(question(server_side, phase), config) for phase in ("evaluate", "train", "train")]
    for these, those in zip(*replies.values(), strict=True):
        assert len(these) == len(those)
        assert {**told(these), "body": ""} == {**told(those), "body": ""}
        assert told(these).keys() == {
            *("schema_version", "run", "round", "client", "body", "kind", "phase", "base_version", "num_examples", "metrics", "base"),
            *("method", "scalings", "since", "version", "log_rounds", "halts", "reinit_seed"),
        }
        shapes = [{name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(reply).items()} for reply in (these, those)]
        assert shapes[0] == shapes[1]
    measured, trained = ([replies[name][at] for name in replies] for at in (0, 1))
    assert measured[0] == measured[1]
    assert trained[0] != trained[1]  # the row did train
    assert told(trained[0])["metrics"] == {}


def asked(party, file, base="", **task):
    """One question, as a server that chooses the task asks it; the code of the answer, or "update"."""
    config = setting(file, task=task)
    message = Server(config, LocalSimulation(config, ignore).initial(), ["ward"], run="run").open_round().messages["ward"]
    reply = Node(ignore).reply(NodeRequest(message, "ward", "run", base, write_config(config), party.node))
    said = told(reply)
    return "update" if said["kind"] == "update" else code_of(reply)


SICK = [{"prompt": f"bed {number} :", "completion": " red", "diagnosis": ("cold", "flu")[number % 2]} for number in range(12)]
ODD = {
    "label": {**SICK[0], "diagnosis": "hiv"},
    "long": {**SICK[0], "prompt": "bed " * 200},
    "empty": {**SICK[0], "prompt": ""},
    "half a character": {**SICK[0], "prompt": "\ud800", "completion": "\ud800"},
    "score": {**SICK[0], "diagnosis": "inf"},
    "another column": {"hiv": "positive"},
}
QUESTIONS = {
    "a diagnosis but cold and flu": {"kind": "classification", "text": ["prompt"], "label": "diagnosis", "labels": ["cold", "flu"]},
    "a long row": {"max_length": 30},
    "any column of this name": {"prompt": "{hiv}", "completion": "{hiv}"},
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_whether_and_what_a_party_answers_is_the_same_with_another_row(question, tmp_path):
    """A wrong base, so that no entry is ever made, was a question without a price; and so was any row that was refused."""
    file = write(tmp_path / "rows.jsonl", [{**row, "hiv": "no"} for row in SICK])
    for name, row in {"none": SICK[0], **ODD}.items():
        party = Party(tmp_path / name, [*SICK, row])
        codes = [asked(party, file, base, **QUESTIONS[question]) for base in ("no such base", "")]
        assert codes == [("base", 0), "update"], name
        assert len(party.entries()) == 1


TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def asked_with(base, party, file, **changes):
    """One question about a base that the server brought, and the answer's kind or code."""
    config = setting(file, base={"model": str(base)}, **changes)
    message = Server(config, LocalSimulation(config, ignore).initial(), ["ward"], run="run").open_round().messages["ward"]
    reply = party.reply(message, config)
    return "update" if told(reply)["kind"] == "update" else code_of(reply)


def test_a_row_that_makes_a_tokenizer_panic_is_left_out(tmp_path):
    """A panic is no `Exception`. This tokenizer has one at a letter that no made-up row has."""
    panics = Tokenizer(models.WordLevel({"[PAD]": 0, "[EOS]": 1, "[UNK]": 2}, unk_token="[UNK]"))
    cut = pre_tokenizers.Split(Regex("[^Q]+"), "removed")
    panics.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.FixedLength(length=0)])
    panics.add_tokens([AddedToken(letter, normalized=False) for letter in string.ascii_lowercase + string.digits + " :?"])
    with pytest.raises(BaseException, match=r".") as caught:
        panics.encode("Q")
    assert not isinstance(caught.value, Exception)
    base = tmp_path / "base"
    PreTrainedTokenizerFast(tokenizer_object=panics, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]").save_pretrained(base)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, vocab_size=64, max_position_embeddings=128, pad_token_id=0)).save_pretrained(base)
    file = write(tmp_path / "rows.jsonl", ROWS)
    for name, rows in (("without", ROWS), ("with", [*ROWS, {"prompt": "Quagmire :", "completion": " red"}])):
        party = Party(tmp_path / name, rows)
        assert asked_with(base, party, file) == "update"
        assert len(party.entries()) == 1
        assert ("1 of 13 rows are left out" in party.log()) == ("(the last for " in party.log()) == (name == "with")


@pytest.mark.parametrize(("original", "answer"), [(64, ("model", 0)), (128, "update")])
def test_a_model_that_reads_all_rows_otherwise_beside_a_long_one_is_refused(original, answer, tmp_path):
    """Longrope: one row beyond the original length changes the frequencies of its batch. The node's own rows are all short."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1000.0] * 4}
    tokenizer, base = AutoTokenizer.from_pretrained(base_folder()), tmp_path / "base"
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    shape = {**TINY, "vocab_size": len(tokenizer), "max_position_embeddings": 128, "original_max_position_embeddings": original}
    model = Phi3ForCausalLM(Phi3Config(**shape, rope_parameters=rope, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    with torch.no_grad():
        for one in model.parameters():
            one.normal_(0, 0.3) if one.dim() > 1 else None
    model.save_pretrained(base)
    party = Party(tmp_path / "ward")
    changes = {"lora": {"target_modules": ["qkv_proj"]}, "task": {"max_length": 120}}
    assert asked_with(base, party, write(tmp_path / "rows.jsonl", ROWS), **changes) == answer
    assert ("depends on the rows beside it" in party.log()) == (answer != "update")
    assert len(party.entries()) == (answer == "update")


def test_a_party_without_a_usable_row_answers_noise(tmp_path, server_side):
    """So that the first row makes no difference, either; and its log says so, where its other rows are left out one by one."""
    config = setting(server_side[0])
    for name, rows, words in (("one", [{"prompt": "Quagmire"}], "what it answers is noise alone"), ("some", [*ROWS, {}], "1 of 13 rows")):
        party = Party(tmp_path / name, rows)
        reply = party.reply(question(server_side), config)
        assert told(reply)["num_examples"] == 20
        assert words in party.log()
        assert any(tensor.any() for name, tensor in tensors_of(reply).items() if name.endswith("B"))
    plain = {key: party.node[key] for key in ("client", "data", "train", "state")}
    assert code_of(party.reply(question(server_side), config, node=plain)) == ("empty", 1)


def talk(key, number):
    role, said, user, assistant = ("role", "content", "user", "assistant") if key == "messages" else ("from", "value", "human", "gpt")
    return {key: [{role: user, said: f"bed {number} ?"}, {role: assistant, said: "red"}]}


@pytest.mark.parametrize(
    "odd",
    [
        talk("messages", 12),
        {**talk("conversations", 12), "chosen": "", "rejected": ""},
        {"text": "bed"},
        {**talk("conversations", 12), "tools": "[" * 100_000},
    ],
)
def test_a_row_of_another_layout_leaves_all_others_as_they_are(odd, tmp_path):
    rows = [talk("conversations", number) for number in range(12)]
    file = write(tmp_path / "rows.jsonl", [talk("messages", number) for number in range(12)])
    for name, own in (("without", rows), ("with", [odd, *rows])):
        party = Party(tmp_path / name, own)
        assert asked(party, file, kind="chat") == "update"
        held = party.log().partition("holds ")[2].partition(" rows")[0]
        assert int(held) == 12 + (name == "with" and not {"text", "tools"} & odd.keys())


def test_an_image_that_is_cut_is_left_out_like_any_other(tmp_path):
    """Its header is whole, so that it failed when it was drawn, and only then."""
    pytest.importorskip("PIL")
    from PIL import Image

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8)).save_pretrained(tmp_path / "vit")
    party = Party(tmp_path / "a", [{"image": f"{number}.jpg", "label": ("red", "blue")[number % 2]} for number in range(13)])
    for number in range(13):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(party.folder / f"{number}.jpg")
    cut = party.folder / "12.jpg"
    cut.write_bytes(cut.read_bytes()[: len(cut.read_bytes()) // 2])
    task = {"kind": "image-classification", "labels": ["red", "blue"], "label": "label", "data": str(party.folder)}
    config = setting("rows.jsonl", task=task, base={"model": str(tmp_path / "vit")}, lora={"target_modules": ["q_proj"]})
    message = Server(config, LocalSimulation(config, ignore).initial(), ["ward"], run="run").open_round().messages["ward"]
    reply = party.reply(message, config, node={**party.node, "model": str(tmp_path / "vit")})
    assert told(reply)["kind"] == "update", party.log()
    assert "1 of 13 rows are left out" in party.log()


def test_a_file_that_cannot_be_read_costs_the_round(tmp_path, server_side):
    party = Party(tmp_path / "a")
    (party.folder / "rows.jsonl").write_text("Quagmire")
    assert [code_of(party.reply(question(server_side), setting(server_side[0]))) for _ in range(3)] == [("privacy", 0)] * 3
    assert len(party.entries()) == 2, "a run of two rounds spends no third one"


def test_a_private_party_trains_on_all_of_its_rows(tmp_path, server_side):
    """A share of them, or so many at most, would be others for one row more."""
    party = Party(tmp_path / "a")
    party.reply(question(server_side), setting(server_side[0], clients={"holdout": 0.5}))
    assert "holds 12 rows to train on, 0 held out" in party.log()
    assert code_of(party.reply(question(server_side), setting(server_side[0]), node={**party.node, "max_rows": 6})) == ("privacy", 0)
    assert "max_rows does not go with privacy" in party.log()
    theirs = setting(server_side[0], clients={"count": 2, "holdout": 0.5})
    _, parts = dealt(theirs.model_copy(update={"privacy": Privacy(epsilon=1.0)}))
    assert [(len(mine), len(held)) for mine, held in parts.values()] == [(6, 0), (6, 0)]
    drawn = setting(server_side[0], task={"train_rows": 5}, privacy={"epsilon": 1.0})
    require_private(drawn)
    drawn = drawn.model_copy(update={"clients": drawn.clients.model_copy(update={"data": {"ward": "rows.jsonl"}})})
    with pytest.raises(ConfigError, match=r"does not go with task\.train_rows"):
        require_private(drawn)


def test_a_worker_that_dies_tells_what_every_failure_tells(tmp_path, server_side, monkeypatch):
    """One row may be what ends it."""
    for name in ("task_id", "run_id", "node_id"):
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    party, file = Party(tmp_path / "a"), tmp_path / "config.toml"
    file.write_text(write_config(setting(server_side[0])))
    about = {"run": "run", "base": "", "client": "ward"}
    codes = []
    for node in (party.node, {key: party.node[key] for key in ("client", "data", "train", "state")}):
        message = Message(to_record(question(server_side), about), dst_node_id=1, message_type="train")
        context = Context(1, 1, {**node, "worker": str(tmp_path / "nobody")}, RecordDict(), {})
        codes.append(code_of(from_record(client_app(file)(message, context))[0]))
    assert codes == [("privacy", 0), ("worker", 0)]


@pytest.mark.parametrize("error", [RuntimeError("Quagmire"), ImportError("Quagmire"), ConfigError("Quagmire"), SystemExit("Quagmire")])
def test_a_row_that_makes_training_fail_tells_one_code_and_has_spent_its_entry(error, tmp_path, server_side, monkeypatch):
    def fail(*args, **options):
        raise error

    party, config = Party(tmp_path / "a"), setting(server_side[0])
    with monkeypatch.context() as patch:
        patch.setattr(learners, "local_update", fail)
        failed = party.reply(question(server_side), config)
    assert code_of(failed) == ("privacy", 0)
    assert b"Quagmire" not in failed
    assert "Quagmire" in party.log()
    assert told(party.reply(question(server_side), config))["kind"] == "update"
    assert len(party.entries()) == 2


def test_failures_are_charged(tmp_path, server_side):
    """Whether noised numbers are finite is an answer of them, which a server could have for nothing as often as it likes."""
    party = Party(tmp_path / "a", budget=50.0)
    bad = setting(server_side[0], privacy={"clip_norm": 1e6}, training={"learning_rate": 1e36, "optim": "sgd"})
    codes = [code_of(party.reply(question(server_side), bad)) for _ in range(4)]
    assert codes == [("privacy", 0)] * 4
    assert "training diverged" in party.log()
    spends = spent([one.mechanism for one in party.entries()], 1e-3, "rdp")
    assert 1 <= len(party.entries()) < 4, "of one run no more than its epsilon"
    assert spends <= OWN["epsilon"]


def test_a_run_spends_no_more_than_its_epsilon_whatever_the_budget(tmp_path, server_side):
    """A server that says that there is one round, and asks for another, and another."""
    file, state = server_side
    party, config = Party(tmp_path / "a", budget=50.0), setting(file, rounds=1)
    server, kinds = Server(config, state, ["ward"], run="run"), []
    for _ in range(3):
        round = server.open_round()
        reply = party.reply(round.messages["ward"], config)
        kinds.append(told(reply)["kind"])
        if kinds[-1] == "update":
            round.close([server.receive("ward", reply).update])
    assert kinds == ["update", "failure", "failure"]
    assert spent([one.mechanism for one in party.entries()], 1e-3, "rdp") <= OWN["epsilon"]


def test_what_no_row_is_the_reason_for_is_told_as_ever(tmp_path, server_side):
    party, config = Party(tmp_path / "a"), setting(server_side[0])
    assert code_of(party.reply(b"garbage", config)) == ("message", 0)
    assert code_of(party.reply(question(server_side), config, node={**party.node, "client": "somebody"})) == ("client", 0)
    assert code_of(party.reply(question(server_side), config, node={**party.node, "stated_rows": 3})) == ("privacy", 0)
    assert "client ward: 3 rows are stated, and a batch has 4" in party.log()


def test_a_node_s_file_says_what_is_wrong_with_its_privacy(tmp_path):
    (tmp_path / "node.toml").write_text('epsilon = 3.0\nledger = "ledger"\n')
    problems = node_file(tmp_path / "node.toml").problems
    assert any("ledger: there is no ledger" in problem and "--begin" in problem for problem in problems)
    assert any(problem.startswith("stated_rows is missing (the number of rows that it states)") for problem in problems)
    begin_ledger(tmp_path / "ledger")
    (tmp_path / "node.toml").write_text('epsilon = 3.0\nstated_rows = 50\nledger = "ledger"\n')
    made = node_file(tmp_path / "node.toml")
    assert not [problem for problem in made.problems if "ledger" in problem or "stated_rows" in problem]
    assert f'ledger="{tmp_path / "ledger"}"' in made.command[-1]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("delta = 1.0", "delta = 1.0: input should be less than 1"),
        ("delta = 0.02", "delta = 0.02 is not below 1 / 100 stated rows"),
        ('accountant = "foo"', "accountant = foo: input should be 'prv' or 'rdp'"),
        ("max_rows = 5", "max_rows does not go with privacy"),
        ("budget = 2.0", "budget = 2 does not pay for one run of epsilon = 3"),
        ('trainer = "trl:SFTTrainer"', "trainer does not go with privacy"),
        ("epsilon = 0", "epsilon = 0: give a number above 0"),
        ("epsilon = nan", "epsilon = nan: give a number above 0"),
        ("epsilon = 200.0", "epsilon = 200.0: input should be less than or equal to 100"),
        ('epsilon = "eight"', "epsilon = 'eight': give a value of kind float"),
        ("stated_rows = 0", "stated_rows = 0: give a number above 0"),
    ],
)
def test_a_node_s_privacy_is_looked_at_before_it_starts(lines, words, tmp_path):
    """Once, and in plain words; what is there is not called missing."""
    said = {"epsilon": "epsilon = 3.0", "stated_rows": "stated_rows = 100", "ledger": 'ledger = "ledger"'}
    said |= {lines.split()[0]: lines}
    begin_ledger(tmp_path / "ledger")
    (tmp_path / "node.toml").write_text("\n".join(said.values()))
    problems = [problem for problem in node_file(tmp_path / "node.toml").problems if not problem.startswith(("superlink", "auth_"))]
    assert len(problems) == 1
    assert words in problems[0]
