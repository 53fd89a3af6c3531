"""Notebook 02: which heads share one, and how many heads each layer keeps."""
