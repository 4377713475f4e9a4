"""Records of finished and running runs, read from their folders: settings, curves, scores, pictures of images."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.files import flatten
from common.engine.run_folder import RUN_FILE
from common.errors import UserError
from common.evaluation.report import IMAGE_SCORES

Curve = list[tuple[int, float]]
PREFERRED = ("best", "last")  # evaluations, if no name is given
NOT_COMPARED = ("run.dir",)
MISSING = "-"


@dataclass(frozen=True)
class ImageScore:
    """Score of one validation image.

    Attributes:
        name: Id of the image.
        miou: Mean IoU over the classes that occur in it, 0 to 1.
        picture: File that shows image, prediction and label side by side.
    """

    name: str
    miou: float
    picture: Path


@dataclass(frozen=True)
class Evaluation:
    """Scores that eval.py wrote, as shares from 0 to 1; None where a class does not occur.

    Attributes:
        name: Stem of the file, e.g. `best` or `last_flip`.
        step: Optimizer step of the checkpoint.
        protocol: Description of the protocol.
        per_class: IoU by class name.
        images: Scores per image, the worst first; empty where no pictures were written.
    """

    name: str
    step: int | None
    protocol: str
    miou: float | None
    pixel_accuracy: float | None
    per_class: dict[str, float | None]
    images: list[ImageScore]


@dataclass(frozen=True)
class RunRecord:
    """A run folder.

    Attributes:
        folder: Run folder, which is also the run's name.
        script: Training script, e.g. `prcl/train.py`.
        settings: Config, by dotted key.
        losses, miou: Points (step, value) of the training; the mIoU is a share.
        colors: RGB by class name; empty before the first evaluation.
        evaluation: The selected evaluation; None if there is none.
    """

    folder: Path
    script: str
    settings: dict[str, Any]
    losses: Curve
    miou: Curve
    colors: dict[str, tuple[int, int, int]]
    evaluation: Evaluation | None

    @property
    def name(self) -> str:
        """Path of the folder, as it was given."""
        return str(self.folder)

    def how_to_evaluate(self, which: str | None) -> str:
        """Command that writes scores and pictures of the evaluation `which`, e.g. `last_flip`."""
        checkpoint, _, options = (which or "best").partition("_")
        selected = "" if checkpoint == "best" else f" -e {checkpoint}"
        more = f" with the options of {which}" if options else ""
        return f"python {self.script.split('/')[0]}/eval.py {self.folder}{selected} -s{more}"


def read_runs(folders: Sequence[Path], which: str | None) -> list[RunRecord]:
    """Read run folders.

    Args:
        folders: Run folders.
        which: Stem of a file in RUN/eval; None for `best` if all runs have it, else `last`, else what each run has.

    Raises:
        UserError: a folder that is not a run, or a damaged file in it.
    """
    named = [_evaluations(folder) for folder in folders]
    shared = set.intersection(*map(set, named))
    records = []
    for folder, evaluations in zip(folders, named):
        order = [which] if which else [*(name for name in PREFERRED if name in shared), *PREFERRED, *evaluations]
        chosen = next((evaluations[name] for name in order if name in evaluations), None)
        records.append(_read_run(folder, chosen))
    return records


def differing_settings(records: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Values of each setting that is not the same in all runs, by dotted key; `script` comes first."""
    keys = dict.fromkeys(key for record in records for key in record.settings)
    rows = {"script": [record.script for record in records]}
    rows |= {key: [_text(record.settings.get(key, MISSING)) for record in records] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1 and key not in NOT_COMPARED}


def _read_run(folder: Path, evaluation: Path | None) -> RunRecord:
    config, facts = _read_json(folder / "config.json"), _read_json(folder / RUN_FILE)
    lines = _read_lines(folder / "metrics.jsonl")
    colors = dict(zip(facts.get("classes", ()), map(tuple, facts.get("colors", ()))))
    return RunRecord(
        folder,
        facts.get("script", MISSING),
        flatten(config),
        _curve(lines, "loss"),
        _curve(lines, "valid/miou"),
        colors,
        None if evaluation is None else _read_evaluation(evaluation),
    )


def _evaluations(folder: Path) -> dict[str, Path]:
    """Files of scores by stem, the newest first; the files of ranges are left out."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.json")
    files = sorted((folder / "eval").glob("*.json"), key=lambda path: -path.stat().st_mtime)
    return {path.stem: path for path in files if "per_class_iou" in _read_json(path)}


def _read_evaluation(path: Path) -> Evaluation:
    content, pictures = _read_json(path), path.parent / "pictures" / path.stem
    scores = _read_json(pictures / IMAGE_SCORES) if (pictures / IMAGE_SCORES).is_file() else {}
    images = [ImageScore(name, miou, pictures / "side_by_side" / f"{name}.png") for name, miou in scores.items()]
    return Evaluation(
        path.stem,
        content.get("step"),
        content.get("protocol", {}).get("text", MISSING),
        content.get("miou"),
        content.get("pixel_accuracy"),
        content["per_class_iou"],
        sorted((image for image in images if image.picture.is_file()), key=lambda image: image.miou),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise UserError(f"{path} is damaged: restore it, or delete it if it can be made again") from None


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; the last one may be incomplete while a run is writing."""
    text = path.read_text() if path.is_file() else ""
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError:
        raise UserError(f"{path} has a line that is not JSON: restore or remove it") from None


def _curve(lines: Sequence[dict[str, Any]], name: str) -> Curve:
    return [(line["step"], line[name]) for line in lines if math.isfinite(line.get(name, math.nan))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
