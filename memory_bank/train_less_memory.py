"""Memory bank in less memory: separate optimizer steps for labeled and unlabeled images (Alonso et al., ICCV 2021).

    accelerate launch memory_bank/train_less_memory.py --config memory_bank/configs/demo.json

As train.py, but each step has two halves: forward, backward, optimizer step and teacher update for the labeled images,
then the same for the unlabeled ones, so that only one of the two keeps its features for backward at a time. Rates and
thresholds count both halves. See memory_bank/README.md for the memory saved and every departure from the released code.
"""

from torch import Tensor, nn
from torch.profiler import record_function

from common.config.lengths import decay_of, in_steps
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
    TrainState,
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


def labeled_pass(
    state: TrainState, wrapped: nn.Module, labeled: Batch, part: int, half: int, max_new: int, config: Config, run: Run
) -> dict[str, Tensor]:
    """Forward and backward pass of labeled images.

    Args:
        state: Student, teacher, bank and class counts.
        wrapped: The student as `prepare` returned it.
        labeled: A labeled batch.
        part: Number of this backward pass within the half step, from 0.
        half: Number of this half step, from 0.
        max_new: Embeddings that may enter the bank per class and update.

    Returns:
        The losses by name, 0-d; `loss` is their weighted sum.
    """
    network, teacher, bank, balance, method = state.network, state.teacher, state.bank, state.balance, config.method
    contrast_start, bank_start = (
        in_steps(start, 2 * run.total) for start in (method.contrast_start, method.bank_start)
    )
    use_contrast = not method.labels_only and half > contrast_start
    fill_bank = not method.labels_only and half > bank_start
    balance.add_labeled(half // 2, labeled.label, part)
    with record_function("augmentation"):
        labeled_image, label = augment_labeled(labeled, WEAK, "weak view", config, run)
    with record_function("student"):
        images = {"labeled": normalize(labeled_image)}
        output = wrapped(images, {"labeled": label} if use_contrast else None)
    if fill_bank:
        with record_function("bank"), labeling_network(network, teacher, config) as labeling:
            threshold, lowest = method.bank_threshold, method.bank_ranking == "lowest"
            candidates = bank_candidates(labeling, images["labeled"], label, threshold, run.autocast)
            bank.update(*candidates, teacher.heads.selectors, max_new, lowest)
    with record_function("losses"):
        size, corners = label.shape[-2:], network.segmenter.align_corners
        # The pseudo-labels of this step are not counted yet.
        class_weight = balance.weights(half // 2) if method.class_balance and use_contrast else balance.ones()
        logits = upsample(output["labeled"], size, corners)
        supervised = supervised_loss(logits, label, class_weight)
        supervised = supervised + added_loss(logits, label, config.optim.supervised_loss)
        run.monitor.count_predictions(output["labeled"], label)
        contrast_labeled = contrastive_term("labeled", output, bank, network)
        loss = supervised + method.contrast_weight * contrast_labeled
    with record_function("backward"):
        run.backward(loss)
    losses = {"loss": loss, "loss_supervised": supervised}
    return losses | ({"contrast_labeled": contrast_labeled} if use_contrast else {})


def unlabeled_pass(
    state: TrainState, wrapped: nn.Module, unlabeled: Batch, part: int, half: int, config: Config, run: Run
) -> dict[str, Tensor]:
    """Forward and backward pass of unlabeled images; arguments and result as in `labeled_pass`."""
    network, teacher, bank, balance, method = state.network, state.teacher, state.bank, state.balance, config.method
    use_contrast = half > in_steps(method.contrast_start, 2 * run.total)
    with record_function("teacher"), labeling_network(network, teacher, config) as labeling:
        weak_image = unlabeled.image.float() / 255
        weak_label, weak_confidence = pseudo_labels(labeling, weak_image, run)
        balance.add_unlabeled(half // 2, weak_label, part)
    with record_function("augmentation"):
        image, pseudo_label, confidence = augment_unlabeled(
            (weak_image, weak_label, weak_confidence), unlabeled.positions, use_contrast, config, run
        )
    with record_function("student"):
        output = wrapped({"unlabeled": normalize(image)}, {"unlabeled": pseudo_label} if use_contrast else None)
    with record_function("losses"):
        # Here class weights do not wait for the contrastive loss, as released.
        class_weight = balance.weights(half // 2 + 1) if method.class_balance else balance.ones()
        unlabeled_logits = upsample(output["unlabeled"], pseudo_label.shape[-2:], network.segmenter.align_corners)
        power, rampup = method.confidence_power, ramp(half, in_steps(method.ramp_steps, 2 * run.total))
        pseudo = rampup * pseudo_label_loss(unlabeled_logits, pseudo_label, confidence, class_weight, power)
        entropy = entropy_loss(unlabeled_logits, pseudo_label, method.entropy_broadcast)
        contrast_unlabeled = contrastive_term("unlabeled", output, bank, network)
        run.monitor.count_pseudo_labels(pseudo_label)  # they count by a power of their confidence, without a threshold
        loss = pseudo + method.entropy_weight * entropy + method.contrast_weight * contrast_unlabeled
    with record_function("backward"):
        run.backward(loss)
    losses = {"loss": loss, "loss_pseudo": pseudo, "entropy": entropy}
    return losses | ({"contrast_unlabeled": contrast_unlabeled} if use_contrast else {})


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "memory_bank/train_less_memory.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method

    reader, split = open_data(config, run.accelerator)
    run.set_length(steps_per_epoch(len(split.labeled), optim.batch_size))
    run.check_settings(reader, split, facts_of(config, split, run.total, updates_per_step=2))
    cropped = crop_of(config)
    labeled_images = TrainingImages(reader, split.labeled, cropped, config.run.seed, "labeled", with_label=True)
    if not method.labels_only:
        unlabeled_images = TrainingImages(
            reader, split.unlabeled, cropped, config.run.seed, "unlabeled", with_label=False
        )
    share, max_new = unlabeled_share(config, run), max_new_per_class(config, split)

    decay = decay_of(method.alpha, 2 * run.total)
    network = MemoryBankNetwork(config.model, method.embedding_dim, freezes_norms(config, run))
    teacher = run.to_device(make_teacher(network))
    state = build(network, teacher, split, config, run)
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network))

    run.resume(model=state.evaluated, extra=state.extra, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(state.evaluated, reader, split, run, protocol_of(config)))
        save_panel(state.evaluated, reader, split, run, protocol=protocol_of(config))
        state.restart.schedule(run, method.patience)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    if state.restart.due:
        restart_from_best(state, config, run)
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = None if method.labels_only else StepBatches(unlabeled_images, run, batch_size=share)

    for step in run.steps():
        with record_function("data"):  # of both halves: an unreadable file then leaves no half step done
            labeled: list[Batch] = [next(labeled_batches) for _ in range(optim.accumulation)]
            passes = 0 if method.labels_only else optim.accumulation
            unlabeled: list[Batch] = [next(unlabeled_batches) for _ in range(passes)]
        logged = {"loss": 0.0}
        for half in (2 * step,) if method.labels_only else (2 * step, 2 * step + 1):
            set_lr(optimizer, poly(half, 2 * run.total, optim.poly_power))
            for part in run.accumulate(wrapped):
                if half % 2 == 0:
                    losses = labeled_pass(state, wrapped, labeled[part], part, half, max_new, config, run)
                else:
                    losses = unlabeled_pass(state, wrapped, unlabeled[part], part, half, config, run)
            with record_function("optimizer"):
                if method.labels_only or half <= in_steps(method.contrast_start, 2 * run.total):
                    network.heads.zero_grad()  # no weight decay before the heads learn
                stepped = run.step_optimizer(optimizer, losses)
            with record_function("teacher update"):
                if stepped:
                    update_teacher(
                        teacher,
                        network,
                        teacher_decay(half, 2 * run.total, decay, WARM_UP),
                    )
                    run.average_batch_norm(network, teacher)
            logged |= losses | {"loss": logged["loss"] + losses["loss"]}

        run.finish_step(
            logged
            | {
                "bank_filled": state.bank.filled.float().mean() / method.bank_size,
                "lr": optimizer.param_groups[0]["lr"],
            },
            images=optim.batch_size + (0 if method.labels_only else method.unlabeled_batch(optim.batch_size)),
        )
        if is_evaluated := run.evaluation_due:
            score()
        run.save()
        if is_evaluated and state.restart.due:
            restart_from_best(state, config, run)
    refresh_batch_norm(state, reader, split, unlabeled_batches, config, run)
    run.finish(REFRESHED)


if __name__ == "__main__":
    main()
