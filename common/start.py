"""Make a folder of images and masks ready for training, and print the commands that come next.

    python -m common.start data/mine

Finds the names of images and masks, the classes, and the images without a mask; writes class list, split, config and a
picture to `<folder>-training`; chooses method, network, crop, batch and length. docs/your_data.md explains the rules.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from common.check_data import describe
from common.errors import UserError, report_errors
from common.own_data.plan import choose_method, this_machine
from common.own_data.prepare import Prepared, add_arguments, choices_from, prepare
from common.own_data.sheet import FILE as SHEET


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.start", description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    args = parser.parse_args(argv)
    prepared = prepare(args.folder, choices_from(args))
    config, problems, notes = describe(prepared, Console(quiet=True))
    if problems:
        raise UserError(
            f"{problems[0]}\n{len(problems)} problems: python -m common.check_data {args.folder} lists them"
        )
    print("\n".join(_summary(prepared, config, notes)))


def _summary(prepared: Prepared, config: dict[str, Any], notes: Sequence[str]) -> list[str]:
    """Lines on what was found and chosen, and the next commands."""
    reader, split, out = prepared.reader, prepared.split, prepared.out
    method, reason = choose_method(split)
    model, crop = config["model"], config["data"]["crop_size"][0]
    shown = ", ".join(reader.classes[:6]) + (", ..." if len(reader.classes) > 6 else "")
    return [
        f"images   {config['data']['image_dir']}",
        f"masks    {config['data']['label_dir']}",
        f"classes  {len(reader.classes)}: {shown}"
        + (f"; rename them in {reader.class_file}" if prepared.has_placeholders else ""),
        f"split    {len(split.labeled)} labeled, {len(split.unlabeled)} unlabeled, {len(split.valid)} for validation",
        f"method   {method}: {reason}",
        f"network  {model['backbone']}, crops of {crop}, batches of {config['optim']['batch_size']},"
        f" {config['run']['steps']} steps ({this_machine()})",
        f"picture  {out / SHEET}: do the colors lie where they should?",
        f"config   {prepared.config_path}",
        *(f"note     {line}" for line in notes),
        "",
        "Train, then evaluate:",
        f"  accelerate launch {method}/train.py --config {prepared.config_path}",
        f"  python {method}/eval.py runs/{method}/{prepared.config_path.stem} -s",
    ]


if __name__ == "__main__":
    main()
