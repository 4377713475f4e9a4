"""Memory bank for semi-supervised domain adaptation, GTA5 to Cityscapes (Alonso et al., ICCV 2021).

    accelerate launch memory_bank/train_domain_adaptation.py --config memory_bank/configs/demo.json

As train.py, on a target domain with few labeled images; but every other step takes its labeled images from a source
domain, another dataset with the same classes. Bank, class counts and the contrastive loss of labeled images use the
target domain alone. See memory_bank/README.md for every departure from the released code.
"""

from dataclasses import replace

from torch.profiler import record_function

from common.config.lengths import decay_of, in_steps
from common.datasets import open_source_domain
from common.engine.run import Run
from common.engine.start import start
from common.errors import report_errors
from common.evaluation.evaluate import evaluate_run, save_panel
from common.images import normalize
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import added_loss, upsample
from common.mean_teacher import make_teacher, update_teacher
from common.optim import build_optimizer, poly, set_lr
from memory_bank.augment import WEAK, augment_labeled, augment_unlabeled, crop_of
from memory_bank.config import Config, protocol_of
from memory_bank.losses import entropy_loss, pseudo_label_loss, ramp, supervised_loss, teacher_decay
from memory_bank.network import MemoryBankNetwork, bank_candidates, labeling_network, pseudo_labels
from memory_bank.released import translate
from memory_bank.training import (
    REFRESHED,
    build,
    contrastive_term,
    facts_of,
    freezes_norms,
    max_new_per_class,
    refresh_batch_norm,
    restart_from_best,
    steps_per_epoch,
    unlabeled_share,
)

WARM_UP = 1  # of the teacher's decay


def takes_target(step: int, total: int, last: int) -> bool:
    """True if step number `step`, from 0, takes labels of the target: every other step, and the `last` steps."""
    return step % 2 == 0 or step >= total - last


