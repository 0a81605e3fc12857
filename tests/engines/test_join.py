"""The same script in one process, over pipes and in NVFlare's simulator ends in the same bits: docs/join.md, docs/join-transports.md."""

import os
import runpy
import subprocess
import sys
from contextlib import chdir, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("trl", reason="the extra trl is not installed")
pytest.importorskip("nvflare", reason="the extra nvflare is not installed")

from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.fuel.utils.config_service import ConfigService
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedex_lora import AdaptedModel, Client, Rules, Server, load_model, save_result
from fedex_lora.config import base_folder
from fedex_lora.engines.nvflare import FederationController, PartyExecutor, federation_job, simulate
from fedex_lora.engines.nvflare._exchange import PAYLOAD
from fedex_lora.errors import ConfigError, StorageError, UsageError
from fedex_lora.offline.verify import verify
from fedex_lora.protocol.dumps import tensors_digest
from fedex_lora.protocol.envelopes import answer_in
from fedex_lora.protocol.records import Apology
from fedex_lora.server.verdicts import Accepted, Failed
from fedex_lora.storage.adapter_folder import read_adapter_folder
from fedex_lora.storage.files import write_bytes
from fedex_lora.storage.result import read_result
from fedex_lora.storage.tensors import delta_tensors

JOIN = Path(__file__).parents[2] / "examples" / "join"
SECRET = "Mrs Miller has a rash"


def digest(folder):
    """Of all bits that a result folder's model has beside the base."""
    result = read_result(folder)
    factors = {f"{module}.{part}": getattr(pair, part) for module, pair in result.adapter.items() for part in "AB"}
    return tensors_digest(factors | delta_tensors(result.base_delta) | dict(result.other))


@contextmanager
def place(folder, **environment):
    """A reader's shell in `folder`: what it sets is forgotten afterwards."""
    modules, paths, threads = set(sys.modules), list(sys.path), torch.get_num_threads()
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **environment}
    no_device = mock.patch.object(torch.accelerator, "is_available", torch.cuda.is_available)  # an emulated one stays registered
    with chdir(folder), mock.patch.dict(os.environ, environment), no_device:
        sys.path.insert(0, str(JOIN))
        try:
            yield
        finally:
            sys.path[:] = paths
            torch.set_num_threads(threads)
            for name in ("script", "party", "in_process"):
                if name not in modules:
                    sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("join")
    with place(folder):
        runpy.run_path(str(JOIN / "in_process.py"), run_name="__main__")
    return folder / "trained" / "in-process"


def test_in_one_process_it_is_exact_and_can_be_used(one_process):
    """Its error is recomputed by `verify`, and the saved model gives other answers than the base."""
    assert verify(one_process, str(base_folder()))["max_relative_error"] < 1e-6
    model, ids = load_model(one_process, base_folder()), torch.arange(4, 12)[None]
    after = model(ids).logits
    with model.disable_adapter():
        assert (after - model(ids).logits).abs().max() > 1e-2
    assert len(read_result(one_process).updates) == 3


def test_a_federation_that_is_over_says_so_and_fails(one_process):
    """By an error that Flower passes on: its thread of the server swallows a SystemExit, and the process ended with 0."""
    with place(one_process.parents[1]):
        federate = runpy.run_path(str(JOIN / "in_process.py"))["federate"]
        with pytest.raises(UsageError, match=r"in-process is there: this federation is over; move it away\. For more rounds"):
            federate(None, "trained/in-process")


