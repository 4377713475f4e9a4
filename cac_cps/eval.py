"""Evaluate CAC or CPS: `python cac_cps/eval.py [RUN] [-e WHICH] [--network 1|2|both] ...`; see docs/evaluation.md."""

from cac_cps.config import Config, protocol_of
from cac_cps.released import RELEASE
from common.evaluation.cli import main_eval

if __name__ == "__main__":
    main_eval("cac_cps", Config, protocol_of=protocol_of, second="second", release=RELEASE)
