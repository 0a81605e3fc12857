"""Runs on this machine: a model, its clients in turn, the round loop, begun or resumed."""
