"""Memory bank: Semi-Supervised Semantic Segmentation with Pixel-Level Contrastive Learning from a Class-wise Memory
Bank (Alonso et al., ICCV 2021).

    accelerate launch memory_bank/train.py --config memory_bank/configs/demo.json     # built-in data, minutes on a CPU

A mean teacher labels images, of which the student learns two strong views. Features of labeled pixels that the teacher
gets right enter a bank of each class; the student's features of a class, weighed by a small network, are drawn to those
in the bank. See memory_bank/README.md for every departure from the released code.
"""

from torch.profiler import record_function

from common.config import parse
from common.engine.run import Run
from common.errors import report_errors
from common.loaders import Batch, StepBatches, open_data
from common.optim import poly, set_lr
from memory_bank.augment import WEAK
from memory_bank.config import Config
from memory_bank.losses import teacher_decay
from memory_bank.training import (
    assemble,
    bank_filled,
    class_weight,
    fill_bank,
    finish,
    guess_labels,
    images_of,
    labeled_terms,
    labeled_view,
    learn,
    take_stock,
    unlabeled_share,
    unlabeled_terms,
    unlabeled_views,
    with_total,
)


@report_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, "memory_bank/train.py", argv)
    with Run(config, "memory_bank/train.py") as run:
        train(config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method

    reader, split = open_data(config, run.accelerator)
    run.set_length(max(1, len(split.labeled) // optim.batch_size))
    labeled_images = images_of(reader, split.labeled, "labeled", config, with_label=True)
    unlabeled_images = images_of(reader, split.unlabeled, "unlabeled", config, with_label=False)
    share = unlabeled_share(config, run)

    parts = assemble(config, run, reader, split)
    network, bank, balance = parts.network, parts.bank, parts.balance
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = StepBatches(unlabeled_images, run, batch_size=share)

    for step in run.steps():
        set_lr(parts.optimizer, poly(step, run.total, optim.poly_power))
        use_contrast, fill_bank_now = step > method.contrast_start, step > method.bank_start
        for part in run.accumulate(parts.wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches)
                unlabeled: Batch = next(unlabeled_batches)
            with record_function("teacher"):
                guess = guess_labels(parts, unlabeled, config, run)
                balance.add_labeled(step, labeled.label, part)
                balance.add_unlabeled(step, guess[0], part)
            with record_function("augmentation"):
                image, label = labeled_view(labeled, WEAK, "weak view", config, run)
                strong, pseudo_label, confidence = unlabeled_views(unlabeled, guess, use_contrast, config, run)
            with record_function("student"):
                labels = {"labeled": label, "unlabeled": pseudo_label} if use_contrast else None
                output = parts.wrapped({"unlabeled": strong, "labeled": image}, labels)
            if fill_bank_now:
                fill_bank(parts, image, label, config, run)
            with record_function("losses"):
                weight = class_weight(parts, step + 1, use_contrast, method)
                terms = labeled_terms(output, label, weight, bank, network)
                terms |= unlabeled_terms(output, pseudo_label, confidence, weight, bank, network, step, method)
                losses = with_total(terms, output, method.contrast_weight, method)
            with record_function("backward"):
                run.backward(losses["loss"])
        learn(parts, losses, teacher_decay(step, run.total, method.alpha), use_contrast, run)

        logged = losses | {"bank_filled": bank_filled(parts), "lr": parts.optimizer.param_groups[0]["lr"]}
        run.finish_step(logged, images=optim.batch_size + method.unlabeled_batch(optim.batch_size))
        take_stock(parts, config, run)
    finish(parts, unlabeled_batches, config, run)


if __name__ == "__main__":
    main()
