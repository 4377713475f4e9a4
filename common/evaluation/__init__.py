"""Evaluate trained networks, and everything that uses one after training."""
