"""Evaluate CSS's teacher: `python css/eval.py [RUN] [-e WHICH] ...`; see docs/evaluation.md."""

from common.evaluation.cli import main_eval
from css.released import RELEASE
from css.train import Config

if __name__ == "__main__":
    main_eval("css", Config, release=RELEASE)
