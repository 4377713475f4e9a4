"""CPCL: Conservative-Progressive Collaborative Learning for Semi-Supervised Semantic Segmentation (Fan et al., 2023).

    accelerate launch cpcl/train.py --config cpcl/configs/voc_resnet50_1over8.json
    accelerate launch cpcl/train.py --config cpcl/configs/demo.json     # built-in data, minutes on a CPU

Two networks pseudo-label a CutMix of two unlabeled images. The conservative one learns from the intersection of their
predictions, the progressive one from the union, both weighted by confidence. See cpcl/README.md for every departure
from the released code, hardware and results.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from common.augment import ScaleChoiceCrop, cutmix_box_masks, mix
from common.config.sections import BaseConfig
from common.config.types import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt, Scale, whole_number
from common.engine.run import Run
from common.engine.start import start
from common.errors import UserError, report_errors
from common.evaluation.evaluate import evaluate_run, save_panel
from common.evaluation.inference import Protocol, sum_logits
from common.images import normalize
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import OHEM, supervised_loss, upsample
from common.models.two_networks import TwoNetworks, predict_mixture
from common.optim import build_optimizer, decay_groups, poly, set_lr
from common.seeding import generators
from cpcl.losses import Prediction, count_pairs, disagreement, intersect, predict_pixels, reweighted_loss, unite
from cpcl.released import translate

BEYOND = 1  # pixels by which a crop may exceed its image, as released
BoxCount = whole_number(1, 2**10)


@dataclass
class Method:
    """Hyper-parameters of CPCL, named as in its released config.py where it has them.

    Args:
        unsup_weight: Weight of the loss on unlabeled images.
        train_scale_array: Random scales of all images, equally likely.
        cutmix_mask_prop_range: Smallest and largest share of the image area that the boxes of a mixture cover if they
            do not overlap.
        cutmix_boxmask_n_boxes: Boxes per mixture.
        ohem: Compute the labeled loss on hard pixels only.
        ohem_threshold: Probability of its class up to which a labeled pixel is hard.
        ohem_min_kept: Smallest number of pixels per labeled image that are kept.
        ohem_class_weight: Weight of each class in the loss on hard pixels; empty for equal weights.
        labels_only: Train on labeled images only: the same network, augmentation and schedule without unlabeled images.
    """

    unsup_weight: NonNegativeFloat = 1.0
    train_scale_array: tuple[Scale, ...] = (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)
    cutmix_mask_prop_range: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.25, 0.5)
    cutmix_boxmask_n_boxes: BoxCount = 3
    ohem: bool = False
    ohem_threshold: ClosedUnitInterval = 0.7
    ohem_min_kept: PositiveInt = 50_000
    ohem_class_weight: tuple[PositiveFloat, ...] = ()
    labels_only: bool = False


@dataclass
class Config(BaseConfig):
    method: Method


def check_method(config: Config) -> None:
    """Check before training that the values of `method` fit each other and the classes.

    Raises:
        UserError: a value does not fit; the message names its key.
    """
    method, classes = config.method, config.model.num_classes
    if not method.train_scale_array:
        raise UserError("method.train_scale_array is empty; give one scale or more")
    low, high = method.cutmix_mask_prop_range
    if not 0 < low <= high:
        raise UserError(f"method.cutmix_mask_prop_range is [{low}, {high}]; both must be above 0, the smaller first")
    if method.ohem_class_weight and len(method.ohem_class_weight) != classes:
        raise UserError(f"method.ohem_class_weight has {len(method.ohem_class_weight)} values for {classes} classes")
    if method.ohem_class_weight and not method.ohem:
        raise UserError("method.ohem_class_weight needs method.ohem: set method.ohem to true, or remove the weights")


def steps_per_epoch(labeled: int, unlabeled: int, batch_size: int) -> int:
    """Count the steps of an epoch by the paper's rule: the whole batches of the longer list."""
    return max(1, max(labeled, unlabeled) // batch_size)


def protocol_of(config: Config) -> Protocol:
    """Evaluation protocol of the paper: a sliding window of the crop size."""
    return Protocol(crop=tuple(config.data.crop_size))


@torch.no_grad()
def shown_labels(network: TwoNetworks, num_classes: int, protocol: Protocol, image: Tensor) -> Mapping[str, Tensor]:
    """Maps [1,H,W] for pictures: agreement of the networks on an image uint8 [1,3,H,W], and both pseudo-labels.

    The disagreement indicator is computed from the image alone; training computes it from a batch.
    """
    first, second = (
        predict_pixels(torch.div(*sum_logits(one, image, tuple(image.shape[-2:]), protocol)))
        for one in (network.first, network.second)
    )
    indicator = disagreement(count_pairs(first.label, second.label, num_classes))
    return {
        "agreement": first.label == second.label,
        "intersection": intersect(first, second).label,
        "union": unite(first, second, indicator).label,
    }


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "cpcl/train.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method
    check_method(config)

    reader, split = open_data(config, run.accelerator)
    run.set_length(steps_per_epoch(len(split.labeled), len(split.unlabeled), optim.batch_size))
    run.check_settings(reader, split)
    crop, seed = ScaleChoiceCrop(config.data.crop_size, method.train_scale_array, BEYOND), config.run.seed
    labeled_images = TrainingImages(reader, split.labeled, crop, seed, "labeled", with_label=True)
    # Two independent streams of the same images.
    streams = () if method.labels_only else ("unlabeled", "unlabeled, second")
    unlabeled_images = [
        TrainingImages(reader, split.unlabeled, crop, seed, stream, with_label=False) for stream in streams
    ]

    network = TwoNetworks(config.model)
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network, decay_groups(network.parameters())))
    boxes = (method.cutmix_mask_prop_range, method.cutmix_boxmask_n_boxes)
    class_weight = torch.tensor(method.ohem_class_weight, device=run.device) if method.ohem_class_weight else None
    ohem = OHEM(method.ohem_threshold, method.ohem_min_kept, class_weight) if method.ohem else None

    run.resume(model=network.first, extra={"second": network.second}, optimizer=optimizer)

    def score() -> None:
        protocol = protocol_of(config)
        run.log_scores(evaluate_run(network.first, reader, split, run, protocol))
        maps = partial(shown_labels, network, config.model.num_classes, protocol)
        save_panel(network.first, reader, split, run, maps=maps, protocol=protocol)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    labeled_batches, *unlabeled_batches = (StepBatches(images, run) for images in (labeled_images, *unlabeled_images))

    watched: dict[str, Any] = {}
    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power))
        for _ in run.accumulate(wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches)
                unlabeled: list[Batch] = [next(batches) for batches in unlabeled_batches]
            size, corners = labeled.label.shape[-2:], network.first.align_corners
            if method.labels_only:
                with record_function("student"):
                    output = wrapped(normalize(labeled.image))
                with record_function("losses"):
                    logits = [upsample(each, size, corners) for each in output.values()]
                    loss = sum(supervised_loss(each, labeled.label, ohem, optim.supervised_loss) for each in logits)
                    losses = {"loss": loss}
                    run.monitor.count_predictions(output["labeled1"], labeled.label)
                with record_function("backward"):
                    run.backward(loss)
                continue
            with record_function("augmentation"):
                images = tuple(normalize(batch.image) for batch in unlabeled)
                rngs = generators(config.run.seed, "boxes", unlabeled[0].positions)
                mask = cutmix_box_masks(rngs, config.data.crop_size, run.device, *boxes)
                mixed = mix(images[1], images[0], mask)
            with record_function("teacher"):
                first, second = (
                    Prediction(*predict_mixture(one, images, mask, run.autocast, predict_pixels))
                    for one in (network.first, network.second)
                )
            with record_function("student"):
                output = wrapped(normalize(labeled.image), mixed)
            with record_function("pseudo-labels"):
                reduce = partial(run.accelerator.reduce, reduction="sum")
                counts = count_pairs(first.label, second.label, config.model.num_classes, reduce)
                shared, joined = intersect(first, second), unite(first, second, disagreement(counts))
            with record_function("losses"):
                logits = {name: upsample(each, size, corners) for name, each in output.items()}
                supervised1 = supervised_loss(logits["labeled1"], labeled.label, ohem, optim.supervised_loss)
                supervised2 = supervised_loss(logits["labeled2"], labeled.label, ohem, optim.supervised_loss)
                intersection = reweighted_loss(logits["unlabeled1"], shared)
                union = reweighted_loss(logits["unlabeled2"], joined)
                loss = supervised1 + supervised2 + method.unsup_weight * (intersection + union)
                losses = {"loss": loss, "loss_supervised1": supervised1, "loss_supervised2": supervised2}
                losses |= {"loss_intersection": intersection, "loss_union": union}
                watched = {
                    "agreement": counts.diagonal().sum() / counts.sum(),
                    "confidence": (first.confidence + second.confidence).mean() / 2,
                }
                run.monitor.count_pseudo_labels(joined.label)
                run.monitor.count_predictions(output["labeled1"], labeled.label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            stepped = run.step_optimizer(optimizer, losses)
        with record_function("teacher update"):  # the teachers are the networks themselves
            if stepped:
                run.average_batch_norm(network)

        run.finish_step(
            losses | watched | {"lr": optimizer.param_groups[0]["lr"]},
            images=(1 if method.labels_only else 3) * optim.batch_size,
        )
        if run.evaluation_due:
            score()
        run.save()
    run.finish()


if __name__ == "__main__":
    main()
