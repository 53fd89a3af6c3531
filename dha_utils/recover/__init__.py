"""Notebook 04: training, to win back the rest."""