def target_steps(step: int, total: int, last: int) -> int:
    """Count those of the first `step` steps that take labels of the target."""
    alternating = max(0, total - last)
    return (min(step, alternating) + 1) // 2 + max(0, step - alternating)


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "memory_bank/train_domain_adaptation.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, method, adaptation = config.optim, config.method, config.method.adaptation
    ranges = replace(WEAK, mix_probability=adaptation.mix_probability)

    reader, split = open_data(config, run.accelerator)
    with run.accelerator.main_process_first():  # one process draws the built-in data
        source = open_source_domain(config.data, adaptation.source_dataset, adaptation.source_root)
    run.set_length(steps_per_epoch(len(split.labeled), optim.batch_size))
    source_names = source.names("train")
    run.check_settings(reader, split, facts_of(config, split, run.total, source=(source, source_names)))
    cropped = crop_of(config)
    labeled_images = TrainingImages(reader, split.labeled, cropped, config.run.seed, "labeled", with_label=True)
    source_images = TrainingImages(source, source_names, cropped, config.run.seed, "source", with_label=True)
    if not method.labels_only:
        unlabeled_images = TrainingImages(
            reader, split.unlabeled, cropped, config.run.seed, "unlabeled", with_label=False
        )
    share, max_new = unlabeled_share(config, run), max_new_per_class(config, split)

    network = MemoryBankNetwork(config.model, method.embedding_dim, freezes_norms(config, run))
    teacher = run.to_device(make_teacher(network))
    state = build(network, teacher, split, config, run)
    bank, balance, restart = state.bank, state.balance, state.restart
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network))

    run.resume(model=state.evaluated, extra=state.extra, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(state.evaluated, reader, split, run, protocol_of(config)))
        save_panel(state.evaluated, reader, split, run, protocol=protocol_of(config))
        restart.schedule(run, method.patience)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    if restart.due:
        restart_from_best(state, config, run)
    last_steps = run.total if method.labels_only else in_steps(adaptation.last_steps, run.total)
    done = target_steps(run.step, run.total, last_steps)
    labeled_batches = StepBatches(labeled_images, run, done=done)
    source_batches = StepBatches(source_images, run, done=run.step - done)
    unlabeled_batches = None if method.labels_only else StepBatches(unlabeled_images, run, batch_size=share)
    decay = decay_of(method.alpha, run.total)
    contrast_start, bank_start, ramp_steps = (
        in_steps(value, run.total) for value in (method.contrast_start, method.bank_start, method.ramp_steps)
    )

    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power))
        use_contrast, fill_bank = step > contrast_start, step > bank_start
        weight = adaptation.contrast_weight
        is_target = takes_target(step, run.total, last_steps)
        counted = target_steps(step, run.total, last_steps)
        for part in run.accumulate(wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches if is_target else source_batches)
                unlabeled: Batch | None = None if method.labels_only else next(unlabeled_batches)
            if method.labels_only:
                with record_function("augmentation"):
                    labeled_image, label = augment_labeled(labeled, ranges, "weak view", config, run)
                with record_function("student"):
                    output = wrapped({"labeled": normalize(labeled_image)}, None)
                with record_function("losses"):
                    logits = upsample(output["labeled"], label.shape[-2:], network.segmenter.align_corners)
                    loss = supervised_loss(logits, label, balance.ones()) + output["idle"]
                    losses = {"loss": loss + added_loss(logits, label, optim.supervised_loss)}
                    run.monitor.count_predictions(output["labeled"], label)
                with record_function("backward"):
                    run.backward(losses["loss"])
                continue
            with record_function("teacher"), labeling_network(network, teacher, config) as labeling:
                weak_image = unlabeled.image.float() / 255
                weak_label, weak_confidence = pseudo_labels(labeling, weak_image, run)
                if is_target:
                    balance.add_labeled(counted, labeled.label, part)
                    balance.add_unlabeled(counted, weak_label, part)
            with record_function("augmentation"):
                view = "weak view" if is_target else "source"
                labeled_image, label = augment_labeled(labeled, ranges, view, config, run)
                image, pseudo_label, confidence = augment_unlabeled(
                    (weak_image, weak_label, weak_confidence), unlabeled.positions, use_contrast, config, run
                )
            with record_function("student"):
                # As released, unlabeled images pass the network first, labeled embeddings the heads first.
                images = {"unlabeled": normalize(image), "labeled": normalize(labeled_image)}
                labels = ({"labeled": label} if is_target else {}) | {"unlabeled": pseudo_label}
                output = wrapped(images, labels if use_contrast else None)
            if fill_bank and is_target:
                # Before the losses, which read the bank; a skipped step restores it.
                with record_function("bank"), labeling_network(network, teacher, config) as labeling:
                    threshold, lowest = method.bank_threshold, method.bank_ranking == "lowest"
                    candidates = bank_candidates(labeling, images["labeled"], label, threshold, run.autocast)
                    bank.update(*candidates, teacher.heads.selectors, max_new, lowest)
            with record_function("losses"):
                size, corners = label.shape[-2:], network.segmenter.align_corners
                class_weight = (
                    balance.weights(counted + is_target) if method.class_balance and use_contrast else balance.ones()
                )
                labeled_logits = upsample(output["labeled"], size, corners)
                supervised = supervised_loss(labeled_logits, label, class_weight)
                supervised = supervised + added_loss(labeled_logits, label, optim.supervised_loss)
                contrast_labeled = contrastive_term("labeled", output, bank, network)
                unlabeled_logits = upsample(output["unlabeled"], size, corners)
                power, rampup = method.confidence_power, ramp(step, ramp_steps)
                pseudo = rampup * pseudo_label_loss(unlabeled_logits, pseudo_label, confidence, class_weight, power)
                entropy = entropy_loss(unlabeled_logits, pseudo_label, method.entropy_broadcast)
                contrast_unlabeled = contrastive_term("unlabeled", output, bank, network)
                loss = supervised + weight * contrast_labeled + pseudo + method.entropy_weight * entropy
                loss = loss + weight * contrast_unlabeled
                name = "loss_supervised" if is_target else "loss_source"
                losses = {"loss": loss, name: supervised, "loss_pseudo": pseudo, "entropy": entropy}
                if use_contrast:
                    losses |= {"contrast_labeled": contrast_labeled} if is_target else {}
                    losses |= {"contrast_unlabeled": contrast_unlabeled}
                # Pseudo-labels count by a power of their confidence, without a threshold.
                run.monitor.count_pseudo_labels(pseudo_label)
                run.monitor.count_predictions(output["labeled"], label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            if method.labels_only or not use_contrast:
                network.heads.zero_grad()  # without gradients the optimizer passes them over: no weight decay yet
            stepped = run.step_optimizer(optimizer, losses)
        with record_function("teacher update"):
            if stepped:
                update_teacher(teacher, network, teacher_decay(step, run.total, decay, WARM_UP))
                run.average_batch_norm(network, teacher)

        run.finish_step(
            losses
            | {"bank_filled": bank.filled.float().mean() / method.bank_size, "lr": optimizer.param_groups[0]["lr"]},
            images=optim.batch_size + (0 if method.labels_only else method.unlabeled_batch(optim.batch_size)),
        )
        if is_evaluated := run.evaluation_due:  # `score` clears it
            score()
        run.save()
        if is_evaluated and restart.due:
            restart_from_best(state, config, run)
    refresh_batch_norm(state, reader, split, unlabeled_batches, config, run)
    run.finish(REFRESHED)


if __name__ == "__main__":
    main()
