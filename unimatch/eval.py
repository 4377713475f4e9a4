"""Evaluate UniMatch, V2 or FixMatch: `python unimatch/eval.py [RUN] [-e WHICH] ...`; see docs/evaluation.md."""

from common.evaluation.cli import main_eval
from unimatch.config import Config, protocol_of
from unimatch.released import RELEASE

if __name__ == "__main__":
    main_eval("unimatch", Config, protocol_of=protocol_of, roles=("student", "teacher"), release=RELEASE)
