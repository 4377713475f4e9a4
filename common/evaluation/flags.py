"""Command-line options shared by eval.py and common.predict: checkpoint, devices and inference protocol."""

import argparse
from dataclasses import replace

from common.evaluation.inference import Protocol


def add_protocol_flags(parser: argparse.ArgumentParser) -> None:
    """Add `-e`, `-d`, `--scales`, `--flip`, `--sliding` and `--whole`."""
    parser.add_argument(
        "-e",
        "--model-path",
        dest="which",
        metavar="WHICH",
        help="best, last, a number N, a range A-B or A- (0-based epochs where the config counts epochs, else steps; "
        "step:N and step:A-B are always steps), a checkpoint folder, or a weight file; by default best, else last",
    )
    parser.add_argument("-d", "--devices", help="cpu, 0, 0,1, 0-3 or * (all GPUs); by default one GPU, else the CPU")
    parser.add_argument(
        "--scales", nargs="+", type=float, default=[1.0], help="average the predictions at these scales"
    )
    parser.add_argument("--flip", action="store_true", help="average with the prediction of the mirrored image")
    area = parser.add_mutually_exclusive_group()
    area.add_argument("--sliding", type=int, metavar="CROP", help="slide a square window of this side, in pixels")
    area.add_argument("--whole", action="store_true", help="predict whole images where the paper slides a window")


def protocol_from(args: argparse.Namespace, default: Protocol) -> Protocol:
    """Protocol selected by the options of `add_protocol_flags`.

    Args:
        args: Parsed options.
        default: Protocol of the paper or run, used where an option is not given.

    Raises:
        UserError: a scale or window side is not above 0.
    """
    if args.sliding is not None:
        default = Protocol(crop=(args.sliding, args.sliding))
    elif args.whole:
        default = replace(default, crop=None)
    return replace(default, scales=tuple(args.scales), flip=args.flip)
