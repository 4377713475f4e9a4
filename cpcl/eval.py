"""Evaluate CPCL: `python cpcl/eval.py [RUN] [-e WHICH] [-s] [--network 1|2|both] ...`; see docs/evaluation.md."""

from common.eval_cli import main_eval
from common.models.weights import deeplab_from_cps
from cpcl.train import Config, protocol_of

if __name__ == "__main__":
    main_eval("cpcl", Config, protocol_of=protocol_of, second="second", from_published=deeplab_from_cps)
