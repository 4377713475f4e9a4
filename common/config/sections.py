"""The config sections that all papers share: data, model, optim and run."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, Optional, Union

from common.config.types import (
    BatchSize,
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Scale,
    Seed,
    Size,
    number,
    whole_number,
)

# Former words for `model.head`, in older configs and runs -> the current ones.
FORMER_HEADS = {"short": "v3plus", "deeplab": "v3plus_cac", "cps": "v3plus_cps", "v3": "v3plus_memory_bank"}
CropSide = whole_number(16, 2**14)  # smaller crops vanish in the network's last features
Rate = whole_number(1, 2**10)
DropRate = number(0, 0.9)
Workers = whole_number(0, 2**10)
Threads = whole_number(1, 2**12)


@dataclass
class DataConfig:
    """Images, labels, and the split into labeled and unlabeled images.

    Args:
        dataset: Layout of the dataset below `root`: `voc` (also accepted as `pascal` and `pascal_voc`), `cityscapes`,
            `gta5`, `ade20k`, `coco` (81 classes), `coco_stuff` (171), `folder` (your own data, docs/your_data.md), or
            `shapes`, a built-in dataset drawn on first use.
        root: Folder of the dataset.
        split: Folder with labeled_filename.txt, unlabeled_filename.txt and valid_filename.txt, or with lists in one of
            the published formats (docs/data.md). Give one of `split`, `labeled_list` and `split_id`.
        labeled_list: File that lists the labeled images; the validation images are then the dataset's own.
        unlabeled_list: File that lists the unlabeled images; by default all other training images.
        split_id: Number of an order of the training images, the first `labeled_samples` of which are labeled. Orders 0,
            1 and 2 are read from `order_dir`, as memory bank published them; orders from 3 up are random.
        labeled_samples: Number of labeled images; only with `split_id`.
        order_dir: Folder of split_0.pkl, split_1.pkl and split_2.pkl; only with `split_id`.
        split_seed: Seed of the random orders, by default `run.seed`; only with `split_id`.
        crop_size: Height and width of a training crop, in pixels.
        scale_range: Smallest and largest random scale of a labeled image.
        allow_overlap: Accept images that are in both the labeled and the unlabeled list.
        class_balanced: Draw labeled images by class: first a class, each with the same probability, then an image that
            shows it; by default every image is drawn equally often.
        skip_bad_files: Replace an image that cannot be read by the next one of its list; by default the run stops.
        workers: Loader processes per training process and per list.
        image_dir: Folder of the images, or a pattern of them (`images/{name}_image.png`), absolute or relative to
            `root`; only with dataset `folder`.
        label_dir: Folder or pattern of the masks, or a COCO file, in the same way; only with dataset `folder`.
        image_range: Values that become black and white in images of more than 8 bits; by default 16 bits are divided by
            257. Only with dataset `folder`.
        classes: Text file with one class per line (docs/your_data.md), absolute or relative to `root`; only with
            dataset `folder`.
    """

    dataset: Literal[
        "voc", "pascal", "pascal_voc", "cityscapes", "gta5", "ade20k", "coco", "coco_stuff", "folder", "shapes"
    ]
    root: str
    split: Optional[str] = None
    labeled_list: Optional[str] = None
    unlabeled_list: Optional[str] = None
    split_id: Optional[NonNegativeInt] = None
    labeled_samples: Optional[PositiveInt] = None
    order_dir: Optional[str] = None
    split_seed: Optional[Seed] = None
    crop_size: tuple[CropSide, CropSide] = (321, 321)
    scale_range: tuple[Scale, Scale] = (0.5, 1.5)
    allow_overlap: bool = False
    class_balanced: bool = False
    skip_bad_files: bool = False
    workers: Workers = 4
    image_dir: str = "images"
    label_dir: str = "labels"
    image_range: Optional[tuple[float, float]] = None
    classes: str = "classes.txt"

    def __post_init__(self) -> None:
        if self.dataset in ("pascal", "pascal_voc"):
            self.dataset = "voc"

    @property
    def lists(self) -> str:
        """Source of the split, for messages."""
        by_id = None if self.split_id is None else f"split id {self.split_id} with {self.labeled_samples} labels"
        return self.split or self.labeled_list or by_id or "data without lists"


@dataclass
class ModelConfig:
    """The network that is trained and evaluated.

    Args:
        num_classes: Number of classes the network predicts.
        backbone: timm name of the encoder, e.g. resnet101, convnext_tiny or vit_small_patch14_dinov2; docs/encoders.md
            and `python -m common.encoders` list them with the heads that fit.
        stem: First layers of resnet18, 34, 50, 101 or 152: `plain` is one 7x7 convolution, `deep` is three 3x3
            convolutions with 64, 64 and 128 channels.
        head: Network on the encoder: DeepLabV3+ as in PRCL and CSS (`v3plus`), CAC (`v3plus_cac`), original CPS and
            CPCL (`v3plus_cps`), memory bank (`v3plus_memory_bank`) or UniMatch (`v3plus_unimatch`); DeepLabV2 (`v2`),
            or DeepLabV2 for weights pretrained on COCO (`v2_coco`); DPT as in UniMatch V2 (`dpt`), also for ViTs. The
            former words `short`, `deeplab`, `cps` and `v3` are accepted for the first four.
        output_stride: Stride of the encoder's last features under a DeepLab: 8 or 16 where the encoder can be dilated,
            else 32. `dpt` does not use it.
        channels: Number of channels of ASPP and heads; 256 in the papers. The widths inside `dpt` follow the encoder.
        rates: Dilation rates of the three 3x3 branches of the ASPP; by default those of the output stride.
        align_corners: `align_corners` of the bilinear upsampling of features and logits; true in the papers.
        input_mean: Mean of red, green and blue (0 to 255) that is subtracted from images, without a division by a
            standard deviation; by default images are normalized with ImageNet's mean and standard deviation.
        bgr: Feed the channels in the order blue, green, red; only with `input_mean`.
        pretrained: Weights of the encoder: true or a timm name (downloaded), a local file, or false for random weights.
        freeze_encoder: The encoder learns nothing and keeps its batch-norm statistics; only decoder and heads train.
        drop_path: Probability of dropping a residual branch of the encoder in training (stochastic depth); it grows
            linearly up to this value at the last block.
        grad_checkpointing: Compute the encoder's activations again in the backward pass: less memory, more time.
        dinov2_positions: Resample position embeddings as the makers of DINOv2 do, for released checkpoints of UniMatch
            V2; by default as timm does.
    """

    num_classes: PositiveInt
    backbone: str = "resnet101"
    stem: Literal["plain", "deep"] = "plain"
    head: Literal[
        "v3plus",
        "v3plus_cac",
        "v3plus_cps",
        "v3plus_memory_bank",
        "v3plus_unimatch",
        "v2",
        "v2_coco",
        "dpt",
        "short",
        "deeplab",
        "cps",
        "v3",
    ] = "v3plus"
    output_stride: Literal[8, 16, 32] = 16
    channels: Size = 256
    rates: Optional[tuple[Rate, Rate, Rate]] = None
    align_corners: bool = True
    input_mean: Optional[tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat]] = None
    bgr: bool = False
    pretrained: Union[bool, str] = True
    freeze_encoder: bool = False
    drop_path: DropRate = 0.0
    grad_checkpointing: bool = False
    dinov2_positions: bool = False

    def __post_init__(self) -> None:
        self.head = FORMER_HEADS.get(self.head, self.head)


@dataclass
class OptimConfig:
    """Optimizer and batch.

    Args:
        name: Optimizer, `sgd` or `adamw`.
        lr: Learning rate at the first step.
        encoder_lr_scale: Learning rate of the encoder divided by `lr`; by default 1 (CAC and CPS: 0.1).
        weight_decay: Weight decay of all parameters.
        momentum: Momentum of `sgd`.
        nesterov: Use Nesterov momentum with `sgd`.
        poly_power: Exponent of the polynomial decay of the learning rate.
        batch_size: Labeled images per step, over all processes; a step has as many unlabeled images.
        accumulation: Number of backward passes per step that the batch is divided into.
        supervised_loss: Loss of labeled images: the paper's cross-entropy (`ce`), or with a Dice or focal loss added,
            for rare classes.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 1e-2
    encoder_lr_scale: Optional[PositiveFloat] = None
    weight_decay: NonNegativeFloat = 5e-4
    momentum: ClosedUnitInterval = 0.9
    nesterov: bool = True
    poly_power: NonNegativeFloat = 0.9
    batch_size: BatchSize = 16
    accumulation: PositiveInt = 1
    supervised_loss: Literal["ce", "ce+dice", "ce+focal"] = "ce"


