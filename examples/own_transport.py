"""Your own transport: a server and two clients are three processes with pipes between them. Run it: python examples/own_transport.py"""

from multiprocessing import get_context

from own_loop import NAMES, RULES, build, train

from fedex_lora import Client, Server


def client(name, pipe):
    """One client's process: bytes come in, bytes go out, until there are no more."""
    model = build()
    me = Client(RULES, name, model.read()[0])
    while message := pipe.recv_bytes():
        work = me.receive(message)
        me.load(model)
        pipe.send_bytes(me.reply(train(model.model, name, work.round), {}))


if __name__ == "__main__":
    model, context, pipes = build(), get_context("spawn"), {}
    for name in NAMES:
        pipes[name], theirs = context.Pipe()
        context.Process(target=client, args=(name, theirs), daemon=True).start()
    server = Server.start(RULES, *model.read(), NAMES, base=model.base.name)
    for number in (1, 2, 3):
        round = server.open_round()
        for name, message in round.messages.items():
            pipes[name].send_bytes(message)
        updates = [server.receive(name, pipe.recv_bytes()).update for name, pipe in pipes.items()]
        print(f"round {number}: exactness error {round.close(updates).exactness.max_relative_error:.1e}")
    for pipe in pipes.values():
        pipe.send_bytes(b"")
