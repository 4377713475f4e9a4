"""UniMatch: Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation (Yang et al., CVPR 2023).

    accelerate launch unimatch/train.py --config unimatch/configs/pascal_unimatch_resnet101.json
    accelerate launch unimatch/train.py --config unimatch/configs/demo.json     # built-in data, minutes on a CPU

The network labels weakly augmented images itself; it learns those labels from two strongly augmented, mixed versions
and from features of the weak image with half of their channels dropped. See unimatch/README.md for every departure from
the released code, hardware and results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from common.config.sections import ModelConfig
from common.engine.run import Run
from common.engine.start import start
from common.errors import report_errors
from common.evaluation.evaluate import evaluate_run, save_panel
from common.images import normalize
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import supervised_loss, upsample
from common.models import build_network
from common.models.deeplab import tap_channels
from common.optim import build_optimizer, poly, set_lr
from common.seeding import generators
from unimatch.augment import LongSideCrop, mix_maps, partners, strong_views
from unimatch.config import Config, hard_pixels, protocol_of, steps_per_epoch
from unimatch.losses import consistency_loss, draw_kept, drop_channels, unimatch_loss
from unimatch.pseudo_labels import pseudo_labels, targets
from unimatch.released import translate


class UniMatchNetwork(nn.Module):
    """The trained network: a segmenter, whose decoder also sees features with dropped channels.

    Args:
        model: The config's `model` section.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.segmenter = build_network(model)

    def forward(
        self,
        labeled: Tensor,
        weak: Tensor | None = None,
        strong: Sequence[Tensor] = (),
        kept_labeled: Sequence[Tensor] = (),
        kept_weak: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Run the one forward of a step with the paper's two batches: labeled and weak images, then strong views.

        Args:
            labeled, weak: Normalized images [B,3,H,W]; without the latter the network learns from labels only.
            strong: Both strong views [B,3,H,W].
            kept_labeled, kept_weak: Channels that the dropout keeps in features of the images, bool [B,C] per tap.

        Returns:
            Logits: `labeled`, `weak`, `perturbed` (from dropped features of `weak`), `strong1`, `strong2`: [B,C,h,w].
        """
        if weak is None:
            return {"labeled": self.segmenter(labeled)}
        kept = [torch.cat(pair) for pair in zip(kept_labeled, kept_weak, strict=True)]
        whole, dropped = self.whole_and_dropped(torch.cat([labeled, weak]), kept)
        names = ("labeled", "weak", "perturbed", "strong1", "strong2")
        return dict(
            zip(names, (*whole.chunk(2), dropped.chunk(2)[1], *self.segmenter(torch.cat(list(strong))).chunk(2)))
        )

    def whole_and_dropped(self, image: Tensor, kept: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [B,C,h,w] of normalized images from whole features, and from those that keep half of their channels.

        As released, both are one batch for the decoder's batch norm, and labeled images are in it too.
        """
        taps = self.segmenter.encode(image)
        dropped = drop_channels(taps, [2.0 * channels for channels in kept])
        feature = self.segmenter.decode([torch.cat(pair) for pair in zip(taps, dropped)])
        return self.segmenter.classifier(feature).chunk(2)


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "unimatch/train.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method

    reader, split = open_data(config, run.accelerator)
    run.set_length(steps_per_epoch(len(split.unlabeled), optim.batch_size))
    run.check_settings(reader, split)
    weak_crop = LongSideCrop(config.data.crop_size, config.data.scale_range)
    labeled_images = TrainingImages(reader, split.labeled, weak_crop, config.run.seed, "labeled", with_label=True)
    if not method.labels_only:
        unlabeled_images = TrainingImages(
            reader, split.unlabeled, weak_crop, config.run.seed, "unlabeled", with_label=False
        )

    network = UniMatchNetwork(config.model)
    channels = tap_channels(network.segmenter.encoder)
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network))
    ohem, protocol = hard_pixels(method), protocol_of(config)

    run.resume(model=network.segmenter, extra={}, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(network.segmenter, reader, split, run, protocol))
        save_panel(network.segmenter, reader, split, run, threshold=method.conf_thresh, protocol=protocol)

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
                of_partner = partners(run, *pseudo_labels(network.segmenter, weak_image, padding, run))
            with record_function("augmentation"):
                views = strong_views(weak_image, unlabeled.positions, config.run.seed, count=2)
                mixed = [mix_maps([image], partners(run, image), mask)[0] for image, mask in views]
                streams = {"dropped channels of labeled": labeled, "dropped channels": unlabeled}
                kept = [
                    draw_kept(generators(config.run.seed, purpose, batch.positions), channels, run.device)
                    for purpose, batch in streams.items()
                ]
            with record_function("student"):
                output = wrapped(
                    normalize(labeled.image), normalize(weak_image), [normalize(one) for one in mixed], *kept
                )
            with record_function("losses"):
                supervised = supervised_loss(
                    upsample(output["labeled"], size, corners), label, ohem, optim.supervised_loss
                )
                weak = targets(output["weak"], padding, corners)
                strong = [
                    consistency_loss(
                        upsample(output[name], size, corners), *mix_maps(weak, of_partner, mask), method.conf_thresh
                    )
                    for name, (_, mask) in zip(("strong1", "strong2"), views)
                ]
                perturbed = consistency_loss(upsample(output["perturbed"], size, corners), *weak, method.conf_thresh)
                loss = unimatch_loss(supervised, *strong, perturbed)
                losses = {"loss": loss, "loss_supervised": supervised, "loss_strong": sum(strong) / 2}
                losses |= {"loss_perturbed": perturbed}
                run.monitor.count_pseudo_labels(weak[0], weak[1] >= method.conf_thresh)
                run.monitor.count_predictions(output["labeled"], label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            if run.step_optimizer(optimizer, losses):
                run.average_batch_norm(network)

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