@pytest.mark.campaign
def test_over_pipes_it_ends_in_the_same_bits(one_process, tmp_path):
    with place(tmp_path):
        done = subprocess.run([sys.executable, JOIN / "over_pipes.py"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "trained" / "over-pipes") == digest(one_process)


def test_in_nvflare_s_simulator_it_ends_in_the_same_bits(one_process, tmp_path):
    """Three sites, three threads, a controller and an executor; the run folder verifies, all rounds of it."""
    with place(tmp_path), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(JOIN / "over_nvflare.py"), run_name="__main__")
    assert ended.value.code == 0
    out, workspace = tmp_path / "trained" / "over-nvflare", tmp_path / "trained" / "nvflare-workspace"
    assert digest(out / "final") == digest(one_process)
    assert len(verify(out)["rounds"]) == 3
    assert verify(out)["max_relative_error"] < 1e-6
    assert "round 3 done: exactness error" in (workspace / "server" / "log.txt").read_text()


def test_over_a_base_of_four_bits_it_joins(tmp_path):
    """There TRL's trainer makes the adapter bf16; what is sent and loaded has the precision that was agreed on."""
    made = []

    def packed(name):
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head"])
        made.append(AutoModelForCausalLM.from_pretrained(name, quantization_config=settings))
        return made[-1]

    with place(tmp_path):
        run = runpy.run_path(str(JOIN / "in_process.py"))
        with mock.patch.object(sys.modules["script"], "AutoModelForCausalLM", SimpleNamespace(from_pretrained=packed)):
            answers = {name: run["join"](name) for name in run["NAMES"]}
            run["federate"](lambda messages: {name: answers[name](message) for name, message in messages.items()}, "out")
    result = read_result(tmp_path / "out")
    assert {parameter.dtype for parameter in made[0].parameters() if parameter.requires_grad} == {torch.bfloat16}
    assert {pair.A.dtype for update in result.updates for pair in update.adapter.values()} == {torch.float32}
    assert len(result.updates) == 3
    assert verify(tmp_path / "out")["max_relative_error"] < 1e-6


def model(seed=0, alpha=8):
    torch.manual_seed(seed)
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]))


def saved(folder, **kind):
    model(**kind).save_pretrained(folder)
    return folder


def prepare(name):
    """A site whose training fails where a file says so, and quotes a row."""
    made = model()

    def train(round):
        mark = Path(os.environ["FAIL"]) if "FAIL" in os.environ else None
        if mark and mark.exists() and name == "a":
            mark.unlink()
            raise ValueError(SECRET)
        with torch.no_grad():
            made.base_model.model[0].lora_B["default"].weight.add_(round + ord(name[0]) / 100)
        return 5

    return made, train


def nothing(name):
    return model()


def another_base(name):
    return model(seed=1), lambda round: 5


def no_training(name):
    return model(), lambda round: 5


def no_rows(name):
    return model(), lambda round: None


def leaving(name):
    if isinstance(SECRET, BaseException):
        raise SECRET
    sys.exit(SECRET)


