"""The sections every paper's `Config` is made of, and how a config is read.

A script's config is a dataclass with the sections `data`, `model`, `optim`, `method` (the paper's own) and `run`.
`parse` reads it from a JSON file and lets `--dotted.overrides` replace single values:

    accelerate launch prcl/train.py --config prcl/configs/voc.json --optim.lr 1e-3 --run.steps 600
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Optional, TypeVar, Union, get_args, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

from common.config_files import Translation, flatten, nearest, read_config
from common.errors import UserError


@dataclass
class DataConfig:
    """Images, labels and which of them are labeled.

    Args:
        dataset: Kind of dataset tree under `root`; `shapes` is the built-in one, made on first use; `pascal` and
            `pascal_voc` are other words for `voc`.
        root: Folder of the dataset.
        split: Folder of {labeled,unlabeled,valid}_filename.txt, or published lists as they are (see docs/data.md);
            either this, `labeled_list` or `split_id`.
        labeled_list: File with the labeled images; those for validation are then the dataset's own.
        unlabeled_list: File with the unlabeled images; by default all others for training.
        split_id: An order of the images for training, of which the first are labeled: 0, 1 and 2 are stored in
            `order_dir`, as memory bank published them, all above 2 are random.
        labeled_samples: With `split_id`: number of labeled images.
        order_dir: With `split_id`: folder of split_0.pkl, split_1.pkl and split_2.pkl.
        split_seed: With `split_id`: seed of the random orders; by default `run.seed`.
        crop_size: Height and width of a training crop, in pixels.
        scale_range: Smallest and largest random scale of a labeled image.
        allow_overlap: Accept images that are in the labeled and in the unlabeled list.
        skip_bad_files: Take the next image of the list in place of one that cannot be read; by default the run stops.
        workers: Loader processes per training process and stream.
        image_dir: `folder` only: folder of the images, absolute or relative to `root`.
        label_dir: `folder` only: folder of the labels, absolute or relative to `root`.
        classes: `folder` only: text file with a class a line (docs/your_data.md), absolute or relative to `root`.
    """

    dataset: Literal["voc", "pascal", "pascal_voc", "cityscapes", "gta5", "folder", "shapes"]
    root: str
    split: Optional[str] = None
    labeled_list: Optional[str] = None
    unlabeled_list: Optional[str] = None
    split_id: Optional[NonNegativeInt] = None
    labeled_samples: Optional[PositiveInt] = None
    order_dir: Optional[str] = None
    split_seed: Optional[NonNegativeInt] = None
    crop_size: tuple[PositiveInt, PositiveInt] = (321, 321)
    scale_range: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.5)
    allow_overlap: bool = False
    skip_bad_files: bool = False
    workers: NonNegativeInt = 4
    image_dir: str = "images"
    label_dir: str = "labels"
    classes: str = "classes.txt"

    def __post_init__(self) -> None:
        if self.dataset in ("pascal", "pascal_voc"):
            self.dataset = "voc"

    @property
    def lists(self) -> str:
        """What says which images are labeled, for messages."""
        by_id = None if self.split_id is None else f"split id {self.split_id} with {self.labeled_samples} labels"
        return self.split or self.labeled_list or by_id or "data without lists"


@dataclass
class ModelConfig:
    """The network that is trained and evaluated.

    Args:
        backbone: timm name of a ResNet: resnet18, resnet34, resnet50, resnet101 or resnet152.
        stem: `plain` is the 7x7 convolution, `deep` three 3x3 ones (64, 64, 128 channels).
        head: What follows the backbone: `short` (PRCL, CSS), `deeplab` (CAC), `cps` (original CPS, CPCL), or those of
            memory bank: `v3` (DeepLabV3+), `v2` (DeepLabV2) or `v2_coco` (the same for weights trained on COCO).
        output_stride: Stride of the last backbone features, 8 or 16.
        channels: Width of ASPP and heads; the papers' is 256.
        rates: Dilations of the ASPP's 3x3 branches; by default those of the output stride.
        align_corners: How features and logits are enlarged; the papers' is true.
        input_mean: Mean of red, green and blue (0 to 255) that is taken off images, with no deviation to divide by; by
            default ImageNet's mean and deviation.
        bgr: With input_mean: the network wants channels in the order blue, green, red.
        pretrained: ImageNet weights of the backbone: false, true or a timm name (downloaded), or a local file.
        num_classes: Number of classes the network predicts.
    """

    num_classes: PositiveInt
    backbone: str = "resnet101"
    stem: Literal["plain", "deep"] = "plain"
    head: Literal["short", "deeplab", "cps", "v3", "v2", "v2_coco"] = "short"
    output_stride: Literal[8, 16] = 16
    channels: PositiveInt = 256
    rates: Optional[tuple[PositiveInt, PositiveInt, PositiveInt]] = None
    align_corners: bool = True
    input_mean: Optional[tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat]] = None
    bgr: bool = False
    pretrained: Union[bool, str] = True


@dataclass
class OptimConfig:
    """Optimizer and batch.

    Args:
        name: `sgd` or `adamw`.
        lr: Learning rate at the first step.
        weight_decay: Weight decay of all parameters.
        momentum: Momentum of `sgd`.
        nesterov: Whether that momentum is Nesterov's.
        poly_power: Exponent of the polynomial decay of the learning rate.
        batch_size: Labeled images a step, over all processes; as many unlabeled ones.
        accumulation: Backward passes a step the batch is cut into.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 1e-2
    weight_decay: NonNegativeFloat = 5e-4
    momentum: ClosedUnitInterval = 0.9
    nesterov: bool = True
    poly_power: NonNegativeFloat = 0.9
    batch_size: PositiveInt = 16
    accumulation: PositiveInt = 1


