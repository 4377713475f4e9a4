"""Evaluation, prediction and export of trained networks."""
