"""Splits: lists of labeled, unlabeled and validation images."""