@dataclass
class RunConfig:
    """How long a run is, and what it leaves behind. Cadences are in steps.

    Args:
        dir: Run folder; by default runs/<paper>/<config name>. The same command on the same folder continues the run.
        seed: Seed of everything random.
        steps: Length in optimizer steps (either steps or epochs; given on the command line one replaces the other).
        epochs: Length in epochs.
        steps_per_epoch: Steps an epoch; by default the paper's rule.
        eval_every: Evaluate after so many steps, and at the end; by default once an epoch, or ten times a run.
        save_every: Write a checkpoint after so many steps, and at the end; by default as often as `eval_every`.
        keep: How many of the newest checkpoints are kept, besides the best one.
        snapshot_every: Keep a weights-only checkpoint after so many steps, never pruned; 0 keeps none.
        snapshot_from: Step of the first of them; by default `snapshot_every`.
        log_every: Write losses to metrics.jsonl after so many steps.
        precision: fp32, fp16 or bf16; by default what `accelerate launch` was told.
        device: `auto` takes the GPU where there is one; `cpu`.
        threads: CPU threads of a process; by default the processes of this machine share its cores.
        deterministic: Only operations that give the same bits twice on one machine: slower on a GPU.
        max_bad_steps: Steps in a row whose loss or gradient is not finite, after which the run ends; single ones are
            skipped.
        timeout: Seconds a process waits for another before it ends; longer than the longest evaluation.
        compile: Compile the student, and losses that have a kernel for it, with torch.compile.
        trackers: Also log to tensorboard or wandb.
    """

    dir: Optional[str] = None
    seed: NonNegativeInt = 3407
    steps: Optional[PositiveInt] = None
    epochs: Optional[PositiveInt] = None
    steps_per_epoch: Optional[PositiveInt] = None
    eval_every: Optional[PositiveInt] = None
    save_every: Optional[PositiveInt] = None
    keep: PositiveInt = 2
    snapshot_every: NonNegativeInt = 0
    snapshot_from: Optional[PositiveInt] = None
    log_every: PositiveInt = 20
    precision: Optional[Literal["fp32", "fp16", "bf16"]] = None
    device: Literal["auto", "cpu"] = "auto"
    threads: Optional[PositiveInt] = None
    deterministic: bool = False
    max_bad_steps: PositiveInt = 10
    timeout: PositiveFloat = 3600
    compile: bool = False
    trackers: list[Literal["tensorboard", "wandb"]] = dataclasses.field(default_factory=list)


@dataclass
class SharedConfig:
    """The sections any script's config has: what the command lines that serve every paper read."""

    data: DataConfig
    model: ModelConfig
    run: RunConfig


T = TypeVar("T")
NonPositiveFloat = restricted_number_type("NonPositiveFloat", float, ("<=", 0))

