"""A party of a script: what differs from the server's, and what its training may not do, is a line at the party."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.messages import retold
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedex_lora import AdaptedModel, Client, Rules, Server, load_model, save_result
from fedex_lora.config import base_folder
from fedex_lora.errors import AdapterError, ModelError, TrainingError, UsageError
from fedex_lora.models.export import export
from fedex_lora.models.lora import set_trained
from fedex_lora.protocol.failures import failure_of
from fedex_lora.server.verdicts import Accepted
from fedex_lora.storage.result import read_result


def base(seed=0, dtype=torch.float32, intermediate_size=24):
    torch.manual_seed(seed)
    shape = LlamaConfig(vocab_size=30, hidden_size=16, intermediate_size=intermediate_size, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(shape).to(dtype)


def peft(under=None, adapter_name="default", **lora):
    under = base() if under is None else under
    torch.manual_seed(7)
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **lora})
    return get_peft_model(under, config, adapter_name=adapter_name)


@torch.no_grad()
def train(model, seed=1):
    """What a script's trainer does: steps on whatever has a gradient."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


class Party:
    """The six lines."""

    def __init__(self, name, model, rules=None):
        self.model = model
        self.party = AdaptedModel(model)
        self.me = Client(rules or Rules(), name, self.party.read()[0])

    def answer(self, message, train=train, rows=10):
        self.me.receive(message)
        self.me.load(self.party)
        train(self.model)
        return self.me.reply(rows, {})


def federation(rules=None, known=True, **lora):
    start = AdaptedModel(peft(**lora))
    return Server.start(rules or Rules(), *start.read(), ["a", "b"], base=start.base.name if known else "")


def refused(error, code, words, party, message, **how):
    """One line at the party, and its code outside."""
    with pytest.raises(error, match=words) as caught:
        party.answer(message, **how)
    assert len(str(caught.value).splitlines()) == 1
    assert failure_of(caught.value).code == code


def test_another_base_of_the_same_shapes_is_refused_at_the_party():
    server = federation()
    messages = server.open_round().messages
    refused(ModelError, "base", "other weights than the federation's", Party("a", peft(base(seed=1))), messages["a"])
    refused(ModelError, "base", "the federation's", Party("a", peft(base(dtype=torch.bfloat16))), messages["a"])
    assert isinstance(server.receive("a", Party("a", peft()).answer(messages["a"])), Accepted)


def test_the_same_weights_in_another_precision_are_another_base():
    """What is stored in 16 bits has the same values in 32, and computes otherwise."""
    half = base(dtype=torch.bfloat16)
    fingerprints = [AdaptedModel(peft(under)).base for under in (half, base().float())]
    assert fingerprints[0].name.endswith(" bfloat16 none")
    whole = base(dtype=torch.bfloat16).float()
    same = AdaptedModel(peft(whole)).base
    assert same.fingerprint() == fingerprints[0].fingerprint() != fingerprints[1].fingerprint()
    assert same.name != fingerprints[0].name


def test_a_server_without_a_model_takes_the_base_of_most_and_keeps_it():
    """Whoever answers first, and wherever the round is interrupted."""
    rules = Rules.model_validate({"clients": {"quorum": 0.6}})
    server = Server.start(rules, *AdaptedModel(peft()).read(), ["a", "b", "c"])
    parties = {name: Party(name, peft(base(seed=name == "a")), rules) for name in "abc"}
    round, updates = server.open_round(), {}
    for name, message in round.messages.items():
        updates[name] = server.receive(name, parties[name].answer(message)).update
        again = Server.restore(server.dump(), rules, ["a", "b", "c"])
        server, round = again, again.reopen(round.dump())
    ready = round.ready()
    assert (ready.clients, [one.client for one in ready.rejected]) == (["b", "c"], ["a"])
    assert "its base model is not the others'" in ready.rejected[0].reason
    assert round.close([updates["b"], updates["c"]]).base == parties["b"].party.base.name
    again = Server.restore(server.dump(), rules, ["a", "b", "c"])
    refused(ModelError, "base", "other weights", parties["a"], again.open_round().messages["a"])