def leaving_later(name):
    return model(), lambda round: sys.exit(SECRET)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What a site that NVFlare knows as `a` answers, and what its log says."""
    start = AdaptedModel(model())
    server = Server.start(Rules(), *start.read(), ["a", "b"], base=start.base.name)
    manager = FLContextManager(engine=SimpleNamespace(get_workspace=None), identity_name="a", job_id="1")

    def ask(party, payload=None, executor=None):
        monkeypatch.setattr(ConfigService, "_var_values", {})
        monkeypatch.setenv("NVFLARE_FEDEX_LORA_FOLDER", str(tmp_path))
        monkeypatch.setenv("NVFLARE_FEDEX_LORA_PARTY", party)
        message = server.open_round().messages["a"] if payload is None else payload
        with manager.new_context() as context:
            reply = (executor or PartyExecutor()).execute("fedex_lora", Shareable({PAYLOAD: message}), context, Signal())
        return reply[PAYLOAD], (tmp_path / "party.log").read_text()

    return SimpleNamespace(ask=ask, server=server)


HERE = "tests.engines.test_join"


@pytest.mark.parametrize(
    ("party", "code", "words"),
    [
        ("", "settings", "has not said what trains"),
        ("script", "settings", "has not said what trains"),
        ("no_such_module:prepare", "package", "no module no_such_module: is its folder in PYTHONPATH"),
        (f"{HERE}:no_such_function", "settings", "has no no_such_function"),
        (f"{HERE}:nothing", "settings", "let it return (model, train)"),
        (f"{HERE}:no_rows", "training", "let it return how many rows"),
        (f"{HERE}:another_base", "base", "this party's base has other weights than the federation's"),
        (f"{HERE}:no_training", "training", "nothing has changed in the model that was loaded"),
        (f"{HERE}:prepare", "unexpected", SECRET),
    ],
)
def test_what_a_site_cannot_do_is_a_code_outside_and_a_line_inside(party, code, words, asked, tmp_path, monkeypatch):
    monkeypatch.setenv("FAIL", str(tmp_path / "fail"))
    (tmp_path / "fail").touch()
    answer, log = asked.ask(party)
    said = answer_in(answer)
    assert isinstance(said, Apology)
    assert said.code == code
    assert words in log
    assert SECRET.encode() not in answer
    assert isinstance(asked.server.receive("a", answer), Failed)


def test_an_exit_of_a_party_s_code_is_a_failure_and_an_interrupt_ends_the_process(asked, monkeypatch):
    """NVFlare's client would end without an answer, and everybody wait for it."""
    for party in ("leaving", "leaving_later"):
        answer, log = asked.ask(f"{HERE}:{party}")
        assert (answer_in(answer).code, SECRET in log, SECRET.encode() in answer) == ("unexpected", True, False)
    monkeypatch.setattr(f"{HERE}.SECRET", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        asked.ask(f"{HERE}:leaving")


def test_a_message_for_another_site_or_of_no_kind_is_answered_by_a_code(asked):
    for payload in (asked.server.open_round().messages["b"], b"", b"no message", "text"):
        answer, _ = asked.ask(f"{HERE}:prepare", payload)
        assert answer_in(answer).code == "message"


def test_a_site_that_was_killed_sends_the_same_answer_again(asked):
    """What it remembers is in its file before the answer leaves: a new process of it does not train again."""
    message = asked.server.open_round().messages["a"]
    first, _ = asked.ask(f"{HERE}:prepare", message, PartyExecutor())
    again, _ = asked.ask(f"{HERE}:no_rows", message, PartyExecutor())
    assert first == again
    assert isinstance(asked.server.receive("a", again), Accepted)


def test_jobs_that_cannot_work_are_refused_before_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved("start")
    for wrong, error, words in (
        ({"clients": ["a", "a"]}, UsageError, "each named once"),
        ({"clients": []}, UsageError, "no sites"),
        ({"rounds": 0}, UsageError, "0 rounds"),
        ({"rules": {"method": "nothing"}}, UsageError, "nothing"),
        ({"rules": {"clients": {"quorun": 1}}}, ConfigError, "clients.quorun"),
        ({"rules": {"local": {"optimizer_state": "keep", "schedule": "run"}}}, UsageError, "local.schedule, local.optimizer_state: over"),
        ({"rules": {"local": {"trainer": "trl:SFTTrainer"}}}, UsageError, "local.trainer: over NVFlare each site's own script"),
        ({"rules": {"clients": {"ranks": [2, 4], "holdout": 0.2}}}, UsageError, "clients.ranks, clients.holdout"),
        ({"rules": {"clients": {"count": 2}}}, UsageError, "clients.count"),
        ({"rules": {"clients": {"partition": "column", "column": "ward"}}}, UsageError, "clients.partition, clients.column"),
        *(({"rules": {"method": name}}, UsageError, f"method {name} is none") for name in ("centralised", "full-ft", "fed-sb", "fedsa")),
        ({"start": "nope"}, StorageError, "nope is not a PEFT adapter"),
        ({"start": str(tmp_path)}, StorageError, "give one of the 1 folders in it"),
    ):
        with pytest.raises(error, match=words) as caught:
            federation_job("job", **{"start": "start", "clients": ["a", "b"], **wrong})
        assert len(str(caught.value).splitlines()) == 1
    federation_job("job", "/srv/of-the-server/start", ["a", "b"])


def test_paths_of_a_job_are_those_of_who_writes_it(tmp_path, monkeypatch):
    """The server's process runs in another folder."""
    monkeypatch.chdir(tmp_path)
    saved("start")
    federation_job("job", "start", ["a", "b"], out="out").export_job("jobs")
    server = next(path for path in Path("jobs").rglob("config_fed_server.json")).read_text()
    assert f'"{tmp_path}/start"' in server
    assert f'"{tmp_path}/out"' in server


def test_a_folder_that_is_no_simulation_of_ours_is_not_emptied(tmp_path):
    ran = []
    job = SimpleNamespace(simulator_run=lambda folder, **more: ran.append(folder) or 0)
    precious = tmp_path / "mine" / "local" / "resources.json"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with pytest.raises(UsageError, match="holds something else than a simulation, and NVFlare empties it"):
        simulate(job, tmp_path / "mine", ["a"])
    assert precious.read_text() == "precious"
    for clients in (["a"], ["b"]):
        assert simulate(job, tmp_path / "new", clients) == 0
        (tmp_path / "new" / clients[0]).mkdir()
    (tmp_path / "new" / "precious.txt").touch()
    for wrong in (tmp_path / "new", precious):
        with pytest.raises(UsageError, match="give another workspace"):
            simulate(job, wrong, ["a", "b"])
    assert ran == [str(tmp_path / "new")] * 2


def test_a_folder_of_another_federation_is_refused(tmp_path):
    """Another start, method or site would go on with what it did not make; more rounds, or another quorum, are the same federation."""
    start = read_adapter_folder(saved(tmp_path / "start"))
    scaled, other = (
        read_adapter_folder(saved(tmp_path / name, **kind)) for name, kind in (("scaled", {"alpha": 3}), ("other", {"seed": 1}))
    )
    out = tmp_path / "out"
    out.mkdir()

    def server(rules=None, start=start, clients=("a", "b"), rounds=1):
        return FederationController("start", clients, rounds)._server(out, rules or Rules(), start)

    write_bytes(out / "server.dump", (first := server()).dump())
    waiting = Rules(clients={"quorum": 0.5, "below_quorum": "wait"})
    assert {server(rounds=9).run, server(waiting).run, server(clients=("b", "a")).run} == {first.run}
    for wrong, word in (
        ({"start": other}, "start"),
        ({"start": scaled}, "start"),
        ({"rules": Rules(method="ffa")}, "rules"),
        ({"rules": Rules(weights="uniform")}, "rules"),
        ({"clients": ("a", "c")}, "clients"),
    ):
        with pytest.raises(UsageError, match=f"a federation with other {word}: give another out") as caught:
            server(**wrong)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UsageError, match="the dump is of method fedex, and the rules say ffa"):
        Server.restore((out / "server.dump").read_bytes(), Rules(method="ffa"), ["a", "b"])
    (out / "federation.json").unlink()
    with pytest.raises(UsageError, match="something else than a federation"):
        server()


