"""Draw the pictures of the README: accuracy as bars, and the labels that a demo run gives to built-in images.

python benchmarks/pictures.py                    # results.png, from benchmarks/results/shapes.jsonl
python benchmarks/pictures.py runs/prcl/demo     # also labels.png, with the network of this run
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.accuracy import RESULTS, read_results
from common import IGNORE
from common.datasets.shapes import CLASSES
from common.datasets.voc import VOC
from common.errors import UserError, report_errors
from common.predict import main as predict
from common.visual import Sample, panel

TABLE = Path(__file__).parent / "tables" / "shapes.json"
IMAGES = 3
WIDTH = 1000  # of labels.png in pixels
COLORS = 256  # of labels.png, which keeps the file small
LABELED, UNLABELED, SEED = "#9aa0a6", "#2a78b5", "#202124"


def draw_results(path: Path) -> None:
    """Draw the mIoU of every method on the built-in data: a bar for the mean, a dot per seed.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is missing: pip install -e '.[plots]'") from None
    scores: dict[str, list[float]] = {}
    results = read_results(RESULTS / f"{TABLE.stem}.jsonl")
    for (row, _), result in results.items():
        scores.setdefault(row, []).append(result["miou_last"])
    rows = [row for row in json.loads(TABLE.read_text())["rows"] if row.endswith("labels") and row in scores]
    changes = sorted({result["before"] for result in results.values() if "before" in result})
    rows.sort(key=lambda row: statistics.mean(scores[row]))
    means = [statistics.mean(scores[row]) for row in rows]
    figure = Figure(figsize=(8, 0.42 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [_method(row) for row in rows], means, 0.62, color=[LABELED if _is_baseline(row) else UNLABELED for row in rows]
    )
    for height, (row, mean) in enumerate(zip(rows, means)):
        axes.plot(scores[row], [height] * len(scores[row]), "o", color=SEED, markersize=3.5)
        axes.text(1.5, height, f"{mean:.1f}", color="white", va="center", fontweight="bold")
    axes.set(xlim=(0, 80), xlabel="mIoU (%) on the built-in data: mean of 3 seeds (bar) and each seed (dot)")
    if changes:
        axes.set_title(f"measured before a change: {'; '.join(changes)}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(left=False)
    axes.margins(y=0.02)
    figure.savefig(path, dpi=110)


def draw_labels(run: Path, path: Path) -> None:
    """Draw unlabeled images with label, prediction, pseudo-label and confidence, by the network of a run.

    Raises:
        UserError: the run is not one of PRCL or CSS on built-in data.
    """
    try:
        config = json.loads((run / "config.json").read_text())
        data, threshold = config["data"], config["method"]["un_threshold"]
        names = (Path(data["split"]) / "unlabeled_filename.txt").read_text().split()
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{run} is not a run of PRCL or CSS on the built-in data: give runs/prcl/demo") from None
    reader = VOC(data["root"], CLASSES)
    names = [names[index * len(names) // IMAGES] for index in range(IMAGES)]
    with tempfile.TemporaryDirectory() as folder:
        images, out = Path(folder, "images"), Path(folder, "out")
        images.mkdir()
        for name in names:
            shutil.copy(reader.image_path(name), images)
        predict([str(run), str(images), "--out", str(out), "--save", "probability"])
        samples = [_sample(reader, name, out / "probability" / f"{name}.npy", threshold) for name in names]
    title = (
        f"Unlabeled images and their pseudo-labels (white: confidence below {threshold:g}); labels for comparison only"
    )
    page = panel(samples, reader.palette, reader.classes, title)
    page = page.resize((WIDTH, round(page.height * WIDTH / page.width)), Image.Resampling.LANCZOS)
    page.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)


def _sample(reader: VOC, name: str, probability: Path, threshold: float) -> Sample:
    image, label = reader.read_pair(name)
    confidence, prediction = torch.from_numpy(np.load(probability).astype(np.float32)).max(0)
    return Sample(name, image, prediction, label, confidence, prediction.masked_fill(confidence < threshold, IGNORE))


def _is_baseline(row: str) -> bool:
    return "," not in row


def _method(row: str) -> str:
    return f"labeled only, {row}" if _is_baseline(row) else row.removesuffix(", 16 labels")


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run folder of PRCL on built-in data, e.g. runs/prcl/demo")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder for the pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    draw_results(options.out / "results.png")
    print(f"{options.out / 'results.png'}: mIoU of {TABLE.stem}")
    if options.run:
        draw_labels(options.run, options.out / "labels.png")
        print(f"{options.out / 'labels.png'}: labels of {options.run}")


if __name__ == "__main__":
    main()
