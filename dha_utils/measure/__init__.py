"""Notebook 01: how good a model is, and how redundant its heads are."""
