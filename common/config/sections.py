"""The config sections that every paper shares: data, model, optim, run."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, Optional, Union

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

# Former words for `model.head`, in older configs and runs -> today's.
FORMER_HEADS = {"short": "v3plus", "deeplab": "v3plus_cac", "cps": "v3plus_cps", "v3": "v3plus_memory_bank"}


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
        head: Network on the backbone: DeepLabV3+ as in PRCL and CSS (`v3plus`), CAC (`v3plus_cac`), original CPS and
            CPCL (`v3plus_cps`) or memory bank (`v3plus_memory_bank`); DeepLabV2 (`v2`), or DeepLabV2 for weights
            trained on COCO (`v2_coco`). Former words are accepted: `short`, `deeplab`, `cps` and `v3` for the first
            four.
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
    head: Literal[
        "v3plus", "v3plus_cac", "v3plus_cps", "v3plus_memory_bank", "v2", "v2_coco", "short", "deeplab", "cps", "v3"
    ] = "v3plus"
    output_stride: Literal[8, 16] = 16
    channels: PositiveInt = 256
    rates: Optional[tuple[PositiveInt, PositiveInt, PositiveInt]] = None
    align_corners: bool = True
    input_mean: Optional[tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat]] = None
    bgr: bool = False
    pretrained: Union[bool, str] = True

    def __post_init__(self) -> None:
        self.head = FORMER_HEADS.get(self.head, self.head)


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


NonPositiveFloat = restricted_number_type("NonPositiveFloat", float, ("<=", 0))
