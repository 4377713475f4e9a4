"""Evaluate memory bank: `python memory_bank/eval.py [RUN] [-e WHICH] [--network student|teacher] ...`; see
docs/evaluation.md.

    python memory_bank/eval.py --model-path runs/memory_bank/demo/checkpoints/best

Network and preprocessing are those of the run, or of the config that a released checkpoint holds.
"""

from common.evaluation.cli import main_eval
from common.evaluation.released_checkpoints import Release
from common.models.weights import UNREACHED
from common.released.weights import MEMORY_BANK_HEADS
from memory_bank.config import Config, protocol_of
from memory_bank.released import config_in, segmenter_of

# DeepLabV2's weights do not tell what they were pretrained on, which its preprocessing hangs on: their config does.
RELEASE = Release(
    segmenter_of,
    configs={
        ("v3plus_memory_bank", 21): "memory_bank/configs/configSSL_pascal_1_8_split0_v3.json",
        ("v3plus_memory_bank", 19): "memory_bank/configs/configSSL_city_1_8_split0_v3.json",
    },
    heads=MEMORY_BANK_HEADS + UNREACHED,
    config_in=config_in,
)

if __name__ == "__main__":
    main_eval("memory_bank", Config, protocol_of=protocol_of, roles=("student", "teacher"), release=RELEASE)
