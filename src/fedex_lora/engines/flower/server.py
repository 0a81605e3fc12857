"""Flower's ServerApp around our round loop."""

from logging import INFO
from pathlib import Path

from flwr.app import Context
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedex_lora.client.arguments import without_trainer
from fedex_lora.config import Config, read_config
from fedex_lora.engines.flower._exchange import GridExchange
from fedex_lora.engines.flower._settings import RunSettings, read_settings
from fedex_lora.engines.flower.app_folder import require_federated
from fedex_lora.runs.context import GlobalModel, ModelContext
from fedex_lora.runs.emit import log_line
from fedex_lora.runs.round_loop import Federation
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import ranks_of
from fedex_lora.server.checks import require_consistent
from fedex_lora.storage.events import Event
from fedex_lora.storage.run_folder import word_of
from fedex_lora.tasks import load_task
from fedex_lora.tasks.dealt import dealt
from fedex_lora.types import ServerState


def server_app(config: Path) -> ServerApp:
    """The ServerApp of a run: it begins, or goes on with what its run folder holds.

    Args:
        config: the run's configuration, a file of the app folder.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings, given = read_settings(RunSettings(), context.run_config, "run config"), read_config(config)
        out = Path(settings.out).expanduser().absolute()
        log(INFO, "run folder: %s", out)
        run(given, out, narrate, resume=True, home=lambda config, emit: Deployment(config, grid, settings.names))
        log(INFO, "final model: %s   check it: fedex-lora verify %s", out / "final", out)

    return app


class Deployment:
    """The server of a run whose clients are Flower's nodes.

    Args:
        config: the run.
        grid: Flower's.
        names: the clients, which hold rows of their own; none: those to whom the configuration deals its rows.

    Raises:
        FedexLoraError: whatever is wrong with the configuration, the evaluation rows or the model.
    """

    def __init__(self, config: Config, grid: Grid, names: list[str]) -> None:
        require_federated(config, names)
        if config.local.trainer:
            log(INFO, "local.trainer is each party's own word: a node that has not said trainer= does not train")
        config = without_trainer(config)
        task, parts = (load_task(config.task, config.seed), {}) if names else dealt(config)
        known = not config.privacy.is_on
        self._rows = dict.fromkeys(names, 0) or {client: len(mine) if known else 0 for client, (mine, _) in parts.items()}
        require_consistent(config, len(self._rows))
        config = config.model_copy(update={"privacy": config.privacy.model_copy(update={"rows": None})})  # each node states its own
        self.host = GlobalModel(ModelContext(config, task), ranks_of(config, self._rows))
        self._grid, self._about = grid, dict[str, str]()

    def require(self, out: Path) -> None:
        """Nothing: each party looks at its own ledger."""

    def initial(self) -> ServerState:
        """The state before round 1."""
        return self.host.initial()

    def federation(self) -> Federation:
        """What the round loop needs of this place."""
        return self.host.federation(self._rows, GridExchange(self._grid, list(self._rows), self._about))

    def remember_in(self, out: Path) -> None:
        """Clients keep their own memory; they know this run, and no other under the same name, by a word in the run folder."""
        self._about = {"run": word_of(out), "base": self.host.place.identity}


def narrate(event: Event) -> None:
    """Events as lines of Flower's log."""
    if line := log_line(event):
        log(line[0], "%s", line[1])
