"""Adapters that are there already: aggregate folders, merge results, verify."""
