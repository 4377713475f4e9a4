"""Evaluate a baseline: `python supervised/eval.py [RUN] [-e WHICH] ...`; see docs/evaluation.md."""

from common.evaluation.cli import main_eval
from supervised.train import Config

if __name__ == "__main__":
    main_eval("supervised", Config)
