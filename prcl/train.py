"""PRCL: Boosting Semi-Supervised Semantic Segmentation with Probabilistic Representations (Xie et al., AAAI 2023).

    accelerate launch prcl/train.py --config prcl/configs/voc.json
    accelerate launch prcl/train.py --config prcl/configs/demo.json     # built-in data, minutes on a CPU

A mean teacher labels weakly augmented images; the student learns from mixed, strongly augmented versions of them. The
embedding of each pixel is a Gaussian whose variance weights the contrastive loss. See prcl/README.md for every
departure from the released code, hardware and results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from common.augment import apply_geometry_batch, color_jitter_blur_flip, draw_geometry, mix_batch
from common.augment.views import CropTransform, augment_labeled
from common.config.lengths import Decay, decay_of
from common.config.sections import BaseConfig, ModelConfig
from common.config.types import ClosedUnitInterval, NonNegativeFloat, NonPositiveFloat, PositiveFloat, Scale, Size
from common.engine.monitor import RunFacts
from common.engine.run import Run
from common.engine.start import start
from common.errors import report_errors
from common.evaluation.evaluate import evaluate_run, save_panel
from common.images import normalize
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import label_and_confidence, supervised_loss, upsample, zero_loss
from common.mean_teacher import ema_decay, make_teacher, update_teacher
from common.models import build_network, conv_head
from common.optim import build_optimizer, exponential_ramp, poly, set_lr
from common.seeding import generators
from prcl.losses import contrastive_labels, contrastive_loss, prototypes, sample, unsupervised_loss
from prcl.released import translate

LR_FLOOR = 1e-6  # minimum of the released schedule
SATURATED = 1e-3  # a variance this near to 0 or 1 barely changes: the sigmoid is flat there
COLLAPSED = 0.5  # share of saturated variances from which the head is of no use


@dataclass
class Method:
    """Hyper-parameters of PRCL, named as in its README.

    Args:
        alpha: EMA decay of the mean teacher.
        uncer_lr: Learning rate of the probability head; training is very sensitive to it.
        un_threshold: Confidence from which a pixel counts toward its image's weight in the unsupervised loss.
        weak_threshold: Confidence from which an unlabeled pixel takes part in the contrastive loss.
        strong_threshold: The student's probability below which a pixel is a hard anchor.
        temp: Temperature of the contrastive loss.
        num_queries: Anchors per class.
        num_negatives: Negatives per anchor.
        begin_epoch: Epoch in which the ramp of the contrastive loss starts.
        max_epoch: Epoch from which the contrastive loss has the weight `min_value`.
        max_value: Weight of the contrastive loss at `begin_epoch`; 0 disables the loss.
        min_value: Smallest weight of the contrastive loss.
        ramp_mult: Exponent of the ramp.
        mix_mode: Mixing of unlabeled images.
        scale_range: Smallest and largest random scale in the first pass over the unlabeled images.
        embedding_dim: Dimensions of the embedding.
        labels_only: Train on labeled images only: the same network, augmentation and schedule without unlabeled images.
    """

    alpha: Decay = 0.99
    uncer_lr: PositiveFloat = 5e-5
    un_threshold: ClosedUnitInterval = 0.97
    weak_threshold: ClosedUnitInterval = 0.7
    strong_threshold: ClosedUnitInterval = 0.8
    temp: PositiveFloat = 100.0
    num_queries: Size = 256
    num_negatives: Size = 512
    begin_epoch: NonNegativeFloat = 0.0
    max_epoch: PositiveFloat = 200.0
    max_value: NonNegativeFloat = 1.0
    min_value: NonNegativeFloat = 0.0
    ramp_mult: NonPositiveFloat = -5.0
    mix_mode: Literal["none", "cutout", "cutmix", "classmix"] = "classmix"
    scale_range: tuple[Scale, Scale] = (0.5, 1.5)
    embedding_dim: Size = 256
    labels_only: bool = False


@dataclass
class Config(BaseConfig):
    method: Method


class ProbabilityHead(nn.Module):
    """Variance in (0, 1) per pixel and dimension: two linear maps with normalized rows, batch norm, sigmoid.

    As released; the paper exponentiates a log-variance instead. Parameters keep their released names.

    Args:
        in_channels: Channels of the feature.
        channels: Dimensions D of the embedding.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(channels, in_channels))
        self.fc2 = nn.Parameter(torch.empty(channels, channels))
        self.bn1 = nn.BatchNorm2d(channels)
        self.bn2 = nn.BatchNorm2d(channels, affine=False)
        self.gamma = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.zeros(1))
        for weight in (self.fc1, self.fc2):
            nn.init.kaiming_normal_(weight)

    def forward(self, feature: Tensor) -> Tensor:
        """Compute the variance [B,channels,h,w] of a feature [B,in_channels,h,w], in float32 under autocast too."""
        with torch.autocast(feature.device.type, enabled=False):
            hidden = F.relu(self.bn1(_pointwise(feature.float(), self.fc1)))
            log_odds = self.gamma * self.bn2(_pointwise(hidden, self.fc2)) + self.beta
            # ln(exp(z) + 1e-6) without overflow: it keeps the variance above 1e-6.
            # `new_full`, not `new_tensor`: that one copies from the host, which waits for the device.
            return torch.sigmoid(torch.logaddexp(log_odds, log_odds.new_full((), math.log(1e-6))))


