"""Evaluate memory bank: `python memory_bank/eval.py [RUN] [-e WHICH] [--network student|teacher] ...`.

    python memory_bank/eval.py --model-path runs/memory_bank/demo/checkpoints/best

Network and preprocessing are those of the run, or of the config stored in a released checkpoint; see
docs/evaluation.md.
"""

from common.evaluation.cli import main_eval
from memory_bank.config import Config, protocol_of
from memory_bank.released import RELEASE

if __name__ == "__main__":
    main_eval("memory_bank", Config, protocol_of=protocol_of, roles=("student", "teacher"), release=RELEASE)
