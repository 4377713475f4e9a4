"""Evaluate memory bank's student: `python memory_bank/eval.py [RUN] [-e WHICH] ...`; see docs/evaluation.md."""

from common.eval_cli import main_eval
from memory_bank.released import segmenter_of
from memory_bank.setting import Config, protocol_of

if __name__ == "__main__":
    main_eval("memory_bank", Config, protocol_of=protocol_of, from_published=segmenter_of)
