"""Write the class list and the splits of the CamVid trial: 11 classes, validation held out over all drives.

    python benchmarks/camvid/prepare.py --data data/camvid

`--data` holds CamVid in VOC layout (VOCdevkit/VOC2012) and source_names.tsv, which names drive and frame of each image.
About 100 of the 367 training images are held out for validation, in blocks of consecutive frames over all drives: of
neighbors in time no two lie on different sides but at the edges of blocks. They are the same for all seeds. Labeled
images are drawn from the rest per seed. Written to trial/ below `--data`: classes.txt, <labels>/<seed> for training,
and official/0, whose validation list is CamVid's own clip.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from common.datasets.folder import Folder
from common.datasets.reader import read_lines, voc_palette
from common.errors import UserError, report_errors
from common.splits.split import Split, choose_class_covering, write_split

# Indices 1 to 11 of the palette of VOC.
CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
BLOCK = 10  # frames
HELD_OUT = 0.3  # share of the blocks of a drive
LABELS, SEEDS = (46, 92), (0, 1, 2, 3, 4)
IMAGES, MASKS = "VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2012/SegmentationClass"


def drives(names: Path) -> dict[str, list[str]]:
    """Ids of the training images by drive, in the order of time.

    Args:
        names: Tab-separated: id, subset (train, val), file name `<drive>_<frame>.png`.

    Raises:
        UserError: no such file, or other columns.
    """
    rows = [line.split("\t") for line in read_lines(names)][1:]
    if not rows or any(len(row) != 3 for row in rows):
        raise UserError(f"{names} must have three columns: id, subset, file name <drive>_<frame>.png")
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, subset, file in rows:
        if subset == "train":
            drive, frame = file.rsplit("_", 1)
            found[drive].append((frame, name))
    return {drive: [name for _, name in sorted(frames)] for drive, frames in sorted(found.items())}


def held_out(frames: list[str]) -> list[str]:
    """About every third block of a drive, spread evenly: `HELD_OUT` of its blocks."""
    blocks = [frames[start : start + BLOCK] for start in range(0, len(frames), BLOCK)]
    chosen = [int((number + 1) * HELD_OUT) > int(number * HELD_OUT) for number in range(len(blocks))]
    return [name for block, held in zip(blocks, chosen) if held for name in block]


def write_classes(path: Path) -> None:
    """The class list: each name with the color that the masks' palette gives it."""
    colors = voc_palette()[1 : len(CLASSES) + 1].tolist()
    lines = [f"{name} {red} {green} {blue}" for name, (red, green, blue) in zip(CLASSES, colors)]
    # Void is index 255 of the palette.
    path.write_text("\n".join([*lines, "ignore {} {} {}".format(*voc_palette()[255].tolist())]) + "\n")


@report_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/camvid"), help="folder with CamVid in VOC layout")
    data = parser.parse_args(argv).data
    by_drive = drives(data / "source_names.tsv")
    valid = sorted(name for frames in by_drive.values() for name in held_out(frames))
    rest = sorted({name for frames in by_drive.values() for name in frames} - set(valid))
    clip = sorted(
        row.split("\t")[0] for row in read_lines(data / "source_names.tsv")[1:] if row.split("\t")[1] == "val"
    )
    trial = data / "trial"
    trial.mkdir(exist_ok=True)
    write_classes(trial / "classes.txt")
    reader = Folder(data, IMAGES, MASKS, "trial/classes.txt")
    for labels in LABELS:
        for seed in SEEDS:
            labeled = choose_class_covering(reader, rest, labels, seed)
            unlabeled = sorted(set(rest) - set(labeled))
            write_split(trial / str(labels) / str(seed), Split(labeled, unlabeled, valid))
    write_split(trial / "official" / "0", Split(rest, [], clip))
    print(f"{len(rest)} images to train on, {len(valid)} held out, {len(clip)} of the official clip; lists in {trial}")


if __name__ == "__main__":
    main()