@dataclass
class RunConfig:
    """Length, outputs and devices of a run. Intervals are in optimizer steps.

    Args:
        dir: Run folder, by default runs/<paper>/<config name>. The same command with the same folder resumes the run.
        seed: Seed of all random numbers.
        steps: Length of the run in optimizer steps. Give either `steps` or `epochs`; the one given on the command line
            replaces the other.
        epochs: Length of the run in epochs.
        steps_per_epoch: Optimizer steps per epoch; by default the paper's rule.
        eval_every: Interval between evaluations; the run is also evaluated at its end. By default once per epoch, or
            ten times in a run whose length is in steps.
        save_every: Interval between checkpoints; one is also written at the end. By default `eval_every`.
        keep: Number of newest checkpoints to keep, besides the best one.
        snapshot_every: Interval between weights-only checkpoints that are never deleted; 0 writes none.
        snapshot_from: Step of the first of them; by default `snapshot_every`.
        log_every: Interval between lines of losses in metrics.jsonl.
        precision: fp32, fp16 or bf16; by default the mixed precision that `accelerate launch` is given.
        device: `auto` uses the GPU if there is one; `cpu` does not.
        threads: CPU threads per process; by default the processes on one machine share its cores.
        deterministic: Use only operations that give identical bits on the same machine; slower on a GPU.
        max_bad_steps: Stop the run after this many consecutive steps with a non-finite loss or gradient; such steps are
            skipped.
        timeout: Seconds that a process waits for another one before it stops; must exceed the longest evaluation.
        compile: Compile the student, and losses that have a compiled kernel, with torch.compile.
        trackers: Also log to `tensorboard`, `wandb` or both.
    """

    dir: Optional[str] = None
    seed: Seed = 3407
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
    threads: Optional[Threads] = None
    deterministic: bool = False
    max_bad_steps: PositiveInt = 10
    timeout: PositiveFloat = 3600
    compile: bool = False
    trackers: list[Literal["tensorboard", "wandb"]] = dataclasses.field(default_factory=list)


@dataclass
class BaseConfig:
    """The sections that the config of every script has; a paper's `Config` adds its own section `method`."""

    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    run: RunConfig
