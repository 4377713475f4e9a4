"""Results of an evaluation: one table per checkpoint, a summary, files of scores, pictures."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from common.errors import UserError
from common.evaluation.inference import Protocol
from common.evaluation.selection import CheckpointRef
from common.metrics import ConfusionMatrix, Scores
from common.visual import Sample, compare, save_ids, save_label, score_curve

IMAGE_SCORES = "scores.json"  # beside the pictures of a checkpoint: mIoU of each image
Results = Sequence[tuple[CheckpointRef, Scores]]


@dataclass(frozen=True)
class Report:
    """Tables and files of one command's scores.

    Args:
        classes: Names, by class id.
        protocol: Protocol that images were predicted with.
        paper_protocol: Protocol of the paper; file names contain the differences from it.
        network: Value of `--network`.
        data_config: Config file that names the data.
        folder: Folder to write files to.
    """

    classes: Sequence[str]
    protocol: Protocol
    paper_protocol: Protocol
    network: str | None
    data_config: str
    folder: Path

    def table(self, checkpoint: CheckpointRef, scores: Scores) -> Table:
        """Tabulate the scores of a checkpoint, class by class."""
        table = Table(
            title=_title(checkpoint), caption=self._protocol_text, title_justify="left", caption_justify="left"
        )
        table.add_column("class")
        table.add_column("IoU %", justify="right")
        for name, iou in zip(self.classes, scores.per_class_iou):
            table.add_row(name, _percent(iou), style="dim" if math.isnan(iou) else None)
        table.add_section()
        table.add_row(f"mIoU ({scores.classes_counted} of {len(self.classes)} classes)", _percent(scores.miou))
        if self._has_background:
            table.add_row("mIoU without background", _percent(scores.miou_without_first))
        table.add_row("pixel accuracy", _percent(scores.pixel_accuracy))
        return table

    def summary(self, results: Results) -> Table:
        """Tabulate all checkpoints, one per line, the best one in bold."""
        by_epoch = _count_epochs(results)
        columns = ["epoch"] if by_epoch else []
        columns += ["step", "mIoU %"]
        columns += ["without background %"] if self._has_background else []
        table = Table(*columns, "classes", "pixel accuracy %", "", title="all", title_justify="left")
        best = _best(results)
        for checkpoint, scores in results:
            row = [f"{checkpoint.epoch:g}"] if by_epoch else []
            row += [str(checkpoint.step), _percent(scores.miou)]
            row += [_percent(scores.miou_without_first)] if self._has_background else []
            row += [str(scores.classes_counted), _percent(scores.pixel_accuracy)]
            is_best = checkpoint is best
            table.add_row(*row, "best" if is_best else "", style="bold" if is_best else None)
        return table

    def write(self, checkpoint: CheckpointRef, scores: Scores) -> None:
        """Write the scores of a checkpoint to <name>.json.

        Raises:
            UserError: the file cannot be written; also raised by `write_summary` and `write_pictures`.
        """
        content = self._to_dict(checkpoint, scores) | {"data_config": self.data_config}
        content["protocol"] = asdict(self.protocol) | {"text": self._protocol_text}
        _write_json(self.folder / f"{self._stem(checkpoint.name)}.json", content)

    def write_summary(self, which: str, results: Results) -> None:
        """Write the scores of all checkpoints to <which>.json, and their curve to <which>.png."""
        stem = self._stem(which.replace(":", "_"))
        lines = [self._to_dict(checkpoint, scores) for checkpoint, scores in results]
        _write_json(self.folder / f"{stem}.json", {"best_step": _best(results).step, "checkpoints": lines})
        unit = "epoch" if _count_epochs(results) else "step"
        numbers = [getattr(checkpoint, unit) for checkpoint, _ in results]
        curve = self.folder / f"{stem}.png"
        try:
            score_curve(numbers, [scores.miou for _, scores in results], unit, curve)
        except OSError as error:
            raise UserError(f"the curve cannot be written to {curve}: {error.strerror}") from None

    def write_pictures(
        self, checkpoint: CheckpointRef, samples: Iterable[Sample], palette: np.ndarray
    ) -> dict[str, float]:
        """Write three pictures per image, and return the mIoU of each image over the classes that occur in it.

        `prediction/` shows colors, `ids/` is gray with the class id as pixel value, and `side_by_side/` shows image,
        prediction and label.

        Args:
            checkpoint: The checkpoint that predicted.
            samples: Images with labels and predictions.
            palette: uint8 [256,3].
        """
        folder = self._pictures_of(checkpoint)
        scores = {}
        try:
            for sample in samples:
                for kind in ("prediction", "ids", "side_by_side"):  # a name may contain folders
                    (folder / kind / sample.name).parent.mkdir(parents=True, exist_ok=True)
                save_label(sample.prediction, palette, folder / "prediction" / f"{sample.name}.png")
                save_ids(sample.prediction, folder / "ids" / f"{sample.name}.png")
                compare(sample, palette).save(folder / "side_by_side" / f"{sample.name}.png")
                confusion = ConfusionMatrix(len(self.classes))
                confusion.update(sample.prediction, sample.label)
                scores[sample.name] = confusion.scores().miou
        except OSError as error:
            raise UserError(f"pictures cannot be written to {folder}: {error.strerror}") from None
        return scores

    def write_image_scores(self, checkpoint: CheckpointRef, scores: Mapping[str, float]) -> None:
        """Write the mIoU of images, the worst first, beside their pictures; images without a labeled pixel are out."""
        known = {name: miou for name, miou in scores.items() if math.isfinite(miou)}
        _write_json(self._pictures_of(checkpoint) / IMAGE_SCORES, dict(sorted(known.items(), key=lambda one: one[1])))

    def _pictures_of(self, checkpoint: CheckpointRef) -> Path:
        return self.folder / "pictures" / self._stem(checkpoint.name)

    @property
    def _has_background(self) -> bool:
        return self.classes[0] == "background"

    @property
    def _protocol_text(self) -> str:
        if self.network in ("1", None):
            return self.protocol.describe()
        network = {"2": "network 2", "both": "mean of both networks"}.get(self.network, self.network)
        return f"{self.protocol.describe()}; {network}"

    def _stem(self, name: str) -> str:
        """Add the differences from the paper's protocol, e.g. `best_sliding96_scales0.75-1_flip_network2`."""
        protocol, parts = self.protocol, [name]
        if protocol.crop != self.paper_protocol.crop:
            parts.append(f"sliding{protocol.crop[0]}" if protocol.crop else "whole")
        if protocol.scales != (1.0,):
            parts.append("scales" + "-".join(f"{scale:g}" for scale in protocol.scales))
        if protocol.flip:
            parts.append("flip")
        if self.network not in ("1", None):
            parts.append(f"network{self.network}" if self.network in ("2", "both") else self.network)
        return "_".join(parts)

    def _to_dict(self, checkpoint: CheckpointRef, scores: Scores) -> dict[str, Any]:
        """Scores of a checkpoint as shares, 0 to 1; None stands for NaN."""
        shares = {"miou": scores.miou}
        if self._has_background:
            shares["miou_without_background"] = scores.miou_without_first
        shares["pixel_accuracy"] = scores.pixel_accuracy
        content = {"network": str(checkpoint.file), "step": checkpoint.step, "epoch": checkpoint.epoch}
        content |= {name: _or_none(share) for name, share in shares.items()}
        per_class = {name: _or_none(iou) for name, iou in zip(self.classes, scores.per_class_iou)}
        return content | {"classes_counted": scores.classes_counted, "per_class_iou": per_class}


def _title(checkpoint: CheckpointRef) -> str:
    step = "" if checkpoint.step is None else f", step {checkpoint.step}"
    return checkpoint.name + step + ("" if checkpoint.epoch is None else f", epoch {checkpoint.epoch:g}")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def _or_none(share: float) -> float | None:
    return None if math.isnan(share) else share


def _count_epochs(results: Results) -> bool:
    return all(checkpoint.epoch is not None for checkpoint, _ in results)


def _best(results: Results) -> CheckpointRef:
    """Select the first checkpoint with the largest mIoU; NaN ranks last."""
    return max(results, key=lambda result: -1.0 if math.isnan(result[1].miou) else result[1].miou)[0]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"scores cannot be written to {path}: {error.strerror}") from None
