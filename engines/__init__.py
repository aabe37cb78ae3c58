"""Engines: building them from a variant's graphs, and running them."""
