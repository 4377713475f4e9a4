"""COCO 2017 with 81 classes (void and the 80 things), and COCO-Stuff with 171 classes of things and stuff."""

from pathlib import Path

import numpy as np

from common.datasets.reader import Reader, Subset, existing_root, no_layout, table_of, voc_palette

# In the order of COCO's category ids.
THINGS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
# COCO-Stuff's ids 92 to 182, in order.
STUFF = (
    "banner", "blanket", "branch", "bridge", "building-other", "bush", "cabinet", "cage", "cardboard", "carpet",
    "ceiling-other", "ceiling-tile", "cloth", "clothes", "clouds", "counter", "cupboard", "curtain", "desk-stuff",
    "dirt", "door-stuff", "fence", "floor-marble", "floor-other", "floor-stone", "floor-tile", "floor-wood", "flower",
    "fog", "food-other", "fruit", "furniture-other", "grass", "gravel", "ground-other", "hill", "house", "leaves",
    "light", "mat", "metal", "mirror-stuff", "moss", "mountain", "mud", "napkin", "net", "paper", "pavement", "pillow",
    "plant-other", "plastic", "platform", "playingfield", "railing", "railroad", "river", "road", "rock", "roof", "rug",
    "salad", "sand", "sea", "shelf", "sky-other", "skyscraper", "snow", "solid-other", "stairs", "stone", "straw",
    "structural-other", "table", "tent", "textile-other", "towel", "tree", "vegetable", "wall-brick", "wall-concrete",
    "wall-other", "wall-panel", "wall-stone", "wall-tile", "wall-wood", "water-other", "waterdrops", "window-blind",
    "window-other", "wood",
)  # fmt: skip
# Ids of things that COCO lists but never segments.
WITHOUT_MASKS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
# COCO-Stuff's maps store the id less one, 0 to 181, and 255 for unlabeled pixels.
STUFF_MAP_TABLE = table_of(number - 1 for number in range(1, 183) if number not in WITHOUT_MASKS)
STUFF_TRAIN_ID_TABLE = table_of(range(len(THINGS) + len(STUFF)))
TRAIN_ID_SUFFIX = "_labelTrainIds.png"

PLACES = (".", "coco", "COCO")
IMAGE_FOLDERS = (".", "images")
SUBSETS = {"train": "train2017", "val": "val2017"}


class COCO(Reader):
    """Ids such as `000000000139`, in `{train2017,val2017}/<id>.jpg` under `root`, `coco` or `images` below them.

    Labels are `masks/<id>.png` of both subsets, as UniMatch's repository offers them: 0 for void, which is a class that
    is trained and counted, and 1..80 for the things; 255 is ignored.

    Raises:
        UserError: no tree is found.
    """

    classes: tuple[str, ...] = ("void", *THINGS)
    palette = voc_palette()
    _title = "COCO"
    _table = table_of(range(81))

    def __init__(self, root: str | Path) -> None:
        root = existing_root(root)
        places = [(root / place, folder) for place in PLACES for folder in IMAGE_FOLDERS]
        found = [(base, base / folder) for base, folder in places if (base / folder / SUBSETS["train"]).is_dir()]
        if not found:
            wanted = [f"{place}/{folder}/{SUBSETS['train']}" for place in PLACES for folder in IMAGE_FOLDERS]
            raise no_layout(self._title, root, wanted)
        base, self._images = found[0]
        self._labels = self._folder_of_labels(base)
        self.layout = f"{self._images}: {', '.join(SUBSETS.values())}; labels in {self._labels}"

    def names(self, subset: Subset) -> list[str]:
        return sorted(path.stem for path in (self._images / SUBSETS[subset]).glob("*.jpg"))

    def _folder_of_labels(self, base: Path) -> Path:
        return base / "masks"

    def _image_candidates(self, name: str) -> list[Path]:
        return [self._images / subset / f"{name}.jpg" for subset in SUBSETS.values()]

    def _label_candidates(self, name: str) -> list[Path]:
        return [self._labels / f"{name}.png"]

    def _label_table(self, path: Path) -> np.ndarray:
        return self._table


class COCOStuff(COCO):
    """COCO's images with labels of 171 classes: `{train2017,val2017}/<id>.png` in `stuffthingmaps` or `annotations`.

    Labels are the published maps of things and stuff (0..181 without the ids of things that have no masks, 255 =
    unlabeled), or class ids 0..170 in `<id>_labelTrainIds.png`; the maps are preferred if a tree has both.

    Raises:
        UserError: no tree is found.
    """

    classes = (*THINGS, *STUFF)
    _title = "COCO-Stuff"

    def _folder_of_labels(self, base: Path) -> Path:
        folders = [base / "stuffthingmaps", base / "annotations"]
        return next((folder for folder in folders if (folder / SUBSETS["train"]).is_dir()), folders[0])

    def _label_candidates(self, name: str) -> list[Path]:
        folders = [self._labels / subset for subset in SUBSETS.values()]
        return [folder / f"{name}{suffix}" for suffix in (".png", TRAIN_ID_SUFFIX) for folder in folders]

    def _label_table(self, path: Path) -> np.ndarray:
        return STUFF_TRAIN_ID_TABLE if path.name.endswith(TRAIN_ID_SUFFIX) else STUFF_MAP_TABLE
