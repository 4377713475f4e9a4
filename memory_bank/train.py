"""Memory bank: Semi-Supervised Semantic Segmentation with Pixel-Level Contrastive Learning from a Class-wise Memory
Bank (Alonso et al., ICCV 2021).

    accelerate launch memory_bank/train.py --config memory_bank/configs/demo.json     # built-in data, minutes on a CPU

A mean teacher labels images, of which the student learns two strong views. Features of labeled pixels that the teacher
gets right enter a bank of each class; the student's features of a class, weighed by a small network, are drawn to those
in the bank. See memory_bank/README.md for every departure from the released code.
"""

from torch import Tensor
from torch.profiler import record_function

from common.augment import normalize
from common.config import parse
from common.datasets.loaders import Batch, StepBatches, TrainingImages, open_data
from common.ema import make_teacher, update_teacher
from common.errors import told
from common.evaluation import evaluate_run, save_panel
from common.losses import upsample
from common.optim import build_optimizer
from common.run import Run
from common.schedules import poly, set_lr
from memory_bank.bank import Bank
from memory_bank.losses import (
    contrastive_loss,
    entropy_loss,
    pseudo_label_loss,
    ramp,
    supervised_loss,
    teacher_decay,
)
from memory_bank.setting import (
    Config,
    MemoryBankNetwork,
    class_balance,
    crop_of,
    draw_view,
    labeler,
    most_rows,
    protocol_of,
    pseudo_labels,
    rows_for_bank,
    strong_views,
    unlabeled_share,
)
from memory_bank.views import WEAK


def terms_of(
    output: dict[str, dict[str, Tensor]],
    label: Tensor,
    pseudo_label: Tensor,
    confidence: Tensor,
    class_weight: Tensor,
    bank: Bank,
    network: MemoryBankNetwork,
    step: int,
    config: Config,
) -> dict[str, Tensor]:
    """The terms of a step by name, and `loss`, their weighted sum.

    Args:
        output: What the network returned for `labeled` and `unlabeled` images.
        label: int64 [B,H,W].
        pseudo_label: int64 [2B',H,W], of both views.
        confidence: [2B',H,W], probabilities of the pseudo-labels.
        class_weight: [C].
        bank: With this step's rows.
        network: For its selectors.
        step: From 0.
    """
    method, size, corners = config.method, label.shape[-2:], network.segmenter.align_corners
    logits = {name: upsample(values, size, corners) for name, values in output["logits"].items()}
    power, weight = method.confidence_power, ramp(step, method.ramp_steps)
    pseudo = pseudo_label_loss(logits["unlabeled"], pseudo_label, confidence, class_weight, power)
    terms = {
        "loss_supervised": supervised_loss(logits["labeled"], label, class_weight),
        "loss_pseudo": weight * pseudo,
        "entropy": entropy_loss(logits["unlabeled"], pseudo_label, method.entropy_broadcast),
    }
    loss = terms["loss_supervised"] + terms["loss_pseudo"] + method.entropy_weight * terms["entropy"]
    if "rows" not in output:
        return terms | {"loss": loss + output["idle"]["heads"]}
    # The selectors are called outside the wrapped forward; processes exchange their gradients all the same, as these
    # are part of the one backward pass that follows it.
    for name, rows in output["rows"].items():
        terms[f"contrast_{name}"] = contrastive_loss(rows, output["classes"][name], bank, network.heads.selectors)
        loss = loss + method.contrast_weight * terms[f"contrast_{name}"]
    return terms | {"loss": loss}


@told
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, "memory_bank/train.py", argv)
    with Run(config, "memory_bank/train.py") as run:
        train(config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method

    source, split = open_data(config, run.accelerator)
    run.set_length(max(1, len(split.labeled) // optim.batch_size))
    crop = crop_of(config)
    labeled_images = TrainingImages(source, split.labeled, crop, config.run.seed, "labeled", with_label=True)
    unlabeled_images = TrainingImages(source, split.unlabeled, crop, config.run.seed, "unlabeled", with_label=False)

    network = MemoryBankNetwork(config.model, method.embedding_dim)
    teacher = run.place(make_teacher(network))
    bank = Bank(config.model.num_classes, method.bank_size, method.embedding_dim).to(run.device)
    balance = class_balance(config, split).to(run.device)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, [{"params": learning}]))

    pair = {"student": network, "teacher": teacher}
    evaluated = pair.pop("teacher" if method.save_teacher_test else "student")
    extra = {name: other.segmenter for name, other in pair.items()}
    extra |= {"student_heads": network.heads, "teacher_heads": teacher.heads, "bank": bank, "balance": balance}
    run.resume(model=evaluated.segmenter, extra=extra, optimizer=optimizer)
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = StepBatches(unlabeled_images, run, batch_size=unlabeled_share(config, run))

    def score() -> None:
        protocol = protocol_of(config)
        run.report(evaluate_run(evaluated.segmenter, source, split, run, protocol))
        save_panel(evaluated.segmenter, source, split, run, protocol=protocol)

    if run.evaluates:  # what a stop had cut short
        score()
        run.save()

    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power))
        contrasts, fills = step > method.contrast_start, step > method.bank_start
        for _ in run.passes(wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches)
                unlabeled: Batch = next(unlabeled_batches)
            with record_function("teacher"), labeler(network, teacher, config) as source_of_labels:
                size = unlabeled.image.shape[-2:]
                guess, guess_confidence = pseudo_labels(
                    source_of_labels, normalize(unlabeled.image), size, run.autocast
                )
                balance.add_labeled(step, labeled.label)
                balance.add_unlabeled(step, guess)
            with record_function("augmentation"):
                image, label, _ = draw_view(
                    labeled.image, labeled.label, None, labeled.positions, "weak view", WEAK, config, run
                )
                image = normalize(image)
                strong, pseudo_label, confidence = strong_views(
                    unlabeled.image / 255, guess, guess_confidence, unlabeled.positions, contrasts, config, run
                )
            with record_function("student"):
                labels = {"labeled": label, "unlabeled": pseudo_label} if contrasts else None
                output = wrapped({"unlabeled": normalize(strong), "labeled": image}, labels)
            with record_function("bank"):
                if fills:
                    with labeler(network, teacher, config) as source_of_rows:
                        offered = rows_for_bank(source_of_rows, image, label, method.bank_threshold, run.autocast)
                    most = most_rows(config, split)
                    bank.update(*offered, teacher.heads.selectors, most, method.bank_ranking == "lowest")
            with record_function("losses"):
                weights = balance.weights(step + 1) if method.class_balance and contrasts else balance.ones()
                losses = terms_of(output, label, pseudo_label, confidence, weights, bank, network, step, config)
            with record_function("backward"):
                run.backward(losses["loss"])
        with record_function("optimizer"):
            if not contrasts:
                for parameter in network.heads.parameters():
                    parameter.grad = None  # no weight decay before they learn
            stepped = run.step_optimizer(optimizer, losses)
        with record_function("teacher update"):
            if stepped:
                update_teacher(teacher, network, teacher_decay(step, run.total, method.alpha))
                run.share_statistics(network, teacher)

        filled = bank.filled.float().mean() / method.bank_size
        logged = losses | {"bank_filled": filled, "lr": optimizer.param_groups[0]["lr"]}
        run.finish_step(logged, images=optim.batch_size + method.unlabeled_batch(optim.batch_size))
        if run.evaluates:
            score()
        run.save()
    run.finish()


if __name__ == "__main__":
    main()
