"""Notebooks 05 and 06: the cost of a model, before and after, its behaviour, and the decision."""
