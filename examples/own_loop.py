"""Your own training loop: two clients of one federation train one PEFT model in turn. Run it: python examples/own_loop.py"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedex_lora import AdaptedModel, Client, Rules, Server

RULES, NAMES = Rules(method="fedex"), ["north", "south"]


def build():
    """The same model, bit for bit, wherever it is built."""
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return AdaptedModel(get_peft_model(LlamaForCausalLM(shape), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))


def train(model, name, round):
    """Your own loop over your own rows; here they are numbers that anybody can draw."""
    rows = torch.randint(50, (8, 12), generator=torch.Generator().manual_seed(100 * round + NAMES.index(name)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return len(rows)


if __name__ == "__main__":
    model = build()
    server = Server.start(RULES, *model.read(), NAMES, base=model.base.name)
    clients = {name: Client(RULES, name, model.read()[0]) for name in NAMES}
    for number in (1, 2, 3):
        round, updates = server.open_round(), []
        for name, message in round.messages.items():
            clients[name].receive(message)
            clients[name].load(model)
            updates.append(server.receive(name, clients[name].reply(train(model.model, name, number), {})).update)
        print(f"round {number}: exactness error {round.close(updates).exactness.max_relative_error:.1e}")
