"""CPS with CutMix: Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision (Chen et al., CVPR 2021).

    accelerate launch cac_cps/train_semiseg_cutmix.py --config cac_cps/configs/demo.json      # minutes on a CPU
    accelerate launch cac_cps/train_semiseg_cutmix.py \\
        --config cac_cps/configs/voc_cac_deeplabv3+_resnet50_1over8_datalist0.json

Each network labels two unlabeled images, and the other network learns from their CutMix. See cac_cps/README.md for
every departure from the released code, hardware and results.
"""

from typing import Any

from torch.profiler import record_function

from cac_cps.config import STEPS_PER_EPOCH, Config, cps_weight, protocol_of
from cac_cps.losses import cross_pseudo_loss, pseudo_label
from cac_cps.panels import save_disagreement_panel
from cac_cps.released import translate
from cac_cps.training import (
    augment_labeled,
    check_unlabeled,
    labeled_loss,
    make_labeled_images,
    make_optimizer,
    make_unlabeled_images,
)
from common.augment import cutmix_box_masks, mix
from common.engine.run import Run
from common.engine.start import start
from common.errors import report_errors
from common.evaluation.evaluate import evaluate_run
from common.images import normalize
from common.loaders import Batch, StepBatches, open_data
from common.losses import upsample
from common.models.two_networks import TwoNetworks, predict_mixture
from common.optim import poly, set_lr
from common.seeding import generators


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "cac_cps/train_semiseg_cutmix.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, labels_only = config.optim, config.method.labels_only
    weight = cps_weight(config, cutmix=True)

    reader, split = open_data(config, run.accelerator)
    if not labels_only:
        check_unlabeled(split.unlabeled, config.data.lists)
    run.set_length(STEPS_PER_EPOCH)
    run.check_settings(reader, split)
    labeled_images = make_labeled_images(reader, split.labeled, config)
    # Two independent streams of the same images.
    names = () if labels_only else ("unlabeled", "unlabeled, second")
    streams = [make_unlabeled_images(reader, split.unlabeled, config, name) for name in names]

    network = TwoNetworks(config.model)
    wrapped, optimizer = run.prepare(network, make_optimizer(config, network, config.method.cps.lr))

    run.resume(model=network.first, extra={"second": network.second}, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(network.first, reader, split, run, protocol_of(config)))
        save_disagreement_panel((network.first, network.second), reader, split, config, run)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    labeled_batches, *unlabeled_batches = (StepBatches(stream, run) for stream in (labeled_images, *streams))

    watched: dict[str, Any] = {}
    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power))
        for _ in run.accumulate(wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches)
                unlabeled: list[Batch] = [next(batches) for batches in unlabeled_batches]
            with record_function("augmentation"):
                labeled_image = augment_labeled(labeled, config)
            size, corners = labeled.label.shape[-2:], network.first.align_corners
            if labels_only:
                with record_function("student"):
                    output = wrapped(labeled_image)
                with record_function("losses"):
                    logits = [upsample(each, size, corners) for each in output.values()]
                    losses = {"loss": sum(labeled_loss(each, labeled.label, config) for each in logits)}
                    run.monitor.count_predictions(output["labeled1"], labeled.label)
                with record_function("backward"):
                    run.backward(losses["loss"])
                continue
            with record_function("augmentation"):
                images = tuple(normalize(batch.image) for batch in unlabeled)
                rngs = generators(config.run.seed, "boxes", unlabeled[0].positions)
                mask = cutmix_box_masks(rngs, config.data.crop_size, run.device)
                mixed = mix(images[1], images[0], mask)
            with record_function("teacher"):
                (first_label,), (second_label,) = (
                    predict_mixture(one, images, mask, run.autocast, lambda logits: (pseudo_label(logits),))
                    for one in (network.first, network.second)
                )
            with record_function("student"):
                output = wrapped(labeled_image, mixed)
            with record_function("losses"):
                upsampled = {name: upsample(logits, size, corners) for name, logits in output.items()}
                supervised1 = labeled_loss(upsampled["labeled1"], labeled.label, config)
                supervised2 = labeled_loss(upsampled["labeled2"], labeled.label, config)
                cps = cross_pseudo_loss(upsampled["unlabeled1"], upsampled["unlabeled2"], first_label, second_label)
                loss = supervised1 + supervised2 + weight * cps
                losses = {"loss": loss, "loss_supervised1": supervised1, "loss_supervised2": supervised2}
                losses["loss_cps"] = cps
                watched = {"disagreement": (first_label != second_label).float().mean()}
                run.monitor.count_pseudo_labels(second_label)
                run.monitor.count_predictions(output["labeled1"], labeled.label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            if run.step_optimizer(optimizer, losses):
                run.average_batch_norm(network)

        run.finish_step(
            losses | watched | {"lr": optimizer.param_groups[0]["lr"]},
            images=(1 if labels_only else 3) * optim.batch_size,
        )
        if run.evaluation_due:
            score()
        run.save()
    run.finish()


if __name__ == "__main__":
    main()
