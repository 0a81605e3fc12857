"""fed-sb: a core C between frozen factors of the base's SVD: exact, r^2 numbers a module, ordinary LoRA when it is done."""

import json
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import oracle
from tests.conftest import cored, make_pair
from tests.messages import tensors_of
from tests.runs.test_run import configuration, events_of, ignore
from torch import nn
from transformers import AutoModelForCausalLM

from fedex_lora import AdaptedModel, Client, ClientUpdate, LoRAPair, Rules, Server, aggregate, load_model
from fedex_lora.aggregation import get_method
from fedex_lora.aggregation.core_pair import CorePair
from fedex_lora.config import Base, Lora, base_folder
from fedex_lora.errors import AdapterError, AggregationError, ConfigError, FedexLoraError, ModelError, UsageError
from fedex_lora.models.core import truncated_svd
from fedex_lora.models.export import export
from fedex_lora.models.loading import load_base
from fedex_lora.models.lora import add_lora, lora_layers, read_model, set_trained, write_model
from fedex_lora.models.merge import logits
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.verify import verify
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.checkpoint import load_checkpoint
from fedex_lora.storage.result import read_result

SETTING = {"method": "fed-sb", "rounds": 3, "lora": {"r": 4, "alpha": 4}, "training": {"learning_rate": 3e-2}}
SCALE_ONE = 4 / 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a trained model, the messages that its clients answered, and their answers."""
    out, came, went = tmp_path_factory.mktemp("cores") / "run", {}, {}

    class Heard(LocalSimulation):
        def exchange(self, messages, deadline=None):
            for client, payload in messages.items():
                came.setdefault(client, []).append(payload)
                for reply in super().exchange({client: payload}, deadline):
                    went.setdefault(client, []).append(reply.payload)
                    yield reply

    run(configuration(**SETTING), out, ignore, home=Heard)
    return out, came, went


def base():
    return AutoModelForCausalLM.from_pretrained(base_folder())


def energy(weight, U, V):
    """The share of a weight's best rank-r part that two orthonormal frames hold."""
    values = np.linalg.svd(weight, compute_uv=False)[: U.shape[1]]
    return np.linalg.norm(oracle.numpy64(U).T @ weight @ oracle.numpy64(V).T) / np.linalg.norm(values)


