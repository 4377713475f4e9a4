"""CSS: Space Engage, Collaborative Space Supervision for Contrastive-based Semi-Supervised Semantic Segmentation
(Wang et al., ICCV 2023).

    accelerate launch css/train.py --config css/configs/voc.json
    accelerate launch css/train.py --config css/configs/demo.json     # built-in data, minutes on a CPU

A mean teacher labels weakly augmented images twice: by its logits, and by the similarity of its representations to
class prototypes. The student learns from mixed, strongly augmented versions of them where both labels agree. See
css/README.md for every departure from the released code, hardware and results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from common import IGNORE
from common.augment import apply_geometry_batch, color_jitter_blur_flip, draw_geometry, mix_batch
from common.augment.views import CropTransform, augment_labeled
from common.config.lengths import Decay, decay_of
from common.config.sections import BaseConfig, ModelConfig
from common.config.types import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonPositiveFloat,
    PositiveFloat,
    PositiveInt,
    Scale,
    Size,
)
from common.engine.monitor import RunFacts
from common.engine.run import Run
from common.engine.start import start
from common.errors import report_errors
from common.evaluation.evaluate import evaluate_run, save_panel
from common.evaluation.inference import evaluation_mode
from common.images import normalize
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import OHEM, supervised_loss, upsample, zero_loss
from common.mean_teacher import ema_decay, make_teacher, update_teacher
from common.models import build_network, conv_head
from common.optim import build_optimizer, exponential_ramp, poly, set_lr
from common.seeding import generators
from css.losses import (
    Prototypes,
    Space,
    agreed,
    contrastive_labels,
    contrastive_loss,
    largest_similarity_softmax,
    pseudo_labels,
    sample,
    similarity,
    unsupervised_loss,
)
from css.released import translate


@dataclass
class Method:
    """Hyper-parameters of CSS, named as in its README.

    Args:
        pseudo_label: Pseudo-labels of the losses: `mix` uses the pixels on which logits and representations agree (the
            paper), `cross` gives each space the labels of the other one, `ori` uses the logits' labels (the baseline).
        lr_floor: Smallest learning rate of the schedule, as released.
        alpha_t: EMA decay of the mean teacher.
        alpha_p: EMA decay of the prototypes.
        un_threshold: Confidence from which a pixel counts toward its image's weight in the unsupervised loss.
        weak_threshold: Confidence from which an unlabeled pixel takes part in the contrastive loss.
        strong_threshold: The student's softmax similarity (`ori`: probability) below which a pixel is a hard anchor.
        similarity_temp: Temperature of the similarity to the prototypes; by default 0.25, and 0.1 for `cross`.
        temp: Temperature of the contrastive loss.
        num_queries: Anchors per class.
        num_negatives: Negatives per anchor.
        warm_up: Number of first epochs in which the logits alone give the pseudo-labels.
        ramp_unit: Meaning of an epoch for `warm_up` and the ramp: `training` divides the run into `max_epoch` epochs,
            `released` counts passes over the labeled images.
        begin_epoch: Epoch in which the ramp of the contrastive loss starts.
        max_epoch: Epoch from which the contrastive loss has the weight `min_value`.
        max_value: Weight of the contrastive loss at `begin_epoch`; 0 disables the loss. `ori` uses it throughout.
        min_value: Smallest weight of the contrastive loss.
        ramp_mult: Exponent of the ramp; 0 keeps `max_value` until `max_epoch`.
        ohem: Compute the supervised loss on hard pixels only (Cityscapes).
        ohem_threshold: Probability of its class up to which a labeled pixel is hard.
        ohem_min_kept: Smallest number of labeled pixels per image that are kept.
        mix_mode: Mixing of unlabeled images.
        scale_range: Smallest and largest random scale in the first pass over the unlabeled images.
        embedding_dim: Dimensions of the representation.
        labels_only: Train on labeled images only: the same network, augmentation and schedule without unlabeled images.
    """

    pseudo_label: Space = "mix"
    lr_floor: NonNegativeFloat = 1e-4
    alpha_t: Decay = 0.99
    alpha_p: Decay = 0.99
    un_threshold: ClosedUnitInterval = 0.97
    weak_threshold: ClosedUnitInterval = 0.7
    strong_threshold: ClosedUnitInterval = 0.8
    similarity_temp: Optional[PositiveFloat] = None
    temp: PositiveFloat = 0.5
    num_queries: Size = 256
    num_negatives: Size = 512
    warm_up: NonNegativeFloat = 0.0
    ramp_unit: Literal["training", "released"] = "training"
    begin_epoch: NonNegativeFloat = 0.0
    max_epoch: PositiveFloat = 200.0
    max_value: NonNegativeFloat = 1.0
    min_value: NonNegativeFloat = 0.0
    ramp_mult: NonPositiveFloat = -5.0
    ohem: bool = False
    ohem_threshold: ClosedUnitInterval = 0.7
    ohem_min_kept: PositiveInt = 50_000
    mix_mode: Literal["none", "cutout", "cutmix", "classmix"] = "cutmix"
    scale_range: tuple[Scale, Scale] = (0.5, 1.5)
    embedding_dim: Size = 256
    labels_only: bool = False

    def __post_init__(self) -> None:
        if self.similarity_temp is None:
            self.similarity_temp = 0.1 if self.pseudo_label == "cross" else 0.25


@dataclass
class Config(BaseConfig):
    method: Method


class CSSNetwork(nn.Module):
    """The trained network: DeepLabV3+ and, on its decoder feature, the representation of each pixel.

    Args:
        model: The config's `model` section, for the DeepLabV3+.
        embedding_dim: Dimensions D of the representation.
    """

    def __init__(self, model: ModelConfig, embedding_dim: int) -> None:
        super().__init__()
        self.segmenter = build_network(model)
        feature_channels = self.segmenter.feature_channels
        self.representation = conv_head(feature_channels, model.channels, embedding_dim)

    def both_spaces(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits [B,C,h,w] and representation [B,D,h,w] of normalized images [B,3,H,W]."""
        feature = self.segmenter.features(image)
        return self.segmenter.classifier(feature), self.representation(feature)

    def forward(self, labeled: Tensor, unlabeled: Tensor | None = None) -> dict[str, Tensor]:
        """Run the one forward of a step; separate passes of the two batches keep the paper's batch-norm statistics.

        Args:
            labeled, unlabeled: Normalized images [B,3,H,W]; without unlabeled ones the network learns from labels only.

        Returns:
            `labeled`, `unlabeled`: logits [B,C,h,w]; `representation`: [2B,D,h,w], labeled first. Without unlabeled
            images `labeled` and `idle`, a zero that depends on the other head.
        """
        if unlabeled is None:
            return {"labeled": self.segmenter(labeled), "idle": zero_loss(self.representation)}
        logits, representations = zip(self.both_spaces(labeled), self.both_spaces(unlabeled))
        return {"labeled": logits[0], "unlabeled": logits[1], "representation": torch.cat(representations)}


