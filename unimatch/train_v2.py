"""UniMatch V2: Pushing the Limit of Semi-Supervised Semantic Segmentation (Yang et al., TPAMI 2025).

    accelerate launch unimatch/train_v2.py --config unimatch/configs/pascal_unimatch_v2_dinov2_small.json
    accelerate launch unimatch/train_v2.py --config unimatch/configs/demo_v2.json     # built-in data, minutes on a CPU

A mean teacher labels weakly augmented images; the student learns those labels from two strongly augmented, mixed
versions, each with the half of the feature channels that the other lacks. See unimatch/README.md for every departure
from the released code, hardware and results.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from common.config.lengths import decay_of
from common.config.sections import ModelConfig
from common.engine.run import Run
from common.engine.start import start
from common.errors import UserError, report_errors
from common.evaluation.evaluate import evaluate_run, save_panel
from common.images import normalize, to_device
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import supervised_loss, upsample
from common.mean_teacher import ema_decay, make_teacher, update_teacher
from common.models import build_network
from common.models.deeplab import tap_channels
from common.optim import build_optimizer, poly, set_lr
from common.seeding import generators
from unimatch.augment import LongSideCrop, mix_maps, partners, strong_views
from unimatch.config import Config, hard_pixels, protocol_of, steps_per_epoch
from unimatch.losses import (
    consistency_loss,
    draw_kept,
    draw_spared,
    drop_channels,
    first_view_factors,
    unimatch_v2_loss,
    with_complement,
)
from unimatch.pseudo_labels import pseudo_labels
from unimatch.released import translate


class UniMatchV2Network(nn.Module):
    """The trained network: a segmenter with complementary dropout between encoder and decoder.

    Args:
        model: The config's `model` section.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.segmenter = build_network(model)

    def forward(
        self, labeled: Tensor, strong: Sequence[Tensor] = (), factors: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Run the one forward of a step with the paper's two batches: labeled images, then the strong views.

        Args:
            labeled: Normalized images [B,3,H,W].
            strong: Both strong views [B,3,H,W]; without them the network learns from labels only.
            factors: Factors [B,C] of the channels of the first view, one per tap.

        Returns:
            Logits: `labeled`, `strong1`, `strong2`: [B,C,h,w].
        """
        output = {"labeled": self.segmenter(labeled)}
        if strong:
            taps = self.segmenter.encode(torch.cat(list(strong)))
            taps = drop_channels(taps, [with_complement(first) for first in factors])
            logits = self.segmenter.classifier(self.segmenter.decode(taps))
            output["strong1"], output["strong2"] = logits.chunk(2)
        return output


def shares_channels(network: UniMatchV2Network, config: Config) -> bool:
    """True if one draw of channels serves all taps.

    Raises:
        UserError: the config asks for it, but the taps differ in width.
    """
    channels, comp_drop = tap_channels(network.segmenter.encoder), config.method.comp_drop
    if comp_drop == "shared" and len(set(channels)) > 1:
        raise UserError(
            f"method.comp_drop shared needs taps of one width, but {config.model.backbone} has "
            f"{', '.join(map(str, channels))} channels: set it to per_level"
        )
    return comp_drop != "per_level" and len(set(channels)) == 1


def dropout_factors(
    positions: Sequence[int], channels: Sequence[int], shared: bool, config: Config, run: Run
) -> list[Tensor]:
    """Factors [B,C] of complementary dropout in the first view, for each tap.

    Args:
        positions: Position of each image in the run, from which its random numbers follow.
        channels: Channels of the taps.
        shared: Use one draw for all taps.
    """
    rngs = generators(config.run.seed, "dropped channels", positions)
    spared = draw_spared(config.run.seed, positions, len(positions) * run.processes, config.method.spare)
    spared = to_device(np.array(spared), run.device)
    kept = draw_kept(rngs, channels[:1] if shared else channels, run.device)
    masks = [first_view_factors(one, spared) for one in kept]
    return masks * len(channels) if shared else masks


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "unimatch/train_v2.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method
    if method.alpha is None:
        raise UserError("method.alpha is not set, but UniMatch V2 has a teacher: give its decay, 0.996 in the paper")

    reader, split = open_data(config, run.accelerator)
    run.set_length(steps_per_epoch(len(split.unlabeled), optim.batch_size))
    run.check_settings(reader, split)
    weak_crop = LongSideCrop(config.data.crop_size, config.data.scale_range)
    labeled_images = TrainingImages(reader, split.labeled, weak_crop, config.run.seed, "labeled", with_label=True)
    if not method.labels_only:
        unlabeled_images = TrainingImages(
            reader, split.unlabeled, weak_crop, config.run.seed, "unlabeled", with_label=False
        )

    decay = decay_of(method.alpha, run.total)
    network = UniMatchV2Network(config.model)
    channels, shared = tap_channels(network.segmenter.encoder), shares_channels(network, config)
    teacher = run.to_device(make_teacher(network.segmenter)).eval()
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network))
    ohem, protocol = hard_pixels(method), protocol_of(config)

    run.resume(model=teacher, extra={"student": network.segmenter}, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(teacher, reader, split, run, protocol))
        save_panel(teacher, reader, split, run, threshold=method.conf_thresh, protocol=protocol)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = None if method.labels_only else StepBatches(unlabeled_images, run)

    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power))
        for _ in run.accumulate(wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches)
                unlabeled: Batch | None = None if method.labels_only else next(unlabeled_batches)
            label = labeled.label
            size, corners = label.shape[-2:], network.segmenter.align_corners
            if method.labels_only:
                with record_function("student"):
                    output = wrapped(normalize(labeled.image))
                with record_function("losses"):
                    logits = upsample(output["labeled"], size, corners)
                    losses = {"loss": supervised_loss(logits, label, ohem, optim.supervised_loss)}
                    run.monitor.count_predictions(output["labeled"], label)
                with record_function("backward"):
                    run.backward(losses["loss"])
                continue
            weak_image, padding = unlabeled.image.float() / 255, unlabeled.label
            with record_function("teacher"):
                weak = pseudo_labels(teacher, weak_image, padding, run)
            with record_function("augmentation"):
                views = strong_views(weak_image, unlabeled.positions, config.run.seed, count=2)
                mixed = [mix_maps([image], partners(run, image), mask)[0] for image, mask in views]
                factors = dropout_factors(unlabeled.positions, channels, shared, config, run)
            with record_function("student"):
                output = wrapped(normalize(labeled.image), [normalize(one) for one in mixed], factors)
            with record_function("losses"):
                supervised = supervised_loss(
                    upsample(output["labeled"], size, corners), label, ohem, optim.supervised_loss
                )
                of_partner = partners(run, *weak)
                strong = [
                    consistency_loss(
                        upsample(output[name], size, corners), *mix_maps(weak, of_partner, mask), method.conf_thresh
                    )
                    for name, (_, mask) in zip(("strong1", "strong2"), views)
                ]
                loss = unimatch_v2_loss(supervised, *strong)
                losses = {"loss": loss, "loss_supervised": supervised, "loss_strong": sum(strong) / 2}
                run.monitor.count_pseudo_labels(weak[0], weak[1] >= method.conf_thresh)
                run.monitor.count_predictions(output["labeled"], label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            stepped = run.step_optimizer(optimizer, losses)
        with record_function("teacher update"):
            if stepped:
                run.average_batch_norm(network)
                update_teacher(teacher, network.segmenter, ema_decay(step, decay), buffers=True)

        run.finish_step(
            losses | {"lr": optimizer.param_groups[0]["lr"]},
            images=(1 if method.labels_only else 2) * optim.batch_size,
        )
        if run.evaluation_due:
            score()
        run.save()
    run.finish()


if __name__ == "__main__":
    main()
