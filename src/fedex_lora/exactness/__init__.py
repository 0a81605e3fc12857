"""How exact a result is, in fp64 by the plain formulas: it checks `aggregation`, and computes nothing like it."""
