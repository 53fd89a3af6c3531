"""Notebook 03: from a `HeadPlan` to a DHA model, without training."""
