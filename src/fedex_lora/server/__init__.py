"""A server: which answers count, what it remembers of its clients, from where it goes on."""
