"""Differential privacy of a party's records: the plan of a run, its epsilon, and the ledger of all runs."""