# Keys of `data` of which one excludes the others', with those that go with it.
KINDS_OF_LISTS = (("split",), ("labeled_list", "unlabeled_list"), ("split_id", "labeled_samples", "split_seed"))
# What only a slip of the hand goes beyond: crops that a network's last features do not show, and what would end in a
# machine without memory.
LARGEST = 2**31 - 1
LIMITS: dict[str, tuple[float, float]] = {
    "data.crop_size": (16, 2**14),
    "data.scale_range": (2**-10, 2**6),
    "data.split_seed": (0, 2**32 - 1),
    "data.workers": (0, 2**10),
    "method.bank_rows_factor": (2**-10, 2**10),
    "method.bank_size": (1, 2**16),
    "method.base_size": (1, 2**14),
    "method.cac.proj_final_dim": (1, 2**14),
    "method.cac.scale_range": (2**-10, 2**6),
    "method.cac.step_save": (0, 2**10),
    "method.cutmix_boxmask_n_boxes": (1, 2**10),
    "method.embedding_dim": (1, 2**14),
    "method.num_negatives": (1, 2**14),
    "method.num_queries": (1, 2**14),
    "method.scale_range": (2**-10, 2**6),
    "method.scales": (2**-10, 2**6),
    "method.train_scale_array": (2**-10, 2**6),
    "method.unlabeled_batch_size": (1, 2**16),
    "model.channels": (1, 2**14),
    "model.rates": (1, 2**10),
    "optim.batch_size": (1, 2**16),
    "run.seed": (0, 2**32 - 1),
    "run.threads": (1, 2**12),
}


def parse(config_class: type[T], script: str, argv: list[str] | None = None) -> T:
    """Read a script's config from the command line: `--config FILE` and `--section.key value`.

    Args:
        config_class: Dataclass of the script, made of the sections above and its own `method`; see `Translation`.
        script: `prcl/train.py` say. By default runs of a paper's `train.py` go to runs/<paper>/<name of the config
            file>, those of its other scripts to runs/<paper>/<script>/<name of the config file>.
        argv: Arguments; by default those of the process.

    Raises:
        UserError: unknown key (the nearest one is named), wrong type, impossible value, unreadable file.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = ArgumentParser(prog=script, exit_on_error=False, allow_abbrev=False, parser_mode="json")
    parser.add_argument("--config", action=ActionConfigFile, help="JSON file with the config.")
    parser.add_class_arguments(config_class)
    files = {path: read_config(config_class, path) for path in _given_files(argv)}
    for path, read in files.items():
        _check_keys(config_class, read.values, path)
    arguments = _with_contents(argv, {path: json.dumps(read.values) for path, read in files.items()})
    config = _parse(parser, config_class, lambda: parser.parse_args(arguments))
    _let_the_command_line_win(config, {argument.split("=")[0] for argument in argv})
    if config.run.dir is None:
        config.run.dir = str(_run_folder(script, files))
    seed_split(config)
    _check_values(config)
    return config


def seed_split(config: Any) -> None:
    """A random split without a seed of its own gets the run's."""
    if config.data.split_id is not None and config.data.split_seed is None:
        config.data.split_seed = config.run.seed


def load_config(config_class: type[T], path: str | Path, only_known: bool = False) -> T:
    """Read a config from a JSON file alone, a run's `config.json` say.

    Args:
        config_class: Dataclass to fill.
        path: The JSON file.
        only_known: Leave out top-level sections that `config_class` does not have.

    Raises:
        UserError: as `parse`.
    """
    values = read_config(config_class, path).values
    return config_of(config_class, values, path, only_known)


