"""Memory bank for semi-supervised domain adaptation, GTA5 to Cityscapes (Alonso et al., ICCV 2021).

    accelerate launch memory_bank/train_domain_adaptation.py --config memory_bank/configs/demo.json

As train.py on the target's images, of which a few are labeled; but the labels of every other step are those of a
source, another dataset with the same classes. The bank, the counts of classes and the contrastive loss of labeled
images are the target's alone. See memory_bank/README.md for every departure from the released code.
"""

from dataclasses import replace

from torch.profiler import record_function

from common.config import parse
from common.datasets import open_source_domain
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

WARM_UP = 1  # of the teacher's decay


def takes_target(step: int, total: int, last: int) -> bool:
    """Whether the labels of step number `step`, from 0, are the target's: every other one, and the `last` of all."""
    return step % 2 == 0 or step >= total - last


def target_steps(step: int, total: int, last: int) -> int:
    """How many of the first `step` steps take labels of the target."""
    alternating = max(0, total - last)
    return (min(step, alternating) + 1) // 2 + max(0, step - alternating)


@report_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, "memory_bank/train_domain_adaptation.py", argv)
    with Run(config, "memory_bank/train_domain_adaptation.py") as run:
        train(config, run)


def train(config: Config, run: Run) -> None:
    optim, method, adaptation = config.optim, config.method, config.method.adaptation
    ranges = replace(WEAK, mix_probability=adaptation.mix_probability)

    target, split = open_data(config, run.accelerator)
    with run.accelerator.main_process_first():  # the built-in data are made by one process
        source = open_source_domain(config.data, adaptation.source_dataset, adaptation.source_root)
    run.set_length(max(1, len(split.labeled) // optim.batch_size))
    target_images = images_of(target, split.labeled, "labeled", config, with_label=True)
    source_images = images_of(source, source.names("train"), "source", config, with_label=True)
    unlabeled_images = images_of(target, split.unlabeled, "unlabeled", config, with_label=False)
    share = unlabeled_share(config, run)

    parts = assemble(config, run, target, split)
    network, bank, balance = parts.network, parts.bank, parts.balance
    done = target_steps(run.step, run.total, adaptation.last_steps)
    target_batches = StepBatches(target_images, run, done=done)
    source_batches = StepBatches(source_images, run, done=run.step - done)
    unlabeled_batches = StepBatches(unlabeled_images, run, batch_size=share)

    for step in run.steps():
        set_lr(parts.optimizer, poly(step, run.total, optim.poly_power))
        use_contrast, fill_bank_now = step > method.contrast_start, step > method.bank_start
        is_target = takes_target(step, run.total, adaptation.last_steps)
        counted = target_steps(step, run.total, adaptation.last_steps)
        for part in run.accumulate(parts.wrapped):
            with record_function("data"):
                labeled: Batch = next(target_batches if is_target else source_batches)
                unlabeled: Batch = next(unlabeled_batches)
            with record_function("teacher"):
                guess = guess_labels(parts, unlabeled, config, run)
                if is_target:
                    balance.add_labeled(counted, labeled.label, part)
                    balance.add_unlabeled(counted, guess[0], part)
            with record_function("augmentation"):
                image, label = labeled_view(labeled, ranges, "weak view" if is_target else "source", config, run)
                strong, pseudo_label, confidence = unlabeled_views(unlabeled, guess, use_contrast, config, run)
            with record_function("student"):
                labels = ({"labeled": label} if is_target else {}) | {"unlabeled": pseudo_label}
                output = parts.wrapped({"unlabeled": strong, "labeled": image}, labels if use_contrast else None)
            if fill_bank_now and is_target:
                fill_bank(parts, image, label, config, run)
            with record_function("losses"):
                weight = class_weight(parts, counted + is_target, use_contrast, method)
                terms = labeled_terms(output, label, weight, bank, network)
                terms |= unlabeled_terms(output, pseudo_label, confidence, weight, bank, network, step, method)
                losses = with_total(terms, output, adaptation.contrast_weight, method)
            with record_function("backward"):
                run.backward(losses["loss"])
        learn(parts, losses, teacher_decay(step, run.total, method.alpha, WARM_UP), use_contrast, run)

        # Of a step on the source, its own loss has its own name.
        logged = losses if is_target else {name.replace("supervised", "source"): term for name, term in losses.items()}
        logged |= {"bank_filled": bank_filled(parts), "lr": parts.optimizer.param_groups[0]["lr"]}
        run.finish_step(logged, images=optim.batch_size + method.unlabeled_batch(optim.batch_size))
        take_stock(parts, config, run)
    finish(parts, unlabeled_batches, config, run)


if __name__ == "__main__":
    main()