@pytest.mark.parametrize(("out", "inner", "rank"), [(60, 40, 4), (30, 200, 8), (200, 200, 16), (12, 12, 12)])
def test_the_factors_are_the_truncated_svd(out, inner, rank):
    """Against numpy: orthonormal to fp32 rounding, the best rank-r part to 0.1 %, and signs that do not depend on LAPACK."""
    weight = oracle.numpy64(torch.randn(out, inner, generator=torch.Generator().manual_seed(out)))
    U, V = truncated_svd(torch.from_numpy(weight), rank)
    for frame in (U.T, V):
        assert np.abs(oracle.numpy64(frame @ frame.T) - np.eye(rank)).max() < 1e-6
    assert energy(weight, U, V) > 0.999
    assert all(row[row.abs().argmax()] > 0 for row in V)
    left, _, right = np.linalg.svd(weight)
    first = right[0] * np.sign(right[0][np.abs(right[0]).argmax()])
    assert np.abs(oracle.numpy64(V[0]) - first).max() < 1e-2
    assert abs(left[:, 0] @ oracle.numpy64(U[:, 0])) > 0.99
    before = torch.random.get_rng_state()
    assert all(torch.equal(one, two) for one, two in zip(truncated_svd(torch.from_numpy(weight), rank), (U, V), strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("dtype", "quantization"), [("bfloat16", "none"), ("bfloat16", "nf4"), ("float32", "int8")])
def test_other_bases_start_from_their_values(dtype, quantization):
    """16 bits, and 4 and 8: the frames are those of the stored numbers, and the first model is the base, to the bit."""
    if quantization != "none":
        pytest.importorskip("bitsandbytes", reason="the extra quantization is not installed")
    loaded = load_base(Base(model=str(base_folder()), dtype=dtype, quantization=quantization), "causal-lm")
    model = AdaptedModel(add_lora(loaded, Lora(r=4, target_modules=["q_proj", "v_proj"]), "causal-lm"))
    with model.model.disable_adapter():
        want = logits(model.model)
    start = model.cores()
    model.load(start, {}, {})
    assert torch.equal(logits(model.model), want)
    for name, pair in start.items():
        assert energy(oracle.numpy64(model.base.pristine(name)), pair.U, pair.A) > 0.999


def test_a_layer_with_a_core_is_peft_s_own():
    """Its forward, its merge and its delta weight are those of `s U C A`, and only C has a gradient."""
    model = get_peft_model(nn.Sequential(nn.Linear(8, 6, bias=False)), LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
    pair = CorePair(**{part: torch.randn(size) for part, size in (("A", (3, 8)), ("U", (6, 3)), ("C", (3, 3)))}, scaling=2.0)
    write_model(model, {"0": pair}, {})
    set_trained(model, "C")
    x, layer = torch.randn(5, 8), model.base_model.model[0]
    want = oracle.numpy64(layer.base_layer.weight) + 2.0 * oracle.numpy64(pair.U) @ oracle.numpy64(pair.C) @ oracle.numpy64(pair.A)
    assert oracle.relative(oracle.numpy64(model(x)), oracle.numpy64(x) @ want.T) < 1e-6
    model(x).sum().backward()
    assert [name for name, one in model.named_parameters() if one.grad is not None] == ["base_model.model.0.lora_B.default.inner.weight"]
    back = read_model(model)["0"]
    assert all(torch.equal(back.parts[part], pair.parts[part]) for part in "AUC")
    layer.merge()
    assert oracle.relative(oracle.numpy64(layer.base_layer.weight), want) < 1e-6
    with pytest.raises(AdapterError, match="0 is made of A, U, C, and not of B"):
        write_model(model, {"0": LoRAPair(pair.A, pair.B, 2.0)}, {})


def test_the_mean_is_of_the_cores():
    """Reference: U (sum p_i C_i) A in fp64 numpy; and U must be the same to the bit."""
    start = cored({"m": make_pair(0, 30, 20, 5)}, "fed-sb")["m"]
    draws = [torch.randn(5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    updates = [ClientUpdate(f"c{i}", {"m": start.with_part("C", draw)}, 5 * i + 1) for i, draw in enumerate(draws)]
    result, p = aggregate(updates, "fed-sb"), oracle.shares([1, 6, 11])
    core = sum(share * oracle.numpy64(draw) for share, draw in zip(p, draws, strict=True))
    assert oracle.relative(oracle.numpy64(result.adapter["m"].C), core) < 1e-6
    assert oracle.relative(oracle.product(result.adapter["m"]), 2.0 * oracle.numpy64(start.U) @ core @ oracle.numpy64(start.A)) < 1e-6
    assert torch.equal(result.adapter["m"].U, start.U)
    assert torch.equal(result.adapter["m"].A, start.A)
    assert not result.residual
    other = ClientUpdate("c3", {"m": start.with_part("C", draws[0]).with_part("U", start.U * (1 + 1e-6))}, 5)
    with pytest.raises(AggregationError, match="do not share the frozen U of m"):
        aggregate([*updates, other], "fed-sb")


def test_a_run_is_exact_and_resumable(finished):
    out, _, _ = finished
    checked = verify(out, str(base_folder()))
    assert checked["max_relative_error"] < 1e-6
    assert checked["realised_error"] < 3 * checked["floor"]
    assert len(checked["rounds"]) == 3
    losses = [event["metrics"]["loss"] for event in (*events_of(out, "started"), *events_of(out, "round_done"))]
    assert losses[-1] < losses[0]
    states = [load_checkpoint(out / "rounds" / f"{number:04}").state for number in (1, 3)]
    for name, pair in states[1].adapter.items():
        assert torch.equal(pair.A, states[0].adapter[name].A)  # frozen
        assert torch.equal(pair.U, states[0].adapter[name].U)
        assert pair.scaling == SCALE_ONE
        stored = read_result(out / "rounds" / "0003").adapter[name]
        assert torch.equal(stored.B, pair.B)
        assert oracle.relative(oracle.numpy64(stored.B), oracle.numpy64(pair.U) @ oracle.numpy64(pair.C)) < 1e-7


def test_after_the_first_message_r_squared_numbers_a_module_travel(finished):
    """By the tensors of every message and answer, by the row, and by the bytes that the events say."""
    out, came, went = finished
    shapes = {name: pair.shape for name, pair in read_result(out / "final").adapter.items()}
    row = get_method("fed-sb")
    for number in range(3):
        for client in came:
            down, up = tensors_of(came[client][number]), tensors_of(went[client][number])
            cores = {f"adapter|{name}|C" for name in shapes}
            around = {f"adapter|{name}|{part}" for name in shapes for part in "AU"} if number == 0 else set()
            assert down.keys() == cores | around
            assert up.keys() == cores
            assert {tensor.numel() for tensor in up.values()} == {16}
            sizes = [row.message_size([4] * 3, 0, shape, number + 1) for shape in shapes.values()]
            assert sum(tensor.numel() for tensor in down.values()) == sum(one.down for one in sizes)
            assert sum(one.up for one in sizes) == 16 * len(shapes)
    for event in events_of(out, "round_done"):
        tensors, headers = 4 * 3 * 16 * len(shapes), 3 * 10_000
        assert 0 <= event["bytes_up"] - tensors < headers
        assert event["round"] == 1 or 0 <= event["bytes_down"] - tensors < headers


def test_plain_peft_loads_what_it_exports(finished, tmp_path):
    out, _, _ = finished
    want = logits(load_model(out, str(base_folder())))
    export(out, "adapter", tmp_path / "exported")
    for folder in (tmp_path / "exported", out / "final" / "trainable"):
        got = logits(PeftModel.from_pretrained(base(), folder))
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (logits(base()) - want).abs().max() > 1e-2 * want.abs().max()
    said = json.loads((out / "final" / "trainable" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 4, 4)


def protocol(names="ab"):
    """Server and clients as objects, with the initial adapters that each party would have itself."""
    server = Server.start(Rules(method="fed-sb"), cored({"m": make_pair(0, 12, 20)}, "fed-sb"), {}, list(names))
    return server, {name: client(name) for name in [*names, "new"]}


def client(name):
    return Client(Rules(method="fed-sb"), name, {"m": make_pair(7, 12, 20)})  # no core, and another A


def one_round(server, clients):
    round, updates, seen = server.open_round(list(server.clients)), [], {}
    for name, message in round.messages.items():
        work = clients[name].receive(message)
        seen[name] = tensors_of(message)
        generator = torch.Generator().manual_seed(100 * work.round + ord(name[0]))
        moved = work.start["m"].with_part("C", work.start["m"].C + torch.randn(3, 3, generator=generator))
        updates.append(server.receive(name, clients[name].reply(10, {}, update=ClientUpdate(name, {"m": moved}, 10))).update)
    return round.close(updates), seen


def test_a_new_client_and_one_that_forgot_get_what_is_around_the_core():
    """And after that they are sent cores only, and have the server's bits; so has one whose memory went through bytes."""
    server, clients = protocol()
    one_round(server, clients)
    server.set_clients(["a", "b", "new"])
    clients["a"] = Client.restore(clients["a"].dump(), Rules(method="fed-sb"), "a", clients["a"].first.adapter)
    server = Server.restore(server.dump(), Rules(method="fed-sb"), server.clients)
    result, seen = one_round(server, clients)
    assert result.exactness.max_relative_error < 1e-6
    assert {name: len(tensors) for name, tensors in seen.items()} == {"a": 1, "b": 1, "new": 3}
    clients["b"] = client("b")
    round = server.open_round()
    lacks = server.receive("b", clients["b"].receive(round.messages["b"]).reply)
    assert "NeedsFull" in type(lacks).__name__
    again = round.ask_again(["b"])["b"]
    assert len(tensors_of(again)) == 3
    work = clients["b"].receive(again)
    assert all(torch.equal(work.start["m"].parts[part], server.state.adapter["m"].parts[part]) for part in "AUC")


def test_a_server_needs_cores():
    with pytest.raises(UsageError, match=r"trains cores between fixed factors: start from `AdaptedModel.cores\(\)`"):
        Server.start(Rules(method="fed-sb"), {"m": make_pair(0)}, {}, ["a"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "fed-sb+balanced"}, UsageError, "has no gauge to choose, because its factors are frozen"),
        ({"clients": {"ranks": [1, 2, 4]}}, ConfigError, "method fed-sb needs one rank for all clients"),
        ({"server": {"momentum": 0.5}}, ConfigError, "do not go with fed-sb"),
        ({"truncation": {"rank": 2}}, ConfigError, "is for fedex-svd"),
        ({"lora": {"target_modules": ["embed_tokens"]}}, AdapterError, "is a Embedding, and cores are for linear layers: leave it out"),
    ],
)
def test_what_does_not_go_with_cores_is_refused_in_a_line(changes, error, message, tmp_path):
    with pytest.raises(error, match=re.escape(message)) as caught:
        run(configuration(**{**SETTING, **changes}), tmp_path / "run", ignore)
    assert isinstance(caught.value, FedexLoraError)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_convolutions_hold_no_core():
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(AdapterError, match="0 is a Conv2d, and cores are for linear layers"):
        next(iter(lora_layers(model).values())).hold_core()


def test_a_start_is_refused(finished, tmp_path):
    config = configuration(**SETTING)
    config = config.model_copy(update={"base": config.base.model_copy(update={"start": finished[0]})})
    with pytest.raises(ModelError, match=r"takes its factors from the base's own weights: remove base\.start"):
        run(config, tmp_path / "run", ignore)


def test_adapter_folders_of_such_clients_are_averaged_as_what_they_are(tmp_path):
    """Folders hold B = U C and the shared A: their mean is the mean of the models. On top of a result there are no cores to go on with."""
    start, net = (
        cored({"0": make_pair(0, 6, 8)}, "fed-sb")["0"],
        get_peft_model(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=3, lora_alpha=6, target_modules=["0"])),
    )
    pairs = [start.with_part("C", torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    for name, pair in zip("ab", pairs, strict=True):
        write_model(net, {"0": LoRAPair(pair.A, pair.B, pair.scaling)}, {})
        net.save_pretrained(tmp_path / name)
    found = aggregate_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "out", "fed-sb")
    assert found["max_relative_error"] < 1e-6
    core = sum(oracle.numpy64(pair.C) for pair in pairs) / 2
    want = 2.0 * oracle.numpy64(start.U) @ core @ oracle.numpy64(start.A)
    assert oracle.relative(oracle.product(read_result(tmp_path / "out").adapter["0"]), want) < 1e-6
    with pytest.raises(UsageError, match="adapter folders hold B = U C: go on with method ffa"):
        aggregate_folders([tmp_path / "a"], tmp_path / "more", "fed-sb", previous=tmp_path / "out")