def test_what_is_trained_is_float32_on_a_base_of_16_bits():
    """Heads and adapters that PEFT left in bf16, under any name: what a party goes on from is the mean, and the second round has it."""
    made = lambda: peft(base(dtype=torch.bfloat16), "ward", modules_to_save=["lm_head"])  # noqa: E731
    parties = {name: Party(name, made()) for name in "ab"}
    server = Server.start(Rules(), *AdaptedModel(made()).read(), ["a", "b"])
    for number in (1, 2):
        round, updates = server.open_round(), []
        for name, message in round.messages.items():
            answer = parties[name].answer(message, partial(train, seed=number * ord(name)))
            updates.append(server.receive(name, answer).update)
        result = round.close(updates)
        assert result.exactness.max_relative_error < 1e-6
        mean = sum(update.other["lm_head.weight"].double() for update in updates) / 2
        torch.testing.assert_close(result.state.other["lm_head.weight"].double(), mean, rtol=1e-6, atol=1e-7)
    parties["a"].party.load(result.state.adapter, result.state.base_delta, result.state.other)
    assert torch.equal(parties["a"].party.read()[1]["lm_head.weight"], result.state.other["lm_head.weight"])
    assert {tensor.dtype for pair in parties["a"].party.read()[0].values() for tensor in (pair.A, pair.B)} == {torch.float32}
    ids = torch.arange(3, 12)[None]
    parties["a"].model(ids, labels=ids).loss.backward()
    assert all(bool(one.grad.isfinite().all()) for one in parties["a"].model.parameters() if one.requires_grad)


def test_a_bias_that_is_trained_in_16_bits_is_refused():
    model = peft(base(dtype=torch.bfloat16))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match=r"norm\.weight is trained in 16 bits"):
        AdaptedModel(model)


def test_a_method_that_the_party_has_not_agreed_to_trains_nothing():
    """Also of a server that says no rules: else B would leave a party of FedSA."""
    message = retold(federation(Rules(method="fedit")).open_round().messages["a"], rules={})
    refused(UsageError, "settings", "method is fedsa here and fedit", Party("a", peft(), Rules(method="fedsa")), message)


def test_a_model_of_ones_own_without_a_name_for_its_base_takes_part():
    server = federation()
    inner = AdaptedModel(peft())
    own = SimpleNamespace(load=lambda *what: inner.load(*what) and None, read=inner.read)
    me = Client(Rules(), "a", inner.read()[0])
    me.receive(server.open_round().messages["a"])
    me.load(own)
    train(inner.model)
    assert isinstance(server.receive("a", me.reply(3, {})), Accepted)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 4, "lora_alpha": 8}, r"the rank of '.*' is 4 here and 2 at the server"),
        ({"lora_alpha": 8}, r"the scaling of '.*' is 4.0 here and 2.0 at the server"),
        ({"use_rslora": True}, "the scaling of"),
        ({"target_modules": ["q_proj"]}, r"'model.layers.0.mlp.down_proj' \(1 such\) has an adapter at the server only"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, "v_proj' .* has an adapter here only"),
        ({"under": base(intermediate_size=32)}, r"the shape of 'model.layers.0.mlp.down_proj' is \(16, 32\) here and \(16, 24\) at the"),
    ],
)
def test_another_adapter_is_refused_before_it_is_overwritten(lora, words):
    party = Party("a", peft(**lora))
    before = party.party.read()[0]
    refused(AdapterError, "adapter", words, party, federation().open_round().messages["a"])
    assert all(torch.equal(pair.A, before[name].A) and pair.scaling == before[name].scaling for name, pair in party.party.read()[0].items())


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"method": "fedit"}, """Rules: method is "fedit" here and "fedex" at the server: give both the same"""),
        ({"server": {"momentum": 0.5}}, r'Rules: server is {"momentum": 0.5} here and as by default at the server'),
        ({"weights": "uniform"}, "Rules: weights"),
        ({"seed": 3}, "Rules: seed is 3 here"),
    ],
)
def test_other_rules_are_refused_at_the_party(rules, words):
    refused(UsageError, "settings", words, Party("a", peft(), Rules(**rules)), federation().open_round().messages["a"])


def test_how_each_side_trains_and_whose_updates_count_is_its_own_affair():
    own = Rules(local={"schedule": "run"}, clients={"quorum": 0.5}, messages={"tolerance": 1e-3})
    server = federation()
    assert isinstance(server.receive("a", Party("a", peft(), own).answer(server.open_round().messages["a"])), Accepted)


def test_a_training_of_another_object_is_refused():
    server, party, copy = federation(), Party("a", peft()), peft()
    message = server.open_round().messages["a"]
    refused(TrainingError, "training", "nothing has changed in the model", party, message, train=lambda _: train(copy))
    assert isinstance(server.receive("a", party.answer(message)), Accepted)


