"""Evaluate PRCL's teacher: `python prcl/eval.py [RUN] [-e WHICH] ...`; see docs/evaluation.md."""

from common.evaluation.cli import main_eval
from prcl.released import RELEASE
from prcl.train import Config

if __name__ == "__main__":
    main_eval("prcl", Config, release=RELEASE)
