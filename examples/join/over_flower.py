"""Three parties over Flower, in its simulation. Run it: python examples/join/over_flower.py (on a SuperLink: flwr run examples/join)"""

import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from in_process import federate
from party import NAMES, RULES
from script import prepare

from fedex_lora import AdaptedModel, Client
from fedex_lora.protocol.envelopes import answer_of
from fedex_lora.protocol.failures import failure_of, told_to_end
from fedex_lora.runs.party_log import log_failure, party_log

server_app = ServerApp()
client_app = ClientApp()
OURS = "fedex-lora"


@client_app.train()
def answer(message, context):
    """One answer. Flower may use a new process for each, so it keeps what the party remembers; and of an error only a code leaves."""
    asked, name, memory = b"", "", context.state.get(OURS)
    try:
        asked, name = message.content[OURS]["message"], name_of(context)
        model, train = prepare(name)
        party = AdaptedModel(model)
        first = party.read()[0]
        me = Client.restore(memory["dump"], RULES, name, first) if memory else Client(RULES, name, first)
        work = me.receive(asked)  # it refuses a message for another name
        me.load(party)
        reply = me.reply(train(work.round), {})
        context.state[OURS] = ConfigRecord({"dump": me.dump()})
    except BaseException as error:
        if told_to_end(error):
            raise
        failure = failure_of(error)
        log_failure(party_log(Path("trained", name)), error, failure, name)
        reply = answer_of(asked, name, failure)
    return Message(RecordDict({OURS: ConfigRecord({"answer": reply})}), reply_to=message)


def name_of(context):
    """This party's own word for itself, and never the server's: --node-config 'client="bone"'. A simulation numbers its nodes."""
    own = context.node_config
    return str(own["client"]) if "client" in own else NAMES[own["partition-id"]]


@client_app.query()
def who(message, context):
    """The name of a node of a simulation, where it was registered under none."""
    return Message(RecordDict({OURS: ConfigRecord({"name": name_of(context)})}), reply_to=message)


@server_app.main()
def main(grid, context):
    """All rounds. A node is known by the name that it was registered under; in a simulation it has none, and is asked."""
    while len(grid.get_nodes()) < len(NAMES):
        time.sleep(1)
    number = {node.name: node.node_id for node in grid.get_nodes() if node.name}
    unnamed = [node.node_id for node in grid.get_nodes() if not node.name]
    said = grid.send_and_receive([Message(RecordDict(), dst_node_id=node, message_type="query") for node in unnamed])
    number |= {reply.content[OURS]["name"]: reply.metadata.src_node_id for reply in said}

    def ask(messages):
        content = {name: RecordDict({OURS: ConfigRecord({"message": message})}) for name, message in messages.items()}
        out = [Message(content[name], dst_node_id=number[name], message_type="train") for name in messages]
        came = {reply.metadata.src_node_id: reply.content[OURS]["answer"] for reply in grid.send_and_receive(out)}
        return {name: came[number[name]] for name in messages}

    federate(ask, context.run_config.get("out", "trained/over-flower"))


if __name__ == "__main__":
    from flwr.simulation import run_simulation

    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    run_simulation(server_app, client_app, num_supernodes=len(NAMES), backend_config={"client_resources": {"num_cpus": 1}})
