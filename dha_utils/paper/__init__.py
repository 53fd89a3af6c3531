"""Notebooks 02 and 03: the paper's own search and its learned linear fusion."""
