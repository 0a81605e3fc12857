"""What a party is handed to go on: enough to load, to verify and to go on to the same bits; nobody's adapter, name, weight or rows."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests import oracle
from tests.cli.test_cli import call, one_line
from tests.conftest import make_updates
from tests.finished_runs import small_run
from transformers import AutoModelForCausalLM

from fedex_lora import LowRank, load_model
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.truncation import without_blocks
from fedex_lora.config import base_folder
from fedex_lora.models.merge import logits
from fedex_lora.storage.files import read_manifest
from fedex_lora.storage.handout import _plain_name
from fedex_lora.storage.result import read_result

NAMES = ("st-mary", "ward-seven", "dr-jones")
SECRET = "Quagmire"
WEIGHTS = "0.21739,0.30435,0.47826"
FILES = {
    "manifest.json",
    "base_delta.safetensors",
    "trainable/README.md",
    "trainable/adapter_config.json",
    "trainable/adapter_model.safetensors",
}


def trained(folder, seed, model=None):
    """An adapter, trained for two steps from new factors, or from those of a model."""
    torch.manual_seed(seed)
    if model is None:
        config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder()), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        rows = torch.randint(3, model.config.vocab_size, (4, 12))
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def handed(tmp_path_factory):
    """Three adapters, their aggregate, and the folder for parties."""
    root = tmp_path_factory.mktemp("handed")
    adapters = [trained(root / name, seed) for seed, name in enumerate(NAMES)]
    for folder in adapters:  # what one party's file says of that party
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "revision": SECRET, "auto_mapping": {"parent_library": SECRET}}))
    done = call("aggregate", *adapters, "--weights", WEIGHTS, "-o", root / "out", "--for-parties", root / "parties", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["for_parties"] == str(root / "parties")
    return root, adapters


def every_byte(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_parties_go_on_to_the_same_bits(handed, tmp_path):
    """Each has the folder for parties alone; what they send is aggregated on top of it, and of everything: the same bits."""
    root, _ = handed
    sent = []
    for seed, party in enumerate(("north", "south")):
        mine = shutil.copytree(root / "parties", tmp_path / party / "from-the-server")
        checked = call("verify", mine, "--base", base_folder(), "--json")
        assert checked.exit_code == 0, checked.stderr
        found = json.loads(checked.stdout)
        assert found["recomputed"] is False
        assert found["max_relative_error"] is None
        assert found["realised_error"] < 3 * found["floor"]
        assert torch.equal(logits(load_model(mine, base_folder())), logits(load_model(root / "out", base_folder())))
        sent.append(trained(tmp_path / party / "adapter", 10 + seed, load_model(mine, base_folder())))
    sent = [folder.rename(tmp_path / folder.parent.name / f"{folder.parent.name}-adapter") for folder in sent]
    for state, out in ((root / "parties", "next"), (root / "out", "next-of-everything")):
        done = call("aggregate", *sent, "--state", state, "-o", tmp_path / out)
        assert done.exit_code == 0, done.stderr
        assert call("verify", tmp_path / out).exit_code == 0
    here, there = (every_byte(tmp_path / out) for out in ("next", "next-of-everything"))
    tensors = [name for name in here if name.endswith(".safetensors")]
    assert here.keys() == there.keys()
    assert len(tensors) == 6  # trainable, adapter, both deltas, two updates
    assert all(here[name] == there[name] for name in tensors)
    assert read_result(tmp_path / "next").manifest["round"] == 2


def test_it_holds_nothing_of_single_parties(handed):
    root, adapters = handed
    assert every_byte(root / "parties").keys() == FILES
    manifest = read_manifest(root / "parties")
    assert not {"inputs", "sources", "total_weight", "clients", "adapters", "participants"} & manifest.keys()
    words = [*NAMES, *WEIGHTS.split(","), *(str(weight) for weight in read_result(root / "out").weights.values()), "num_examples"]
    assert len(words) == 10
    for name, content in every_byte(root / "parties").items():
        assert not [word for word in words if word.encode() in content], name
    assert all(any(name.encode() in content for content in every_byte(root / "out").values()) for name in NAMES)  # the check can fail
    shared = [tensor for path in (root / "parties").rglob("*.safetensors") for tensor in load_file(path).values()]
    for folder in adapters:
        for theirs in load_file(folder / "adapter_model.safetensors").values():
            assert not any(theirs.shape == tensor.shape and torch.equal(theirs, tensor) for tensor in shared)


def blocks(delta, adapter, p):
    """Every client's factors, worked out from a closed form's blocks, with the means and the weights."""
    r = adapter.rank
    V, U = delta.V.double().split(r), delta.U.double().split(r, dim=1)
    last = adapter.A.double() - sum(share * v for share, v in zip(p, V, strict=False))
    return [(last + v, adapter.B.double() + u / (adapter.scaling * share)) for u, v, share in zip(U, V, p, strict=False)]


def worst_guess(delta, adapter, updates, module, p):
    """How near the nearest guess is to a client's own product, relative to it."""
    own = [oracle.product(update.adapter[module]) for update in updates]
    guesses = [adapter.scaling * (B @ A).numpy() for A, B in blocks(delta, adapter, p)]
    return min(oracle.relative(guess, one) for guess in guesses for one in own)