def test_a_frozen_weight_that_was_trained_is_refused():
    def thaw(model):
        model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
        train(model)

    @torch.no_grad()
    def change(model):
        train(model)
        model.get_parameter("base_model.model.model.layers.0.self_attn.k_proj.weight").add_(1e-3)

    def merge(model):
        train(model)
        model.merge_adapter()

    def scale(model):
        train(model)
        model.base_model.model.model.layers[0].self_attn.q_proj.set_scale("default", 3.0)

    for how, words in (
        (thaw, r"model.norm.weight \(1 such\) was made trainable"),
        (change, "the training changed .*k_proj.weight, which is frozen"),
        (merge, r"the training changed .*\(2 such\), which is frozen"),
        (scale, "the training changed rank or scaling of model.layers.0.self_attn.q_proj"),
    ):
        refused(TrainingError, "training", words, Party("a", peft()), federation().open_round().messages["a"], train=how)


def test_a_factor_that_the_method_freezes_may_not_be_trained():
    """It does not travel, so the server would take the old one for it."""
    rules = Rules(method="ffa")
    server, party = federation(rules), Party("a", peft(), rules)
    message = server.open_round().messages["a"]
    refused(TrainingError, "training", "changed A of .*, which method ffa freezes in round 1: call .*set_trained", party, message)
    set_trained(party.model, "B")
    assert isinstance(server.receive("a", party.answer(message)), Accepted)


def test_what_a_trainer_made_bf16_is_loaded_and_sent_in_its_own_precision():
    """As TRL's trainers do over 4 bits: only what is trained is cast, and in the next round that is the other factor."""

    def half(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        train(model)

    rules = Rules(method="rolora")
    server, party = federation(rules), Party("a", peft(modules_to_save=["lm_head"]), rules)
    server = Server.start(rules, *party.party.read(), ["a"], base=party.party.base.name)
    for number in (1, 2, 3):
        set_trained(party.model, "BA"[number % 2 == 0])
        round = server.open_round()
        update = server.receive("a", party.answer(round.messages["a"], half)).update
        assert {tensor.dtype for tensor in (*update.other.values(), *(p.A for p in update.adapter.values()))} == {torch.float32}
        for name, pair in update.adapter.items():
            trained = party.model.get_parameter(f"base_model.model.{name}.lora_{'BA'[number % 2 == 0]}.default.weight")
            assert trained.dtype == torch.bfloat16
            assert torch.equal(getattr(pair, "BA"[number % 2 == 0]), trained.float())
        round.close([update])


def test_wrong_objects_are_a_line():
    server, model = federation(), peft()
    for wrong in ("a/folder", None, LoraConfig()):
        with pytest.raises(UsageError, match=r"AdaptedModel takes a model, as peft.get_peft_model gives it, and this is a"):
            AdaptedModel(wrong)
    party = AdaptedModel(model)
    for wrong in (party, party.read(), "a/folder"):
        with pytest.raises(UsageError, match=r"a client's first adapter is AdaptedModel\(model\).read\(\)\[0\], and this is a"):
            Client(Rules(), "a", wrong)
    me = Client(Rules(), "a", party.read()[0])
    me.receive(server.open_round().messages["a"])
    for wrong in (model, "a/folder", None):
        with pytest.raises(UsageError, match=r"load takes AdaptedModel\(model\), and this is a"):
            me.load(wrong)


@pytest.mark.parametrize("name", ["default", "ward"])
def test_an_adapter_of_any_name_goes_all_the_way(tmp_path, name):
    """Two parties, two rounds, saved and loaded: the mean of products by the plain formula, as under PEFT's usual name."""
    more = {"modules_to_save": ["lm_head"], "adapter_name": name}
    server = federation(**more)
    parties = {who: Party(who, peft(**more)) for who in "ab"}
    assert all(".ward." in key for key, one in parties["a"].model.named_parameters() if one.requires_grad) == (name == "ward")
    gained = {}
    for number in (1, 2):
        round, updates = server.open_round(), []
        for who, message in round.messages.items():
            seed, rows = number * ord(who), 10 if who == "a" else 30
            answer = parties[who].answer(message, lambda model, seed=seed: train(model, seed), rows)
            updates.append(server.receive(who, answer).update)
        result = round.close(updates)
        for module in result.state.adapter:
            pairs = [update.adapter[module] for update in updates]
            mean = sum(p * one.scaling * one.B.double() @ one.A.double() for p, one in zip((0.25, 0.75), pairs, strict=True))
            start = gained.get(module, torch.zeros_like(mean))
            after = result.state.adapter[module]
            rest = result.state.base_delta[module].dense() if module in result.state.base_delta else torch.zeros_like(mean)
            assert torch.linalg.norm(start + mean - rest - after.delta()) < 1e-6 * torch.linalg.norm(mean)
            gained[module] = rest
    save_result(tmp_path / "out", result, parties["a"].party.format)
    loaded, here = load_model(tmp_path / "out", base()), parties["a"]
    here.party.load(result.state.adapter, result.state.base_delta, result.state.other)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, here.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    assert result.exactness.max_relative_error < 1e-6


@pytest.mark.parametrize("way", ["add_adapter", "mixed"])
def test_adapters_outside_a_peft_model_are_refused(way):
    """Nobody could tell plain LoRA from DoRA there."""
    model, lora = base(), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    if way == "add_adapter":
        model.add_adapter(lora)
    else:
        model = get_peft_model(model, lora, mixed=True)
    with pytest.raises(UsageError, match=r"with adapters in it: wrap the plain base by get_peft_model\(base, LoraConfig\(\.\.\.\)\)$"):
        AdaptedModel(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_federation_begins_on_a_plain_base(dtype, tmp_path):
    """What a base has gained is no part of a new one: refused, until it is in the weights of an export, which the parties go on from."""
    base(dtype=dtype).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base_folder()).save_pretrained(tmp_path / "base")
    start = AdaptedModel(peft(base(dtype=dtype)))
    for method in ("fedit", "fedex"):
        server = Server.start(Rules(method=method), *start.read(), ["a", "b"])
        round = server.open_round()
        parties = {who: Party(who, peft(base(dtype=dtype)), Rules(method=method)) for who in "ab"}
        answers = {who: one.answer(round.messages[who], lambda model, who=who: train(model, ord(who))) for who, one in parties.items()}
        save_result(tmp_path / method, round.close([server.receive(*answer).update for answer in answers.items()]), start.format)
    AdaptedModel(load_model(tmp_path / "fedit", tmp_path / "base"))  # which has gained nothing
    loaded, ids = load_model(tmp_path / "fedex", tmp_path / "base"), torch.arange(3, 12)[None]
    with pytest.raises(UsageError, match=r"go on by run with base\.start, by aggregate\(\.\.\., state=\.\.\.\), or from what"):
        AdaptedModel(loaded)
    export(tmp_path / "fedex", "base+adapter", tmp_path / "out", tmp_path / "base")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter", is_trainable=True)
    want = model.eval()(ids).logits
    server = Server.start(Rules(), *AdaptedModel(model).read(), ["a"])
    assert torch.equal(model(ids).logits, want)
    torch.testing.assert_close(want, loaded(ids).logits.float(), rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.02)
    assert isinstance(server.receive("a", Party("a", model).answer(server.open_round().messages["a"])), Accepted)


def test_two_active_adapters_are_no_adapted_model():
    model = peft()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    AdaptedModel(model)  # it is there, and does nothing
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match=r"the model has 2 active adapters .default, second., and one is trained: use set_adapter"):
        AdaptedModel(model)


