"""Rows become processes here: training, merging, serving engines."""
