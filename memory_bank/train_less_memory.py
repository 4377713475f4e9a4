"""Memory bank in less memory: labeled and unlabeled images in steps of their own (Alonso et al., ICCV 2021).

    accelerate launch memory_bank/train_less_memory.py --config memory_bank/configs/demo.json

As train.py, but each step is two: forward, backward, optimizer and teacher for the labeled images, then the same for
the unlabeled ones, so that the features of only one of the two are held at a time. Rates and thresholds count both.
See memory_bank/README.md for what it saves and for every departure from the released code.
"""

from torch import Tensor
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
    Parts,
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

WARM_UP = 1  # of the teacher's decay


def labeled_pass(parts: Parts, batch: Batch, part: int, half: int, config: Config, run: Run) -> dict[str, Tensor]:
    """Forward and backward of labeled images.

    Args:
        batch: Of the labeled stream.
        part: Number of this backward pass within the half step, from 0.
        half: Number of this half step, from 0.

    Returns:
        The terms and `loss`.
    """
    method, step = config.method, half // 2
    use_contrast = half > method.contrast_start
    parts.balance.add_labeled(step, batch.label, part)
    with record_function("augmentation"):
        image, label = labeled_view(batch, WEAK, "weak view", config, run)
    with record_function("student"):
        output = parts.wrapped({"labeled": image}, {"labeled": label} if use_contrast else None)
    if half > method.bank_start:
        fill_bank(parts, image, label, config, run)
    with record_function("losses"):
        # This step's pseudo-labels are not counted yet.
        weight = class_weight(parts, step, use_contrast, method)
        terms = labeled_terms(output, label, weight, parts.bank, parts.network)
        losses = with_total(terms, output, method.contrast_weight, method)
    with record_function("backward"):
        run.backward(losses["loss"])
    return losses


def unlabeled_pass(parts: Parts, batch: Batch, part: int, half: int, config: Config, run: Run) -> dict[str, Tensor]:
    """Forward and backward of unlabeled images; arguments and result as `labeled_pass`."""
    method, step = config.method, half // 2
    use_contrast = half > method.contrast_start
    with record_function("teacher"):
        guess = guess_labels(parts, batch, config, run)
        parts.balance.add_unlabeled(step, guess[0], part)
    with record_function("augmentation"):
        image, pseudo_label, confidence = unlabeled_views(batch, guess, use_contrast, config, run)
    with record_function("student"):
        output = parts.wrapped({"unlabeled": image}, {"unlabeled": pseudo_label} if use_contrast else None)
    with record_function("losses"):
        # Here class weights do not wait for the contrastive loss, as released.
        weight = class_weight(parts, step + 1, True, method)
        terms = unlabeled_terms(output, pseudo_label, confidence, weight, parts.bank, parts.network, half, method)
        losses = with_total(terms, output, method.contrast_weight, method)
    with record_function("backward"):
        run.backward(losses["loss"])
    return losses


@report_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, "memory_bank/train_less_memory.py", argv)
    with Run(config, "memory_bank/train_less_memory.py") as run:
        train(config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method

    reader, split = open_data(config, run.accelerator)
    run.set_length(max(1, len(split.labeled) // optim.batch_size))
    labeled_images = images_of(reader, split.labeled, "labeled", config, with_label=True)
    unlabeled_images = images_of(reader, split.unlabeled, "unlabeled", config, with_label=False)
    share = unlabeled_share(config, run)

    parts = assemble(config, run, reader, split)
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = StepBatches(unlabeled_images, run, batch_size=share)

    for step in run.steps():
        with record_function("data"):  # all of the step's: a file that cannot be read leaves no half of it done
            labeled: list[Batch] = [next(labeled_batches) for _ in range(optim.accumulation)]
            unlabeled: list[Batch] = [next(unlabeled_batches) for _ in range(optim.accumulation)]
        logged = {}
        for half, batches, go in ((2 * step, labeled, labeled_pass), (2 * step + 1, unlabeled, unlabeled_pass)):
            set_lr(parts.optimizer, poly(half, 2 * run.total, optim.poly_power))
            for part in run.accumulate(parts.wrapped):
                losses = go(parts, batches[part], part, half, config, run)
            decay = teacher_decay(half, 2 * run.total, method.alpha, WARM_UP)
            learn(parts, losses, decay, half > method.contrast_start, run)
            logged |= losses | {"loss": logged.get("loss", 0.0) + losses["loss"]}

        logged |= {"bank_filled": bank_filled(parts), "lr": parts.optimizer.param_groups[0]["lr"]}
        run.finish_step(logged, images=optim.batch_size + method.unlabeled_batch(optim.batch_size))
        take_stock(parts, config, run)
    finish(parts, unlabeled_batches, config, run)


if __name__ == "__main__":
    main()
