"""What the training scripts of memory bank share: hyper-parameters, network, data, labels and rows from the teacher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, Optional

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from common import IGNORE
from common.augment import apply_geometry, draw_geometry
from common.config import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.datasets.splits import Split
from common.errors import UserError
from common.inference import Protocol, evaluation_mode
from common.losses import upsample
from common.models import build_network
from common.run import Run
from common.seeding import generator, generators
from memory_bank.bank import correct_and_confident, nearest
from memory_bank.heads import Heads, rows_of
from memory_bank.losses import ClassBalance, rows_per_image
from memory_bank.processes import summed
from memory_bank.their_config import translate
from memory_bank.views import STRONG, Maps, Ranges, draw_choice, view


@dataclass
class Adaptation:
    """What train_domain_adaptation.py has beside, or in place of, the other values.

    Args:
        source_dataset: Kind of the source, whose classes are those of `data`.
        source_root: Its folder, by default the one that `data.root` lies in (GTA5 is looked for there as GTA5 or gta5);
            of the built-in data, which are drawn on first use in another domain, `data.root` with `_b` behind it.
        contrast_weight: Weight of the contrastive loss.
        mix_probability: Of ClassMix among labeled images.
        last_steps: At the end all labels are the target's for so many steps.
    """

    source_dataset: Literal["gta5", "cityscapes", "voc", "shapes"] = "gta5"
    source_root: Optional[str] = None
    contrast_weight: NonNegativeFloat = 0.2
    mix_probability: ClosedUnitInterval = 0.25
    last_steps: NonNegativeInt = 100


@dataclass
class Method:
    """The hyper-parameters of memory bank; the released ones by default.

    Args:
        alpha: First decay of the teacher; it grows to 1 along a cosine.
        bank_size: Rows kept of a class.
        bank_start: Step after which the bank is filled.
        bank_rows_factor: Rows that enter a class at once: 1 on Cityscapes, 7 on VOC.
        bank_threshold: Probability above which a correct pixel may enter the bank.
        bank_ranking: Which rows enter where there are too many: those of the lowest scores, as released, or of the
            highest, as the paper says.
        embedding_dim: Length of a row.
        contrast_start: Step after which the contrastive loss, class weights and ClassMix of unlabeled images begin.
        contrast_weight: Weight of the contrastive loss, for labeled and for unlabeled images.
        confidence_power: Power of their confidence by which pseudo-labels are weighed.
        ramp_steps: Steps after which pseudo-labels have their full weight.
        entropy_weight: Weight of the entropy term.
        entropy_broadcast: The entropy term as released before October 2021, about as many times as large as there are
            unlabeled images in a batch.
        class_balance: Weigh classes by their frequency in labels and pseudo-labels (Cityscapes).
        mix_background: Whether ClassMix pastes class 0 like any other; not on VOC.
        half_size: Images at half their size, in training and evaluation (Cityscapes with DeepLabV2).
        unlabeled_batch_size: Unlabeled images a step, over all processes, each seen in two views; by default half as
            many as labeled ones.
        use_teacher_train: The teacher gives pseudo-labels and the bank's rows; otherwise the student, in evaluation
            mode.
        save_teacher_test: The teacher is evaluated in place of the student.
        patience: Share of the training without a better evaluation after which student and teacher start again from
            the best.
        refresh_batches: Unlabeled batches, at most as many as there are steps, from which batch-norm statistics of the
            best network are taken anew at the end; 0: none.
        adaptation: Section of train_domain_adaptation.py.
    """

    alpha: ClosedUnitInterval = 0.995
    bank_size: PositiveInt = 256
    bank_start: NonNegativeInt = 1000
    bank_rows_factor: PositiveFloat = 1.0
    bank_threshold: ClosedUnitInterval = 0.95
    bank_ranking: Literal["lowest", "highest"] = "lowest"
    embedding_dim: PositiveInt = 256
    contrast_start: NonNegativeInt = 2000
    contrast_weight: NonNegativeFloat = 0.1
    confidence_power: NonNegativeFloat = 6.0
    ramp_steps: PositiveInt = 2000
    entropy_weight: NonNegativeFloat = 0.01
    entropy_broadcast: bool = False
    class_balance: bool = False
    mix_background: bool = True
    half_size: bool = False
    unlabeled_batch_size: Optional[PositiveInt] = None
    use_teacher_train: bool = True
    save_teacher_test: bool = False
    patience: ClosedUnitInterval = 0.2
    refresh_batches: NonNegativeInt = 1000
    adaptation: Adaptation = field(default_factory=Adaptation)

    def unlabeled_batch(self, labeled: int) -> int:
        """Unlabeled images a step beside so many labeled ones."""
        return self.unlabeled_batch_size or max(1, labeled // 2)


@dataclass
class Config:
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    method: Method
    run: RunConfig

    from_released = staticmethod(translate)


def protocol_of(config: Config) -> Protocol:
    """Whole images; at half their size where the network was trained so."""
    return Protocol(reduce=2 if config.method.half_size else 1)


class MemoryBankNetwork(nn.Module):
    """Everything that is trained: a DeepLab, and heads and selectors on rows of its features.

    Scale and shift of the backbone's batch norms stay what they are; their statistics go on.

    Args:
        model: The config's `model` section.
        embedding_dim: Length F of a row in the bank.
    """

    def __init__(self, model: ModelConfig, embedding_dim: int) -> None:
        super().__init__()
        self.segmenter = build_network(model)
        for module in self.segmenter.encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)
        self.heads = Heads(self.segmenter.feature_channels, model.num_classes, embedding_dim)

    def forward(self, images: dict[str, Tensor], labels: dict[str, Tensor] | None) -> dict[str, dict[str, Tensor]]:
        """One forward a step; batches pass apart, which keeps the paper's batch-norm statistics.

        Args:
            images: Normalised images [B,3,H,W] by name, in the order in which they pass.
            labels: int64 [B,H,W] by the same names, in the order in which their rows pass the heads; None before the
                contrastive loss begins.

        Returns:
            `logits`: [B,C,h,w] by name. `rows`: [B*h*w,F] and `classes`: int64 [B*h*w] by name, for the contrastive
            loss. `idle`: a zero that depends on heads and selectors, from which processes wait for gradients.
        """
        features = {name: self.segmenter.features(image) for name, image in images.items()}
        logits = {name: self.segmenter.classifier(feature) for name, feature in features.items()}
        if labels is None:
            learning = [parameter.sum() for parameter in self.heads.parameters() if parameter.requires_grad]
            return {"logits": logits, "idle": {"heads": 0.0 * torch.stack(learning).sum()}}
        small = {name: nearest(label, features[name].shape[-2:]) for name, label in labels.items()}
        rows = {name: self.heads(features[name], label) for name, label in small.items()}
        return {"logits": logits, "rows": rows, "classes": {name: label.flatten() for name, label in small.items()}}


@dataclass(frozen=True)
class BlackCrop:
    """A random crop; what an image is too small for is black and ignored.

    Attributes:
        crop_size: Height and width of the result, pixels.
        scale_range: Of the uniform random scale.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]

    def __call__(self, image: Tensor, label: Tensor | None, rng: np.random.Generator) -> tuple[Tensor, Tensor | None]:
        """uint8 [3,H,W] and [H,W] -> the same at the size of the crop."""
        geometry = draw_geometry(rng, image.shape[-2:], self.crop_size, self.scale_range)
        image, label, _ = apply_geometry(image, label, None, geometry, self.crop_size)
        # Nothing of the source is written to: where there is padding, the crop is a copy.
        image[:, geometry.height :] = 0
        image[:, :, geometry.width :] = 0
        return image, label