class PRCLNetwork(nn.Module):
    """The trained network: DeepLabV3+ and, on its decoder feature, the mean and variance of pixel embeddings.

    Args:
        model: The config's `model` section, for the DeepLabV3+.
        embedding_dim: Dimensions D of the embedding.
    """

    def __init__(self, model: ModelConfig, embedding_dim: int) -> None:
        super().__init__()
        self.segmenter = build_network(model)
        feature_channels = self.segmenter.feature_channels
        self.representation = conv_head(feature_channels, model.channels, embedding_dim)
        self.probability = ProbabilityHead(feature_channels, embedding_dim)

    def forward(self, labeled: Tensor, unlabeled: Tensor | None = None) -> dict[str, Tensor]:
        """Run the one forward of a step; separate passes of the two batches keep the paper's batch-norm statistics.

        Args:
            labeled, unlabeled: Normalized images [B,3,H,W]; without unlabeled ones the network learns from labels only.

        Returns:
            `labeled`, `unlabeled`: logits [B,C,h,w]; `mu`, `sigma`: [2B,D,h,w], labeled first. Without unlabeled images
            `labeled` and `idle`, a zero that depends on the other heads.
        """
        if unlabeled is None:
            idle = zero_loss(self.representation) + zero_loss(self.probability)
            return {"labeled": self.segmenter(labeled), "idle": idle}
        features = [self.segmenter.features(labeled), self.segmenter.features(unlabeled)]
        return {
            "labeled": self.segmenter.classifier(features[0]),
            "unlabeled": self.segmenter.classifier(features[1]),
            "mu": torch.cat([self.representation(feature) for feature in features]),
            "sigma": self.probability(torch.cat(features)),
        }


def steps_per_epoch(labeled_images: int, batch_size: int) -> int:
    """Count the steps of an epoch by the paper's rule: whole passes over the labels in 2000 images, at least one."""
    steps = math.ceil(labeled_images / batch_size)
    return max(1, int(2000 / batch_size / steps)) * steps


@torch.no_grad()
def pseudo_labels(teacher: nn.Module, image: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Classes [B,H,W] and confidences [B,H,W] of the teacher in training mode for images [B,3,H,W] in [0,1]."""
    with run.autocast():
        logits = teacher(normalize(image))
    return label_and_confidence(upsample(logits, image.shape[-2:], teacher.align_corners))


def augment_unlabeled(
    image: Tensor, pseudo_label: Tensor, confidence: Tensor, positions: Sequence[int], config: Config, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """Augment in two passes with a mix between them: scale, crop; mix with the next image; color, blur, flip.

    Args:
        image: float [B,3,H,W] in [0,1].
        pseudo_label: int64 [B,H,W].
        confidence: [B,H,W].
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
    output: dict[str, Tensor], label: Tensor, pseudo_label: Tensor, confidence: Tensor, config: Config, run: Run
) -> Tensor:
    """Contrastive loss of a step, with prototypes taken over all processes."""
    method = config.method
    mu, sigma = output["mu"].float(), output["sigma"].float()
    if method.max_value == 0:
        return 0.0 * (mu.sum() + sigma.sum())  # the heads stay in the graph: DDP waits for their gradients
    classes = contrastive_labels(label, pseudo_label, confidence, method.weak_threshold, mu.shape[-2:])
    probability = torch.cat([output["labeled"], output["unlabeled"]]).detach().float().softmax(1)
    means = prototypes(mu, sigma, classes, config.model.num_classes, lambda total: run.accelerator.reduce(total, "sum"))
    samples = sample(
        classes,
        probability,
        means,
        method.strong_threshold,
        method.temp,
        method.num_queries,
        method.num_negatives,
    )
    return contrastive_loss(mu, sigma, means, samples, method.temp, config.run.compile)


def share_at_bounds(sigma: Tensor) -> Tensor:
    """Share of variances at the ends of their range (0, 1); nearly all of them once the head has collapsed."""
    return ((sigma < SATURATED) | (sigma > 1 - SATURATED)).float().mean()


