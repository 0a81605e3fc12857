"""The files that `flower keys` writes beside the keys, for `flower node` and `flower server`: what can be said there, and why."""

NODE = """\
# Of: fedex-lora flower node FILE. Options of flower-supernode; paths are relative to this file.
superlink = "federation.example.org:443"     # EDIT: the server
root_certificates = "ca.crt"                 # from the server
{key:<44} # stays here; the .pub goes to the server
# trusted_entities = "trusted.yaml"          # take no app but those that these have signed
# port = 9094                                # of this machine; several nodes on it need one each
# and this node's own settings:
{client:<44} # as the server registers the key
# data = "rows"                              # EDIT: the folder of your rows
# train = "rows.csv"                         # the file in it; else as the run names it
# model = "model"                            # your copy of the base; else as the run names it
# start = "result"                           # your copy of the result that a run goes on from
# state = "state"                            # your base delta, optimiser state, answers and log
# threads = 8                                # of the CPU; the bits of a result depend on them
# worker = "worker.sock"                     # of: fedex-lora flower worker
# max_rows = 10000                           # train on no more rows; not with epsilon
# max_megabytes = 4096                       # take no larger message
# trainer = "trl:SFTTrainer"                 # what you train with, in every run
# trust_remote_code = false                  # true: a model's code runs if the run says so, too
# epsilon = 3.0                              # private training (docs/privacy.md), of a run at most so much
# stated_rows = 500                          # what you say of how many rows there are
# ledger = "ledger.jsonl"                    # of all that was trained on them: fedex-lora ledger FILE --begin
# budget = 6.0                               # of all runs together at most so much; unset: epsilon
# delta = 1e-5                               # of (epsilon, delta)
# accountant = "prv"                         # or "rdp"
"""

SERVER_EXAMPLE = """\
# Of: fedex-lora flower server FILE. Options of flower-superlink; paths are relative to this file.
host = "127.0.0.1"                           # whoever reaches it can submit code to every node
port = 8000                                  # nginx lets nodes through to it: deploy/nginx.conf
ssl_ca_certfile = "ca.crt"                   # the parties need it, too
ssl_certfile = "server.pem"
ssl_keyfile = "server.key"
[nodes]                                      # who may join; then: fedex-lora flower register FILE
# ward-a = "ward-a.pub"
"""


def node_example(name: str) -> str:
    """The file of a node of this name, whose key is beside it."""
    return NODE.format(key=f'auth_supernode_private_key = "{name}"', client=f'client = "{name}"')