@pytest.mark.campaign
def test_a_job_that_is_submitted_again_goes_on(tmp_path):
    """In the simulator: a site that fails once is asked again, one that nobody expects is asked nothing, and nothing of an error's text is
    at the server; the second job ends where one alone would."""
    model().save_pretrained(tmp_path / "start")
    (tmp_path / "fail").touch()
    rules, out = {"clients": {"below_quorum": "wait"}}, tmp_path / "out"
    own = {"NVFLARE_FEDEX_LORA_PARTY": f"{HERE}:prepare", "NVFLARE_FEDEX_LORA_FOLDER": str(tmp_path / "state")}
    with place(tmp_path, FAIL=str(tmp_path / "fail"), **own):
        for rounds in (1, 3):
            job = federation_job("job", str(tmp_path / "start"), ["a", "b"], rounds, rules, str(out))
            assert simulate(job, tmp_path / f"workspace-{rounds}", ["a", "b", "stranger"]) == 0
    first, second = ((tmp_path / f"workspace-{rounds}" / "server" / "log.txt").read_text() for rounds in (1, 3))
    assert "site stranger has a part in the job and none in the federation" in first
    assert "client a is rejected: it failed: an error that was not foreseen" in first
    assert "round 1 done" not in second
    assert "round 3 done" in second
    assert SECRET in (tmp_path / "state" / "party.log").read_text()
    for path in (tmp_path / "workspace-1").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path

    server = Server.start(Rules(), *AdaptedModel(model()).read(), ["a", "b"])
    parties = {name: prepare(name) for name in "ab"}
    clients = {name: Client(Rules(), name, AdaptedModel(made).read()[0]) for name, (made, _) in parties.items()}
    for _ in range(3):
        round, updates = server.open_round(), []
        for name, message in round.messages.items():
            work, trained = clients[name].receive(message), AdaptedModel(parties[name][0])
            clients[name].load(trained)
            updates.append(server.receive(name, clients[name].reply(parties[name][1](work.round), {})).update)
        result = round.close(updates)
    save_result(tmp_path / "alone", result, AdaptedModel(model()).format)
    assert digest(tmp_path / "alone") == digest(out / "final")