def crop_of(config: Config) -> BlackCrop:
    """The crop of labeled and unlabeled images."""
    factor = 0.5 if config.method.half_size else 1.0
    low, high = config.data.scale_range
    return BlackCrop(config.data.crop_size, (factor * low, factor * high))


def unlabeled_share(config: Config, run: Run) -> int:
    """Unlabeled images of one process in one backward pass.

    Raises:
        UserError: they cannot be divided evenly, or to single images where DeepLabV3+ needs two for its batch norm.
    """
    total = config.method.unlabeled_batch(config.optim.batch_size)
    share, rest = divmod(total, run.processes * config.optim.accumulation)
    if rest:
        raise UserError(
            f"{total} unlabeled images a step cannot be divided over {run.processes} processes x "
            f"{config.optim.accumulation} accumulation passes; set method.unlabeled_batch_size"
        )
    shared = run.processes > 1 and run.device.type == "cuda"
    if share == 1 and config.model.head == "v3" and not shared:
        raise UserError(
            "one unlabeled image a process and pass is too few for batch norm: raise method.unlabeled_batch_size"
        )
    return share


def class_balance(config: Config, split: Split) -> ClassBalance:
    """Tables as long as one pass over the labeled and one over the unlabeled images."""
    batch = config.optim.batch_size
    steps = len(split.labeled) // batch, len(split.unlabeled) // config.method.unlabeled_batch(batch)
    return ClassBalance(config.model.num_classes, *(max(1, count) for count in steps))