def steps_per_epoch(labeled_images: int, batch_size: int) -> int:
    """Count the steps of an epoch by the paper's rule: one pass over the labeled images without an incomplete batch."""
    return max(1, labeled_images // batch_size)


@torch.no_grad()
def teacher_labels(
    teacher: nn.Module, memory: Prototypes, labeled: Tensor, unlabeled: Tensor, epoch: float, config: Config, run: Run
) -> tuple[Tensor, Tensor]:
    """Pseudo-labels [B,K,H,W] and confidences [B,K,H,W] of the teacher in training mode; see `pseudo_labels`.

    Args:
        labeled, unlabeled: Images in [0,1], [B,3,H,W].
        epoch: Epoch of the step in units of the ramp.
    """
    method = config.method
    with run.autocast():
        if method.pseudo_label != "ori":
            teacher.both_spaces(normalize(labeled))  # as released: its batch norm sees labeled images too
        logits, representation = teacher.both_spaces(normalize(unlabeled))
    kind = "ori" if epoch < method.warm_up else method.pseudo_label
    size, corners = unlabeled.shape[-2:], teacher.segmenter.align_corners
    return pseudo_labels(kind, logits, representation, memory.mean, method.similarity_temp, size, corners)


def augment_unlabeled(
    image: Tensor, pseudo_label: Tensor, confidence: Tensor, positions: Sequence[int], config: Config, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """Augment in two passes with a mix between them: scale, crop; mix with the next image; color, blur, flip.

    Args:
        image: float [B,3,H,W] in [0,1].
        pseudo_label: int64 [B,K,H,W].
        confidence: [B,K,H,W].
        positions: Position of each image in the run, from which its random numbers follow.
    """
    rngs = generators(config.run.seed, "unlabeled, on the device", positions)
    crop = config.data.crop_size
    geometries = [draw_geometry(rng, image.shape[-2:], crop, config.method.scale_range) for rng in rngs]
    views = apply_geometry_batch(image, pseudo_label, confidence, geometries, crop)
    # The last image mixes with the first one of the next process.
    following = run.from_next_process(*(view[0] for view in views))
    image, pseudo_label, confidence = mix_batch(config.method.mix_mode, *views, rngs, following)
    return color_jitter_blur_flip(image, pseudo_label, confidence, rngs)


def contrastive_term(
    output: dict[str, Tensor],
    memory: Prototypes,
    label: Tensor,
    pseudo_label: Tensor,
    confidence: Tensor,
    weight: float,
    config: Config,
    run: Run,
) -> Tensor:
    """Update the prototypes by the representations of a step, then compute the contrastive loss.

    Args:
        output: Output of `CSSNetwork`.
        memory: Prototypes, updated in place.
        label: int64 [B,H,W].
        pseudo_label, confidence: [B,H,W] of the unlabeled images.
        weight: Weight of the loss in this step; with 0 the loss is 0, and only the prototypes are updated.
    """
    method = config.method
    representation = output["representation"].float()
    classes = contrastive_labels(label, pseudo_label, confidence, method.weak_threshold, representation.shape[-2:])
    reduce = partial(run.accelerator.reduce, reduction="sum")
    if weight == 0:
        memory.update(representation, classes, decay_of(method.alpha_p, run.total), reduce)
        return 0.0 * representation.sum()  # the head stays in the graph: DDP waits for its gradients
    with torch.no_grad():
        if method.pseudo_label == "ori":
            scores = torch.cat([output["labeled"], output["unlabeled"]]).float()
        else:
            scores = similarity(representation, memory.mean) / method.similarity_temp
    present = memory.update(representation, classes, decay_of(method.alpha_p, run.total), reduce)
    samples = sample(
        classes,
        scores.softmax(1),
        memory.mean,
        present,
        method.strong_threshold,
        method.temp,
        method.num_queries,
        method.num_negatives,
    )
    return contrastive_loss(representation, memory.mean, samples, method.temp)


def epoch_of(step: int, run: Run, method: Method) -> float:
    """Epoch of a step in the unit of `warm_up` and the ramp (`method.ramp_unit`)."""
    if method.ramp_unit == "released":
        return step / run.steps_per_epoch
    return step / run.total * method.max_epoch


def contrastive_weight(epoch: float, method: Method) -> float:
    """Weight of the contrastive loss in an epoch; constant with `ori`, as released."""
    if method.pseudo_label == "ori":
        return method.max_value
    ramp = (method.begin_epoch, method.max_epoch, method.max_value, method.min_value, method.ramp_mult)
    return exponential_ramp(epoch, *ramp)


def unreachable_thresholds(method: Method, num_classes: int) -> str | None:
    """Describe in one line the thresholds that the similarity temperature puts out of reach; None without any."""
    highest = largest_similarity_softmax(method.similarity_temp, num_classes)
    effects = []
    if method.pseudo_label != "ori" and highest < method.strong_threshold:
        effects.append(f"method.strong_threshold {method.strong_threshold:g}: every pixel counts as hard")
    if method.pseudo_label == "cross" and highest < method.un_threshold:
        effects.append(f"method.un_threshold {method.un_threshold:g}: the unsupervised loss stays 0 after warm-up")
    if not effects:
        return None
    given = f"with method.similarity_temp {method.similarity_temp:g} and {num_classes} classes"
    return f"{given} the softmax similarity is at most {highest:.3f}, below {', below '.join(effects)}"


@torch.no_grad()
def space_maps(image: Tensor, teacher: nn.Module, memory: Prototypes) -> dict[str, Tensor]:
    """Class ids [B,H,W] of the teacher in both spaces for uint8 images [B,3,H,W], and those both agree on."""
    with evaluation_mode(teacher):
        logits, representation = teacher.both_spaces(normalize(image))
    size, corners = image.shape[-2:], teacher.segmenter.align_corners
    labels, _ = pseudo_labels("cross", logits, representation, memory.mean, 1.0, size, corners)
    by_logits, by_similarity = labels.unbind(1)
    agreement = agreed(by_logits, by_similarity)
    return {"logit space": by_logits, "representation space": by_similarity, "agreement": agreement}


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "css/train.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method
    ohem = OHEM(method.ohem_threshold, method.ohem_min_kept) if method.ohem else None

    reader, split = open_data(config, run.accelerator)
    run.set_length(steps_per_epoch(len(split.labeled), optim.batch_size))
    # The prototypes are not a network that is evaluated: their average may lag.
    run.check_settings(reader, split, RunFacts(lr_floor=method.lr_floor, skipped=("method.alpha_p",)))
    labeled_crop = CropTransform(config.data.crop_size, config.data.scale_range)
    unlabeled_crop = CropTransform(config.data.crop_size)  # scaled later, together with the pseudo-labels
    labeled_images = TrainingImages(reader, split.labeled, labeled_crop, config.run.seed, "labeled", with_label=True)
    if not method.labels_only:
        unlabeled_images = TrainingImages(
            reader, split.unlabeled, unlabeled_crop, config.run.seed, "unlabeled", with_label=False
        )

    decay = decay_of(method.alpha_t, run.total)
    network = CSSNetwork(config.model, method.embedding_dim)
    teacher = run.to_device(make_teacher(network))
    memory = run.to_device(Prototypes(config.model.num_classes, method.embedding_dim))
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network))
    if warning := unreachable_thresholds(method, config.model.num_classes):
        run.log.print(f"warning: {warning}")

    extra = {"student": network, "teacher_representation": teacher.representation, "prototypes": memory}
    run.resume(model=teacher.segmenter, extra=extra, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(teacher.segmenter, reader, split, run))
        maps = partial(space_maps, teacher=teacher, memory=memory)
        save_panel(teacher.segmenter, reader, split, run, maps=maps)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = None if method.labels_only else StepBatches(unlabeled_images, run)

    watched: dict[str, Any] = {}
    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power), floor=method.lr_floor)
        epoch = epoch_of(step, run, method)
        weight = contrastive_weight(epoch, method)
        for _ in run.accumulate(wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches)
                unlabeled: Batch | None = None if method.labels_only else next(unlabeled_batches)
            with record_function("augmentation"):
                labeled_image, label = augment_labeled(labeled.image, labeled.label, labeled.positions, config.run.seed)
            if method.labels_only:
                with record_function("student"):
                    output = wrapped(normalize(labeled_image))
                with record_function("losses"):
                    logits = upsample(output["labeled"], label.shape[-2:], network.segmenter.align_corners)
                    losses = {"loss": supervised_loss(logits, label, ohem, optim.supervised_loss) + output["idle"]}
                    run.monitor.count_predictions(output["labeled"], label)
                with record_function("backward"):
                    run.backward(losses["loss"])
                continue
            with record_function("teacher"):
                weak_image = unlabeled.image.float() / 255
                weak_label, weak_confidence = teacher_labels(
                    teacher, memory, labeled_image, weak_image, epoch, config, run
                )
            with record_function("augmentation"):
                image, pseudo_label, confidence = augment_unlabeled(
                    weak_image, weak_label, weak_confidence, unlabeled.positions, config, run
                )
            with record_function("student"):
                output = wrapped(normalize(labeled_image), normalize(image))
            with record_function("losses"):
                size, corners = label.shape[-2:], network.segmenter.align_corners
                labeled_logits = upsample(output["labeled"], size, corners)
                supervised = supervised_loss(labeled_logits, label, ohem, optim.supervised_loss)
                unlabeled_logits = upsample(output["unlabeled"], size, corners)
                first, last = ((pseudo_label[:, k], confidence[:, k]) for k in (0, -1))
                unsupervised = unsupervised_loss(unlabeled_logits, *last, method.un_threshold)
                contrastive = contrastive_term(output, memory, label, *first, weight, config, run)
                loss = supervised + unsupervised + weight * contrastive
                losses = {"loss": loss, "loss_supervised": supervised}
                losses |= {"loss_unsupervised": unsupervised, "loss_contrastive": contrastive}
                watched = {"contrastive_weight": weight, "pseudo_labeled": (last[0] != IGNORE).float().mean()}
                run.monitor.count_pseudo_labels(last[0], last[1] >= method.un_threshold)
                run.monitor.count_predictions(output["labeled"], label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            stepped = run.step_optimizer(optimizer, losses)
        with record_function("teacher update"):
            if stepped:
                # On labels only, the teacher has no forward of its own that would give it batch-norm statistics.
                update_teacher(teacher, network, ema_decay(step, decay), buffers=method.labels_only)
                run.average_batch_norm(network, teacher)

        run.finish_step(
            losses | watched | {"lr": optimizer.param_groups[0]["lr"]},
            images=(1 if method.labels_only else 2) * optim.batch_size,
        )
        if run.evaluation_due:
            score()
        run.save()
    run.finish()


if __name__ == "__main__":
    main()