def test_a_saved_result_knows_its_base(tmp_path):
    """As other results do: another base of the same shapes is refused, and a name is loaded in the precision of the training."""
    half = base(dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    base(seed=1).save_pretrained(tmp_path / "other")
    start = AdaptedModel(peft(half))
    server = Server.start(Rules(), *start.read(), ["a"])
    round = server.open_round()
    update = server.receive("a", Party("a", peft(base(dtype=torch.bfloat16))).answer(round.messages["a"])).update
    save_result(tmp_path / "out", round.close([update]), start.format)
    manifest = read_result(tmp_path / "out").manifest
    assert (manifest["base_dtype"], manifest["base_quantization"]) == ("bfloat16", "none")
    assert load_model(tmp_path / "out", tmp_path / "half").dtype == torch.bfloat16
    with pytest.raises(ModelError, match="other is not the base of this result: its weights differ"):
        load_model(tmp_path / "out", tmp_path / "other")


def test_peft_saves_the_ranks_that_a_load_has_made(tmp_path):
    """`save_pretrained` after a load of other ranks: plain PEFT loads it, and computes the same."""
    model, wide = peft(), AdaptedModel(peft(r=6, lora_alpha=3, rank_pattern={"down_proj": 4}))
    train(wide.model)
    adapted = AdaptedModel(model)
    adapted.load(wide.read()[0], {}, {})
    assert (model.peft_config["default"].r, adapted.format.config["r"]) == (4, 4)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 12)[None]
    again = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    torch.testing.assert_close(again(ids).logits, wide.model.eval()(ids).logits)
