"""Splits: which images are labeled, unlabeled and for validation."""
