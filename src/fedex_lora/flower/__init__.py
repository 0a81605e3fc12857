"""The same federation over Flower (extra `flower`): our round loop over its Grid, our clients in its ClientApp.

Flower carries messages and starts processes. Sampling, quorum, deadline, validation, checkpoints and resume are `rounds`, as in process.
`flwr` itself is imported only by the apps, so that a folder for it can be written without it.
"""

from fedex_lora.flower._folder import write_app

__all__ = ["ENVIRONMENT", "write_app"]

ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Set for every process of Flower: nothing is told to anybody outside the federation."""
