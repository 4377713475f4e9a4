"""FixMatch (Sohn et al., NeurIPS 2020) as UniMatch's and UniMatch V2's baseline for segmentation.

    accelerate launch unimatch/train_fixmatch.py --config unimatch/configs/pascal_fixmatch_resnet101.json
    accelerate launch unimatch/train_fixmatch.py --config unimatch/configs/pascal_fixmatch_dinov2_base.json
    accelerate launch unimatch/train_fixmatch.py --config unimatch/configs/demo.json     # built-in data

The weakly augmented image labels its strongly augmented, mixed version: by the trained network itself, as in UniMatch's
repository, or by a mean teacher (`method.alpha`), as in that of UniMatch V2. See unimatch/README.md.
"""

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from common.config.lengths import decay_of
from common.config.sections import ModelConfig
from common.engine.run import Run
from common.engine.start import start
from common.errors import report_errors
from common.evaluation.evaluate import evaluate_run, save_panel
from common.images import normalize
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import supervised_loss, upsample
from common.mean_teacher import ema_decay, make_teacher, update_teacher
from common.models import build_network
from common.optim import build_optimizer, poly, set_lr
from unimatch.augment import LongSideCrop, mix_maps, partners, strong_views
from unimatch.config import Config, hard_pixels, protocol_of, steps_per_epoch
from unimatch.losses import consistency_loss, fixmatch_loss
from unimatch.pseudo_labels import pseudo_labels, targets
from unimatch.released import translate


class FixMatchNetwork(nn.Module):
    """The trained network, a segmenter.

    Args:
        model: The config's `model` section.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.segmenter = build_network(model)

    def forward(self, labeled: Tensor, weak: Tensor | None = None, strong: Tensor | None = None) -> dict[str, Tensor]:
        """Run the one forward of a step with the papers' batches.

        With `weak`, these are labeled and weak images, then the strong view; without, labeled and strong images.

        Args:
            labeled, weak, strong: Normalized images [B,3,H,W].

        Returns:
            Logits [B,C,h,w] under the same names.
        """
        if strong is None:
            return {"labeled": self.segmenter(labeled)}
        if weak is None:
            return dict(zip(("labeled", "strong"), self.segmenter(torch.cat([labeled, strong])).chunk(2)))
        output = dict(zip(("labeled", "weak"), self.segmenter(torch.cat([labeled, weak])).chunk(2)))
        return output | {"strong": self.segmenter(strong)}


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "unimatch/train_fixmatch.py", argv, translate) as run:
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

    has_teacher = method.alpha is not None
    decay = decay_of(method.alpha, run.total) if has_teacher else 0.0
    network = FixMatchNetwork(config.model)
    teacher = run.to_device(make_teacher(network.segmenter)).eval() if has_teacher else None
    labeler = network.segmenter if teacher is None else teacher
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network))
    ohem, protocol = hard_pixels(method), protocol_of(config)

    run.resume(model=labeler, extra={"student": network.segmenter} if has_teacher else {}, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(labeler, reader, split, run, protocol))
        save_panel(labeler, reader, split, run, threshold=method.conf_thresh, protocol=protocol)

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
                weak = pseudo_labels(labeler, weak_image, padding, run)
            with record_function("augmentation"):
                ((image, mask),) = strong_views(weak_image, unlabeled.positions, config.run.seed, count=1)
                (mixed,) = mix_maps([image], partners(run, image), mask)
                of_partner = partners(run, *weak)
            with record_function("student"):
                own = None if has_teacher else normalize(weak_image)
                output = wrapped(normalize(labeled.image), own, normalize(mixed))
            with record_function("losses"):
                supervised = supervised_loss(
                    upsample(output["labeled"], size, corners), label, ohem, optim.supervised_loss
                )
                if not has_teacher:  # the forward that trains labels, too
                    weak = targets(output["weak"], padding, corners)
                strong = consistency_loss(
                    upsample(output["strong"], size, corners), *mix_maps(weak, of_partner, mask), method.conf_thresh
                )
                loss = fixmatch_loss(supervised, strong)
                losses = {"loss": loss, "loss_supervised": supervised, "loss_strong": strong}
                run.monitor.count_pseudo_labels(weak[0], weak[1] >= method.conf_thresh)
                run.monitor.count_predictions(output["labeled"], label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            stepped = run.step_optimizer(optimizer, losses)
        with record_function("teacher update"):
            if stepped:
                run.average_batch_norm(network)
                if has_teacher:
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
