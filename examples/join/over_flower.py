"""Three parties over Flower, in its simulation. Run it: python examples/join/over_flower.py (on a SuperLink: flwr run examples/join)"""

import os
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from in_process import federate
from party import NAMES, RULES
from script import prepare

from fedex_lora import AdaptedModel, Client
from fedex_lora.protocol.failures import failure_of

server_app = ServerApp()
client_app = ClientApp()
OURS = "fedex-lora"


@client_app.train()
def answer(message, context):
    """One answer. Flower may use a new process for each, so it keeps what the party remembers; and of an error only a code leaves."""
    asked, memory = message.content[OURS], context.state.get(OURS)
    model, train = prepare(asked["name"])
    party = AdaptedModel(model)
    first = party.read()[0]
    me = Client.restore(memory["dump"], RULES, asked["name"], first) if memory else Client(RULES, asked["name"], first)
    try:
        work = me.receive(asked["message"])
        me.load(party)
        reply = me.reply(train(work.round), {})
    except Exception as error:
        reply = me.fail(failure_of(error).code)
    context.state[OURS] = ConfigRecord({"dump": me.dump()})
    return Message(RecordDict({OURS: ConfigRecord({"answer": reply})}), reply_to=message)


@server_app.main()
def main(grid, context):
    """All rounds. A node is known by the name that it was registered under; in a simulation it has none."""
    while len(grid.get_nodes()) < len(NAMES):
        time.sleep(1)
    nodes = sorted(grid.get_nodes(), key=lambda node: node.node_id)
    number = {node.name or NAMES[index]: node.node_id for index, node in enumerate(nodes)}

    def ask(messages):
        content = {name: RecordDict({OURS: ConfigRecord({"name": name, "message": message})}) for name, message in messages.items()}
        out = [Message(content[name], dst_node_id=number[name], message_type="train") for name in messages]
        came = {reply.metadata.src_node_id: reply.content[OURS]["answer"] for reply in grid.send_and_receive(out)}
        return {name: came[number[name]] for name in messages}

    federate(ask, context.run_config.get("out", "trained/over-flower"))


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    run_simulation(server_app, client_app, num_supernodes=len(NAMES), backend_config={"client_resources": {"num_cpus": 1}})
