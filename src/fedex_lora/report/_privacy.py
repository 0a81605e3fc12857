"""What a report says of privacy: of private runs only, as their first events have it."""

from collections.abc import Sequence

import pandas as pd

from fedex_lora.report._groups import Group
from fedex_lora.report._sections import Section
from fedex_lora.report._tables import significant, sortable


def privacy_section(groups: Sequence[Group]) -> Section:
    """What the runs promise of each party's records, and with which noise; nothing where all are plain."""
    private = [(group.label, group.first.started) for group in groups if group.first.started.privacy]
    if not private:
        return Section("")
    runs = pd.DataFrame([{"run": label, **started.privacy} for label, started in private])
    clients = pd.DataFrame(
        [{"run": label, "client": client, **row} for label, started in private for client, row in started.private_clients.items()]
    )
    numbers = dict.fromkeys(("epsilon", "delta", "clip_norm", "rate", "sigma"), significant)
    items = [sortable("What was asked of each party, over all rounds", runs, numbers, {"clip_norm": "clip norm"})]
    if len(clients):
        items.append(sortable("Each party, by the rows that it states", clients, numbers, {"rows": "stated rows", "rate": "q"}))
    own = "" if len(clients) else " Each node's own numbers are in its ledger: the server is not told them."
    note = (
        "Epsilon is each party's own, of this run on its own rows; it is not a sum over the parties, and other runs on the same rows spend "
        "more. A node may have been stricter than the run asked for. A person with many records has less protection than one record." + own
    )
    return Section("What it says of a single record", note, items)
