"""Evaluate memory bank: `python memory_bank/eval.py [RUN] [-e WHICH] [--network student|teacher] ...`; see
docs/evaluation.md.

    python memory_bank/eval.py --model-path runs/memory_bank/demo/checkpoints/best

Network and preprocessing are those of the run, or of the config that a released checkpoint holds.
"""

from common.eval_cli import main_eval
from memory_bank.released import segmenter_of
from memory_bank.setting import Config, protocol_of
from memory_bank.their_config import config_in

if __name__ == "__main__":
    main_eval(
        "memory_bank",
        Config,
        protocol_of=protocol_of,
        roles=("student", "teacher"),
        from_published=segmenter_of,
        config_in=config_in,
    )
