"""Federations over an engine."""
