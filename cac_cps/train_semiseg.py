"""CPS: Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision (Chen et al., CVPR 2021).

    accelerate launch cac_cps/train_semiseg.py --config cac_cps/configs/demo.json      # built-in data, minutes on a CPU
    accelerate launch cac_cps/train_semiseg.py \\
        --config cac_cps/configs/voc_cac_deeplabv3+_resnet50_1over8_datalist0.json

Two networks of different initialization learn from each other's hard predictions on labeled and unlabeled images.
See cac_cps/README.md for every departure from the released code, hardware and results.
"""

from typing import Any

import torch
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
from common.engine.run import Run
from common.engine.start import start
from common.errors import report_errors
from common.evaluation.evaluate import evaluate_run
from common.images import normalize
from common.loaders import Batch, StepBatches, open_data
from common.losses import upsample
from common.models.two_networks import TwoNetworks
from common.optim import poly, set_lr


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "cac_cps/train_semiseg.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, labels_only = config.optim, config.method.labels_only
    weight = cps_weight(config, cutmix=False)

    reader, split = open_data(config, run.accelerator)
    if not labels_only:
        check_unlabeled(split.unlabeled, config.data.lists)
    run.set_length(STEPS_PER_EPOCH)
    run.check_settings(reader, split)
    labeled_images = make_labeled_images(reader, split.labeled, config)
    if not labels_only:
        unlabeled_images = make_unlabeled_images(reader, split.unlabeled, config, "unlabeled")

    network = TwoNetworks(config.model)
    wrapped, optimizer = run.prepare(network, make_optimizer(config, network, config.method.cps.lr))

    run.resume(model=network.first, extra={"second": network.second}, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(network.first, reader, split, run, protocol_of(config)))
        save_disagreement_panel((network.first, network.second), reader, split, config, run)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = None if labels_only else StepBatches(unlabeled_images, run)

    watched: dict[str, Any] = {}
    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power))
        for _ in run.accumulate(wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches)
                unlabeled: Batch | None = None if labels_only else next(unlabeled_batches)
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
            with record_function("student"):
                output = wrapped(labeled_image, normalize(unlabeled.image))
            with record_function("teacher"):
                both = [torch.cat([output[f"labeled{number}"], output[f"unlabeled{number}"]]) for number in (1, 2)]
                first, second = (upsample(logits, size, corners) for logits in both)
                first_label, second_label = pseudo_label(first), pseudo_label(second)
            with record_function("losses"):
                images = len(labeled.label)
                supervised1 = labeled_loss(first[:images], labeled.label, config)
                supervised2 = labeled_loss(second[:images], labeled.label, config)
                cps = cross_pseudo_loss(first, second, first_label, second_label)
                loss = supervised1 + supervised2 + weight * cps
                losses = {"loss": loss, "loss_supervised1": supervised1, "loss_supervised2": supervised2}
                losses["loss_cps"] = cps
                watched = {"disagreement": (first_label != second_label).float().mean()}
                run.monitor.count_pseudo_labels(second_label[len(labeled.label) :])
                run.monitor.count_predictions(output["labeled1"], labeled.label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            if run.step_optimizer(optimizer, losses):
                run.average_batch_norm(network)

        run.finish_step(
            losses | watched | {"lr": optimizer.param_groups[0]["lr"]},
            images=(1 if labels_only else 2) * optim.batch_size,
        )
        if run.evaluation_due:
            score()
        run.save()
    run.finish()


if __name__ == "__main__":
    main()
