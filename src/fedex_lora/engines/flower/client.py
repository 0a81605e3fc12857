"""Flower's ClientApp around one party. Flower starts a process for every message, so nothing heavy is imported before it is needed."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedex_lora.engines.flower._log import log_of
from fedex_lora.engines.flower._messages import Envelope, from_record, to_record
from fedex_lora.engines.flower._request import NodeRequest
from fedex_lora.engines.flower._worker import ask
from fedex_lora.errors import WireError
from fedex_lora.protocol.failures import failure_of
from fedex_lora.protocol.messages import answer_of, encode_failure
from fedex_lora.runs.party_log import log_failure


def client_app(config: Path) -> ClientApp:
    """The ClientApp of a run. Whatever fails, a code leaves and no text: Flower itself would send the text of an exception.

    Args:
        config: the run's configuration, a file of the app folder.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            reply = _answer(config, message, context)
        except (KeyboardInterrupt, SystemExit):  # Flower ends its process so
            raise
        except BaseException as error:
            failure, asked = failure_of(error), from_record(message)
            log_failure(log_of(context.node_config), error, failure, "this node")
            reply = answer_of(asked.payload, asked.about.get("client", ""), failure) if asked else encode_failure(failure, "")
        return Message(to_record(Envelope(reply, {})), reply_to=message)

    return app


def _answer(config: Path, message: Message, context: Context) -> bytes:
    packet = from_record(message)
    if packet is None or not {"run", "base", "client"} <= packet.about.keys():
        raise WireError("the server's message is not of this protocol: use one version of fedex-lora everywhere")
    about = {key: packet.about[key] for key in ("run", "base", "client")}
    node = dict(context.node_config)
    return ask(NodeRequest(payload=packet.payload, config=config.read_text(encoding="utf-8"), node=node, **about))