def test_the_base_delta_has_nobody_s_block_in_it(handed):
    """From the closed form's factors anybody who knows the weights has the others' adapters to seven digits; from the product's not."""
    root, adapters = handed
    plain = root / "plain"
    assert call("aggregate", *adapters, "--weights", WEIGHTS, "-o", plain).exit_code == 0
    open_to_all, handed_out = read_result(plain), read_result(root / "parties")
    p = sorted(map(float, WEIGHTS.split(",")))
    for module, adapter in handed_out.adapter.items():
        assert worst_guess(open_to_all.base_delta[module], adapter, open_to_all.updates, module, p) < 1e-5
        assert worst_guess(handed_out.base_delta[module], adapter, open_to_all.updates, module, p) > 0.1
    whole = {module: delta.dense() for module, delta in open_to_all.base_delta.items()}
    assert all(oracle.relative(handed_out.base_delta[name].dense().numpy(), matrix.numpy()) < 1e-6 for name, matrix in whole.items())
    assert call("verify", root / "out").exit_code == 0


def test_nor_of_an_earlier_round(handed, tmp_path):
    """What is handed out on top of a plain result, whose base delta has the blocks of its round."""
    _, adapters = handed
    assert call("aggregate", *adapters, "--weights", WEIGHTS, "-o", tmp_path / "plain").exit_code == 0
    base = load_model(tmp_path / "plain", base_folder())
    more = [trained(tmp_path / f"more-{seed}", seed, base) for seed in (20, 21)]
    done = call("aggregate", *more, "--state", tmp_path / "plain", "-o", tmp_path / "out", "--for-parties", tmp_path / "parties", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["max_relative_error"] < 1e-6
    assert call("verify", tmp_path / "out").exit_code == 0
    plain, handed_out = read_result(tmp_path / "plain"), read_result(tmp_path / "parties")
    p = sorted(map(float, WEIGHTS.split(",")))
    for module, adapter in plain.adapter.items():
        known, told = plain.base_delta[module], handed_out.base_delta[module]
        first = LowRank(told.U[:, : known.rank], told.V[: known.rank])  # where the earlier round's blocks would be
        assert worst_guess(known, adapter, plain.updates, module, p) < 1e-5
        assert worst_guess(first, adapter, plain.updates, module, p) > 0.1


@pytest.mark.parametrize("method", ["fedex", "reinit", "keep"])
def test_nor_has_what_a_run_sends(method):
    """The residual of a round, as every client is sent it."""
    first = make_updates(1, seed=9)[0]
    state = server.init(first.adapter, first.other, method)
    updates = make_updates(3, seed=2)
    state, result = server.step(state, updates, "uniform")
    for module, gain in result.residual.items():
        pairs = [update.adapter[module] for update in updates]
        directions = [torch.linalg.qr(pair.A.double().T - pairs[-1].A.double().T).Q for pair in pairs[:-1]]
        for row in torch.split(gain.V.double(), pairs[0].rank):
            span = torch.linalg.qr(row.T).Q
            shared = [float(torch.linalg.matrix_norm(q.T @ span) ** 2) / span.shape[1] for q in directions]
            assert max(shared) < 0.99  # a block would span one client's differences: 1
    assert state.round == 1


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_factors_without_blocks_keep_the_product(size):
    """However small it is, against fp64; and dependent columns do no harm."""
    torch.manual_seed(0)
    U, V = torch.randn(30, 6), size * torch.randn(6, 20)
    for gain in (LowRank(U, V), LowRank(torch.cat([U, U], 1), torch.cat([V, -0.5 * V]))):
        got = without_blocks(gain)
        assert oracle.relative(got.dense().numpy(), gain.dense().numpy()) < 3e-7
        assert got.rank == gain.rank


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--for-parties", "out"], 2, "lie in one another"),
        (["--for-parties", "out/parties"], 2, "lie in one another"),
        (["--for-parties", "st-mary/parties"], 2, "lies in one of the folders that are read"),
        (["--for-parties", "taken"], 2, "is not empty"),
        (["--for-parties", "parties", "--weights", "0,1,0"], 2, "would hand out one party's adapter as it is"),
        (["--for-parties", "parties", "--weights", "1,2"], 1, "2 weights for 3 updates"),
    ],
)
def test_where_it_cannot_be(options, status, message, handed, tmp_path, monkeypatch):
    """Nothing is written then, not even OUT."""
    root, _ = handed
    for name in NAMES:
        shutil.copytree(root / name, tmp_path / name)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = every_byte(tmp_path)
    assert message in one_line(call("aggregate", *NAMES, "-o", "out", *options), status)
    assert every_byte(tmp_path) == before