def config_of(config_class: type[T], values: dict[str, Any], path: str | Path, only_known: bool = False) -> T:
    """The config that `values`, read from `path`, hold; arguments and errors as `load_config`."""
    if only_known:
        names = {field.name for field in dataclasses.fields(config_class)}
        values = {key: value for key, value in values.items() if key in names}
    _check_keys(config_class, values, path)
    parser = ArgumentParser(exit_on_error=False, parser_mode="json")
    parser.add_class_arguments(config_class)
    try:
        return _parse(parser, config_class, lambda: parser.parse_object(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain values (tuples become lists), as `config.json` holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _parse(parser: ArgumentParser, config_class: type[T], read: Callable[[], Namespace]) -> T:
    try:
        sections = parser.instantiate(read())
    except ArgumentError as error:
        raise UserError(_plain(str(error), parser)) from None
    config = config_class(**{field.name: sections[field.name] for field in dataclasses.fields(config_class)})
    for field in dataclasses.fields(config):
        _make_plain(getattr(config, field.name))
    return config


def _let_the_command_line_win(config: Any, given: set[str]) -> None:
    """Of two keys that exclude each other, one on the command line replaces the other of the file."""
    length = given & {"--run.steps", "--run.epochs"}
    if length == {"--run.steps"}:
        config.run.epochs = None
    elif length == {"--run.epochs"}:
        config.run.steps = None
    let_given_lists_win(config.data, given)


def let_given_lists_win(data: DataConfig, given: set[str]) -> None:
    """Of what says which images are labeled, that on the command line replaces that of the file."""
    for kind in KINDS_OF_LISTS:
        if f"--data.{kind[0]}" in given:
            for other in KINDS_OF_LISTS:
                if other is not kind and not given & {f"--data.{key}" for key in other}:
                    for key in other:
                        setattr(data, key, None)


def _make_plain(section: Any) -> None:
    """Turn the parser's own number types (PositiveInt, ...) into int and float, which can be stored without pickle."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _make_plain(value)
        else:
            setattr(section, field.name, _plain_value(value))


def _plain_value(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_plain_value(item) for item in value)
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return kind(value) if kind else value


def _plain(message: str, parser: ArgumentParser) -> str:
    """One line of what the parser said, with the nearest key where one was misspelt."""
    if message.startswith("unrecognized arguments:"):
        key = message.split(":", 1)[1].split()[0].split("=")[0]
        known = ["--" + action.dest for action in parser._actions]
        return f"unknown argument {key}{nearest(key, known)}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(("Subtypes", "Errors", "Given value type", "Does not"))]
    text = re.sub(r'^Parser key "([^"]+)":;? ?', r"\1: ", "; ".join(told))
    return re.sub(r"<class '([\w.]+)'>", r"\1", text)


def _given_files(argv: list[str]) -> list[str]:
    files = [value for flag, value in pairwise(argv) if flag == "--config"]
    return files + [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]


def _with_contents(argv: list[str], contents: dict[str, str]) -> list[str]:
    """The arguments with the content of config files in place of their paths."""
    flags = ["", *argv]
    replaced = [contents[value] if flag == "--config" else value for flag, value in pairwise(flags)]
    return [
        f"--config={contents[value.removeprefix('--config=')]}" if value.startswith("--config=") else value
        for value in replaced
    ]


def _run_folder(script: str, files: dict[str, Translation]) -> Path:
    """<runs>/<name of the config file>, of other scripts than train.py <runs>/<script>/<name>."""
    paper, name = script.removesuffix(".py").split("/")
    last = list(files)[-1] if files else "default"
    runs = files[last].runs if files else None
    place = Path(runs or Path("runs", paper))
    return (place if name == "train" else place / name) / Path(last).stem


def _check_keys(config_class: type, values: dict[str, Any], path: str | Path, prefix: str = "") -> None:
    """Name a misspelt key of a config file before the parser sees it."""
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        if key not in fields:
            close = nearest(prefix + key, [prefix + name for name in fields])
            raise UserError(f"unknown key {prefix}{key} in {path}{close}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key} in {path} must be a section, {{...}}, not {value!r}")
            _check_keys(fields[key], value, path, f"{prefix}{key}.")


def _check_values(config: Any) -> None:
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        for key, kind in get_type_hints(type(section)).items():
            if getattr(section, key) is None and type(None) not in get_args(kind):
                raise UserError(f"{part.name}.{key} is null; leave it out for its default")
    for key, value in flatten(to_dict(config)).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key} is {number}; it must be a finite number")
            if isinstance(number, int) or (isinstance(number, float) and key in LIMITS):
                least, most = LIMITS.get(key, (-LARGEST, LARGEST))
                if not least <= number <= most:
                    raise UserError(f"{key} is {number}; it goes from {least:g} to {most:.10g}")
        if key.endswith(("_range", "_bound")) and value[0] > value[1]:
            raise UserError(f"{key} is [{value[0]}, {value[1]}]; give the smaller one first")
    if config.model.bgr and config.model.input_mean is None:
        raise UserError("model.bgr goes with model.input_mean, the mean of the images in that order's network")
    if config.run.steps is None and config.run.epochs is None:
        raise UserError("the length of the run is missing: set run.steps or run.epochs")
    if config.run.steps is not None and config.run.epochs is not None:
        raise UserError("both run.steps and run.epochs are set; a config states exactly one of them")
