"""Notebook 05: the cost of a model, before and after."""