def contrastive_weight(step: int, total: int, config: Config) -> float:
    """Weight of the contrastive loss in a step; a run given in steps counts as `max_epoch` epochs."""
    method = config.method
    epoch = step / total * (config.run.epochs or method.max_epoch)
    ramp = (method.begin_epoch, method.max_epoch, method.max_value, method.min_value, method.ramp_mult)
    return exponential_ramp(epoch, *ramp)


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "prcl/train.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method

    reader, split = open_data(config, run.accelerator)
    run.set_length(steps_per_epoch(len(split.labeled), optim.batch_size))
    run.check_settings(reader, split, RunFacts(lr_floor=LR_FLOOR))
    labeled_crop = CropTransform(config.data.crop_size, config.data.scale_range)
    unlabeled_crop = CropTransform(config.data.crop_size)  # scaled later, together with the pseudo-labels
    labeled_images = TrainingImages(reader, split.labeled, labeled_crop, config.run.seed, "labeled", with_label=True)
    if not method.labels_only:
        unlabeled_images = TrainingImages(
            reader, split.unlabeled, unlabeled_crop, config.run.seed, "unlabeled", with_label=False
        )

    decay = decay_of(method.alpha, run.total)
    network = PRCLNetwork(config.model, method.embedding_dim)
    teacher = run.to_device(make_teacher(network.segmenter))
    groups = [{"params": [*network.segmenter.parameters(), *network.representation.parameters()]}]
    groups.append({"params": list(network.probability.parameters()), "lr": method.uncer_lr})
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network, groups))

    run.resume(model=teacher, extra={"student": network}, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(teacher, reader, split, run))
        save_panel(teacher, reader, split, run, threshold=method.un_threshold)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = None if method.labels_only else StepBatches(unlabeled_images, run)

    watched: dict[str, Any] = {}
    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power), floor=LR_FLOOR)
        weight = contrastive_weight(step, run.total, config)
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
                    losses = {"loss": supervised_loss(logits, label, kind=optim.supervised_loss) + output["idle"]}
                    run.monitor.count_predictions(output["labeled"], label)
                with record_function("backward"):
                    run.backward(losses["loss"])
                continue
            with record_function("teacher"):
                weak_image = unlabeled.image.float() / 255
                weak_label, weak_confidence = pseudo_labels(teacher, weak_image, run)
            with record_function("augmentation"):
                image, pseudo_label, confidence = augment_unlabeled(
                    weak_image, weak_label, weak_confidence, unlabeled.positions, config, run
                )
            with record_function("student"):
                output = wrapped(normalize(labeled_image), normalize(image))
            with record_function("losses"):
                size, corners = label.shape[-2:], network.segmenter.align_corners
                supervised = supervised_loss(
                    upsample(output["labeled"], size, corners), label, kind=optim.supervised_loss
                )
                unlabeled_logits = upsample(output["unlabeled"], size, corners)
                unsupervised = unsupervised_loss(unlabeled_logits, pseudo_label, confidence, method.un_threshold)
                contrastive = contrastive_term(output, label, pseudo_label, confidence, config, run)
                loss = supervised + unsupervised + weight * contrastive
                losses = {"loss": loss, "loss_supervised": supervised}
                losses |= {"loss_unsupervised": unsupervised, "loss_contrastive": contrastive}
                watched = {"contrastive_weight": weight, "sigma": output["sigma"].mean()}
                watched["sigma_at_bounds"] = share_at_bounds(output["sigma"])
                run.monitor.count_pseudo_labels(pseudo_label, confidence >= method.un_threshold)
                run.monitor.count_predictions(output["labeled"], label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            stepped = run.step_optimizer(optimizer, losses)
        with record_function("teacher update"):
            if stepped:
                # On labels only, the teacher has no forward of its own that would give it batch-norm statistics.
                update_teacher(teacher, network.segmenter, ema_decay(step, decay), buffers=method.labels_only)
                run.average_batch_norm(network, teacher)

        logged = run.finish_step(
            losses | watched | {"lr": optimizer.param_groups[0]["lr"]},
            images=(1 if method.labels_only else 2) * optim.batch_size,
        )
        if logged.get("sigma_at_bounds", 0.0) > COLLAPSED:
            run.log.print_once(
                "warning: the probability head has collapsed: most variances are at their bounds; "
                f"lower method.uncer_lr (now {method.uncer_lr:g})"
            )
        if run.evaluation_due:
            score()
        run.save()
    run.finish()


def _pointwise(feature: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(feature, F.normalize(weight, dim=1)[:, :, None, None])


if __name__ == "__main__":
    main()