@pytest.fixture
def flower_app(tmp_path):
    """The example's ClientApp, called as Flower's process calls it."""
    pytest.importorskip("flwr")
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    with place(tmp_path):
        made = runpy.run_path(str(JOIN / "over_flower.py"))

        def ask(content, prepare, node):
            made["answer"].__globals__["prepare"] = prepare
            context = Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={})
            asked = Message(RecordDict({"fedex-lora": ConfigRecord(content)}), dst_node_id=1, message_type="train")
            return made["client_app"](asked, context).content["fedex-lora"]["answer"]

        yield ask


def test_over_flower_only_codes_leave_and_a_party_s_name_is_its_own_word(flower_app, tmp_path):
    server, names = Server.start(Rules(), *AdaptedModel(model()).read(), ["a", "b"]), []
    messages = server.open_round().messages

    def failing(error):
        def prepare(name):
            names.append(name)
            raise error

        return prepare

    for error, code in ((ValueError(SECRET), "unexpected"), (SystemExit(SECRET), "unexpected"), (FileNotFoundError(SECRET), "file")):
        answer = flower_app({"message": messages["a"], "name": "../../x"}, failing(error), {"client": "a"})
        assert (answer_in(answer).code, SECRET.encode() in answer) == (code, False)
        assert isinstance(server.receive("a", answer), Failed)
    assert set(names) == {"a"}
    assert SECRET in (tmp_path / "trained" / "a" / "party.log").read_text()
    for content, node, code in (
        ({"message": messages["b"]}, {"client": "a"}, "message"),
        ({"nothing": 1}, {"client": "a"}, "unexpected"),
        ({"message": messages["a"]}, {}, "unexpected"),
    ):
        assert answer_in(flower_app(content, prepare, node)).code == code
    assert isinstance(server.receive("a", flower_app({"message": messages["a"]}, prepare, {"client": "a"})), Accepted)
    with pytest.raises(KeyboardInterrupt):
        flower_app({"message": messages["a"]}, failing(KeyboardInterrupt()), {"client": "a"})


def test_the_page_shows_the_files():
    """The script and the server on the pages are the examples'; the six lines are the party's."""
    page = "".join((JOIN.parents[1] / "docs" / name).read_text() for name in ("join.md", "join-transports.md"))
    for name in ("script.py", "in_process.py"):
        assert f"```python\n{(JOIN / name).read_text()}```" in page
    lines = [line.removeprefix("+").replace("answer =", "return") for line in page.splitlines() if line.startswith("+")]
    party = (JOIN / "party.py").read_text()
    assert len(lines) == 6
    assert all(line in party for line in lines)