def test_of_one_adapter(handed, tmp_path):
    """Which the folder for parties would hold bit for bit: alone, or all that counts of merged regions."""
    _, adapters = handed
    said = "would hand out one party's adapter as it is"
    assert said in one_line(call("aggregate", adapters[0], "-o", tmp_path / "out", "--for-parties", tmp_path / "p"), 2)
    assert list(tmp_path.iterdir()) == []
    for region, adapter in zip(("north", "south"), adapters, strict=False):
        assert call("aggregate", adapter, "-o", tmp_path / region).exit_code == 0
    merging = ["aggregate", "--merge", tmp_path / "north", tmp_path / "south", "-o", tmp_path / "all", "--for-parties", tmp_path / "p"]
    assert said in one_line(call(*merging, "--weights", "1,0"), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["north", "south"]
    assert call(*merging, "--weights", "2,1").exit_code == 0


def test_of_merged_regions(handed, tmp_path):
    _, adapters = handed
    for region, members, weights in (("north", adapters[:2], "1,2"), ("south", adapters[2:], "4")):
        assert call("aggregate", *members, "--weights", weights, "-o", tmp_path / region).exit_code == 0
    merged = call("aggregate", "--merge", tmp_path / "north", tmp_path / "south", "-o", tmp_path / "all", "--for-parties", tmp_path / "p")
    assert merged.exit_code == 0, merged.stderr
    assert every_byte(tmp_path / "p").keys() == FILES
    assert call("verify", tmp_path / "all").exit_code == 0
    everything, party = read_result(tmp_path / "all"), read_result(tmp_path / "p")
    assert all(torch.equal(everything.base_delta[name].U, delta.U) for name, delta in party.base_delta.items())
    assert not any(name.encode() in content for name in (*NAMES, "north", "south") for content in every_byte(tmp_path / "p").values())


def test_a_run_s_final_holds_no_updates(tmp_path):
    """Nor names, weights and rows of clients; it loads, exports and is verified with its run, and alone by its sums."""
    out = small_run(tmp_path / "run")
    assert every_byte(out / "final").keys() == FILES
    assert {"inputs", "participants", "refused", "train_rows", "held"}.isdisjoint(read_manifest(out / "final"))
    clients = [entry["client"] for entry in read_manifest(out / "rounds" / "0002")["inputs"]]
    assert len(clients) == 3
    assert not any(client.encode() in content for client in clients for content in every_byte(out / "final").values())
    last = every_byte(out / "rounds" / "0002")
    assert all(content == last[name] for name, content in every_byte(out / "final").items() if name != "manifest.json")
    checked = json.loads(call("verify", out, "--json").stdout)
    assert (checked["recomputed"], checked["final"]) == (True, str(out / "final"))
    assert "bit for bit" in call("verify", out).stdout
    alone = call("verify", out / "final")
    assert alone.exit_code == 0
    assert "the ideal is not recomputed" in alone.stdout
    assert torch.equal(logits(load_model(out, base_folder())), logits(load_model(out / "rounds" / "0002", base_folder())))
    exported = call("export", out, "--as", "adapter", "-o", tmp_path / "exported", "--base", base_folder())
    assert exported.exit_code == 0, exported.stderr


@pytest.mark.parametrize("file", ["base_delta.safetensors", "trainable/adapter_model.safetensors", "trainable/adapter_config.json"])
def test_a_final_that_is_not_the_last_round(file, tmp_path):
    """Also where its own manifest agrees with it: the earlier round's, or a file that is not there."""
    from tests.storage.test_not_finite import signed

    out = small_run(tmp_path / "run")
    assert call("verify", out).exit_code == 0
    path = out / "final" / file
    if file.endswith("json"):
        path.write_text(path.read_text().replace('"lora_dropout"', '"lora_dropout" '))
    else:
        shutil.copyfile(out / "rounds" / "0001" / file, path)
    signed(out / "final", file)
    assert f"final/{file} is not what the last round left" in one_line(call("verify", out), 1)
    manifest = json.loads((out / "final" / "manifest.json").read_text())
    del manifest["files"][file]
    (out / "final" / "manifest.json").write_text(json.dumps(manifest))
    assert f"final/{file} is not what the last round left" in one_line(call("verify", out), 1)


@pytest.mark.parametrize("folder", ["rounds/0001", "rounds/0002", "final"])
def test_a_folder_of_a_run_without_its_manifest(folder, tmp_path):
    out = small_run(tmp_path / "run")
    (out / folder / "manifest.json").unlink()
    assert f"{folder} has no manifest.json" in one_line(call("verify", out), 1)


def changed(folder, **facts):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_a_file_without_a_sum_is_not_verified(handed, tmp_path):
    """Neither one that somebody laid there, nor one that the manifest has forgotten."""
    root, _ = handed
    mine = shutil.copytree(root / "parties", tmp_path / "parties")
    (mine / "updates").mkdir()
    (mine / "updates" / "x").write_text("mine")
    assert "updates/x has no sum" in one_line(call("verify", mine), 1)
    shutil.rmtree(mine / "updates")
    assert call("verify", mine).exit_code == 0
    sums = read_manifest(mine)["files"]
    for file in sums:
        changed(mine, files={name: digest for name, digest in sums.items() if name != file})
        assert f"{file} has no sum" in one_line(call("verify", mine), 1)
    changed(mine, files={})
    assert "has no sum" in one_line(call("verify", mine), 1)


@pytest.mark.parametrize("facts", [{"method": "fedit"}, {"round": 7}, {"base_model": "another"}])
def test_a_final_that_says_another_thing_than_the_last_round(facts, tmp_path):
    out = small_run(tmp_path / "run", rounds=1)
    changed(out / "final", **facts)
    assert f"final/{next(iter(facts))} is not what the last round left" in one_line(call("verify", out), 1)


def test_what_names_inputs_must_have_them(handed, tmp_path):
    """A folder that says whose updates it averaged, and has lost them, is not taken for a folder for parties."""
    _, adapters = handed
    assert call("aggregate", *adapters, "--no-updates", "-o", tmp_path / "out").exit_code == 0
    assert "nothing to verify" in one_line(call("verify", tmp_path / "out"), 1)
    assert read_result(tmp_path / "out").weights.keys() == set(NAMES)


def test_nothing_of_one_party_s_configuration_is_handed_on(handed):
    root, _ = handed
    for name, content in every_byte(root / "parties").items():
        assert SECRET.encode() not in content, name
        assert str(base_folder().parent).encode() not in content, name  # a path of the machine that trained
    assert b'"base_model_name_or_path": "demo_base"' in every_byte(root / "parties")["trainable/adapter_config.json"]


@pytest.mark.parametrize(
    ("base", "plain"),
    [
        ("org/llama", "org/llama"),
        ("llama", "llama"),
        ("/srv/m/llama", "llama"),
        ("~/llama/", "llama"),
        ("./llama", "llama"),
        ("a/b/llama", "llama"),
        (r"C:\m\llama", "llama"),
        (None, None),
    ],
)
def test_a_base_is_called_by_its_name_and_never_by_its_path(base, plain):
    assert _plain_name(base) == plain