def most_rows(config: Config, split: Split) -> int:
    """Rows of a class that enter the bank at most in one update, over all processes."""
    method, accumulation = config.method, config.optim.accumulation
    factor = rows_per_image(method.bank_size, len(split.labeled), method.bank_rows_factor)
    return config.optim.batch_size // accumulation * factor


@torch.no_grad()
def pseudo_labels(
    network: MemoryBankNetwork, image: Tensor, size: tuple[int, int], autocast: Callable
) -> tuple[Tensor, Tensor]:
    """Class [B,H,W] and its probability [B,H,W] for normalised images, in the mode the network is in."""
    with autocast():
        logits = network.segmenter(image)
    confidence, pseudo_label = upsample(logits, size, network.segmenter.align_corners).softmax(1).max(1)
    return pseudo_label, confidence


@torch.no_grad()
def rows_for_bank(
    network: MemoryBankNetwork, image: Tensor, label: Tensor, threshold: float, autocast: Callable
) -> tuple[Tensor, Tensor]:
    """What labeled images offer the bank, in the mode the network is in.

    Args:
        network: The teacher, or the student.
        image: Normalised, [B,3,H,W].
        label: int64 [B,H,W].
        threshold: See `correct_and_confident`.
        autocast: Mixed precision.

    Returns:
        Rows [B*h*w,F] and their classes [B*h*w], 255 for those that may not enter. A single row on all processes does
        not: nothing can normalise it.
    """
    with autocast():
        feature = network.segmenter.features(image)
        logits = network.segmenter.classifier(feature)
    classes = correct_and_confident(logits, label, threshold, network.segmenter.align_corners).flatten()
    enough = summed((classes != IGNORE).sum()) > 1
    classes = torch.where(enough, classes, IGNORE)
    with autocast():
        rows = network.heads.projection(rows_of(feature), classes != IGNORE)
    return rows.float(), classes


def draw_view(
    image: Tensor,
    label: Tensor,
    confidence: Tensor | None,
    positions: list[int],
    purpose: str,
    ranges: Ranges,
    config: Config,
    run: Run,
) -> Maps:
    """A view of a batch; what is common to its images is also common to those of other processes.

    Args:
        image: uint8, or float in [0, 1], [B,3,H,W].
        label: int64 [B,H,W].
        confidence: [B,H,W]; None counts as 1 everywhere.
        positions: What the random numbers of each image follow from.
        purpose: Name of the view.
        ranges: What is drawn from.
    """
    seed = config.run.seed
    # The first position of the whole batch: this process's first one, less those of the processes before it.
    start = positions[0] - run.rank * len(positions)
    choice = draw_choice(generator(seed, f"{purpose}, the batch", start), ranges)
    image = image if image.is_floating_point() else image / 255
    confidence = torch.ones_like(image[:, 0]) if confidence is None else confidence
    rngs = generators(seed, purpose, positions)
    background = config.method.mix_background
    return view(image, label, confidence, choice, ranges, rngs, background, run.from_next_process)


def strong_views(
    image: Tensor, label: Tensor, confidence: Tensor, positions: list[int], mixes: bool, config: Config, run: Run
) -> Maps:
    """Two independent strong views of each image, next to each other: [2B,...]; arguments as `draw_view`.

    Args:
        mixes: Whether ClassMix has begun.
    """
    ranges = STRONG if mixes else replace(STRONG, mix_probability=0.0)
    views = [
        draw_view(image, label, confidence, positions, f"strong view {number}", ranges, config, run)
        for number in (1, 2)
    ]
    return tuple(torch.stack(maps, dim=1).flatten(0, 1) for maps in zip(*views))


@contextmanager
def labeler(student: MemoryBankNetwork, teacher: MemoryBankNetwork, config: Config) -> Iterator[MemoryBankNetwork]:
    """The network that gives pseudo-labels and rows for the bank: the teacher as it is, or the student evaluating."""
    if config.method.use_teacher_train:
        yield teacher
        return
    with evaluation_mode(student):
        yield student
