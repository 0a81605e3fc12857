"""A client: what a message makes of it, its local training, what it remembers."""
