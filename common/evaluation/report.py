"""What an evaluation prints and writes: a table for each checkpoint, one of all, files of scores, pictures."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from common.errors import UserError
from common.evaluation.inference import Protocol
from common.evaluation.selection import CheckpointRef
from common.metrics import Scores
from common.visual import Sample, compare, save_ids, save_label, score_curve

Results = Sequence[tuple[CheckpointRef, Scores]]


@dataclass(frozen=True)
class Report:
    """How the scores of one command are told.

    Attributes:
        classes: Names of the classes.
        protocol: How images were predicted.
        usual: The paper's protocol; files are named by what departs from it.
        network: Which network of the checkpoints, as the command line calls it.
        data_config: The config file that named the data.
        folder: Where files are written.
    """

    classes: Sequence[str]
    protocol: Protocol
    usual: Protocol
    network: str | None
    data_config: str
    folder: Path

    def table(self, target: CheckpointRef, scores: Scores) -> Table:
        """The scores of a checkpoint, class by class."""
        table = Table(title=_told(target), caption=self._protocol_told, title_justify="left", caption_justify="left")
        table.add_column("class")
        table.add_column("IoU %", justify="right")
        for name, iou in zip(self.classes, scores.per_class_iou):
            table.add_row(name, _percent(iou), style="dim" if math.isnan(iou) else None)
        table.add_section()
        counted = f"mean over {scores.classes_counted} of {len(self.classes)} classes"
        table.add_row(counted, _percent(scores.miou))
        if self._has_background:
            table.add_row("mean without background", _percent(scores.miou_without_first))
        table.add_row("pixel accuracy", _percent(scores.pixel_accuracy))
        return table

    def summary(self, results: Results) -> Table:
        """A line for each checkpoint; the best one stands out."""
        by_epoch = all(target.epoch is not None for target, _ in results)
        columns = [*(["epoch"] if by_epoch else []), "step", "mIoU %"]
        columns += [*(["without background %"] if self._has_background else []), "classes", "pixel accuracy %", ""]
        table = Table(*columns, title="all", title_justify="left")
        best = _best(results)
        for target, scores in results:
            row = [*([f"{target.epoch:g}"] if by_epoch else []), str(target.step), _percent(scores.miou)]
            row += [_percent(scores.miou_without_first)] if self._has_background else []
            row += [str(scores.classes_counted), _percent(scores.pixel_accuracy), "best" if target is best else ""]
            table.add_row(*row, style="bold" if target is best else None)
        return table

    def write(self, target: CheckpointRef, scores: Scores) -> None:
        """The scores of a checkpoint, to <which>.json.

        Raises:
            UserError: it cannot be written, as with what follows.
        """
        told = self._contents(target, scores) | {"data_config": self.data_config}
        told["protocol"] = asdict(self.protocol) | {"text": self._protocol_told}
        _write_json(self.folder / f"{self._name(target.which)}.json", told)

    def write_summary(self, which: str, results: Results) -> None:
        """<which>.json, the scores of all checkpoints, and <which>.png, their curve."""
        stem = self._name(which.replace(":", "_"))
        lines = [self._contents(target, scores) for target, scores in results]
        _write_json(self.folder / f"{stem}.json", {"best_step": _best(results).step, "checkpoints": lines})
        unit = "epoch" if all(target.epoch is not None for target, _ in results) else "step"
        numbers = [getattr(target, unit) for target, _ in results]
        curve = self.folder / f"{stem}.png"
        try:
            score_curve(numbers, [scores.miou for _, scores in results], unit, curve)
        except OSError as error:
            raise UserError(f"the curve cannot be written to {curve}: {error.strerror}") from None

    def write_pictures(self, target: CheckpointRef, samples: Iterable[Sample], palette: np.ndarray) -> None:
        """For every image: prediction/ (in color), ids/ (gray, a pixel's value its class), side_by_side/ (with
        label)."""
        folder = self.folder / "pictures" / self._name(target.which)
        try:
            for kind in ("prediction", "ids", "side_by_side"):
                (folder / kind).mkdir(parents=True, exist_ok=True)
            for sample in samples:
                save_label(sample.prediction, palette, folder / "prediction" / f"{sample.name}.png")
                save_ids(sample.prediction, folder / "ids" / f"{sample.name}.png")
                compare(sample, palette).save(folder / "side_by_side" / f"{sample.name}.png")
        except OSError as error:
            raise UserError(f"pictures cannot be written to {folder}: {error.strerror}") from None

    @property
    def _has_background(self) -> bool:
        return self.classes[0] == "background"

    @property
    def _protocol_told(self) -> str:
        usual = self.network in ("1", None)
        network = {"2": "network 2", "both": "mean of both networks"}.get(self.network, self.network)
        return self.protocol.describe() + ("" if usual else f"; {network}")

    def _name(self, which: str) -> str:
        """`best`, or with what departs from the paper's protocol: `best_sliding96_scales0.75-1_flip_network2`."""
        protocol, network = self.protocol, self.network
        window = f"sliding{protocol.crop[0]}" if protocol.crop else "whole"
        sliding = [] if protocol.crop == self.usual.crop else [window]
        scales = [] if protocol.scales == (1.0,) else ["scales" + "-".join(f"{scale:g}" for scale in protocol.scales)]
        chosen = [] if network in ("1", None) else [f"network{network}" if network in ("2", "both") else network]
        return "_".join([which, *sliding, *scales, *(["flip"] if protocol.flip else []), *chosen])

    def _contents(self, target: CheckpointRef, scores: Scores) -> dict[str, Any]:
        """What is written of a checkpoint's scores; null stands for what there is not."""
        shares = {"miou": scores.miou}
        if self._has_background:
            shares["miou_without_background"] = scores.miou_without_first
        shares["pixel_accuracy"] = scores.pixel_accuracy
        told = {"network": str(target.file), "step": target.step, "epoch": target.epoch}
        told |= {name: _or_null(share) for name, share in shares.items()} | {"classes_counted": scores.classes_counted}
        return told | {"per_class_iou": {name: _or_null(iou) for name, iou in zip(self.classes, scores.per_class_iou)}}


def _told(target: CheckpointRef) -> str:
    step = "" if target.step is None else f", step {target.step}"
    return target.which + step + ("" if target.epoch is None else f", epoch {target.epoch:g}")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def _or_null(share: float) -> float | None:
    return None if math.isnan(share) else share


def _best(results: Results) -> CheckpointRef:
    """The first of those with the largest mIoU; NaN is none."""
    return max(results, key=lambda result: -1.0 if math.isnan(result[1].miou) else result[1].miou)[0]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"scores cannot be written to {path}: {error.strerror}") from None
