"""One training run: devices, steps, logging, checkpoints, exact resume."""
