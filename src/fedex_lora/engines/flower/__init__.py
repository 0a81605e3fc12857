"""The same federation over Flower (extra `flower`): our round loop over its Grid, our clients in its ClientApp.

Flower carries messages and starts processes. Sampling, quorum, deadline, validation, checkpoints and resume are those of `runs`.
Nothing heavy is imported here: Flower starts a process for every message. `app_folder` does not need flwr, so that a folder for it can be
written without it.
"""

ENVIRONMENT = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Set for every process of Flower: nothing is told to anybody outside the federation."""
