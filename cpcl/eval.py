"""Evaluate CPCL: `python cpcl/eval.py [RUN] [-e WHICH] [-s] [--network 1|2|both] ...`; see docs/evaluation.md."""

from common.evaluation.cli import main_eval
from cpcl.released import RELEASE
from cpcl.train import Config, protocol_of

if __name__ == "__main__":
    main_eval("cpcl", Config, protocol_of=protocol_of, second="second", release=RELEASE)
