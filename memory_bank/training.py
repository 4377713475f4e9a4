"""What the three training scripts train with, and the pieces of a step that are the same in all of them."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from common.datasets.reader import Reader
from common.engine.run import Run
from common.errors import UserError
from common.evaluation.evaluate import evaluate_run, save_panel
from common.images import normalize
from common.loaders import Batch, StepBatches, TrainingImages
from common.losses import upsample
from common.mean_teacher import make_teacher, update_teacher
from common.optim import build_optimizer
from common.splits.split import Split
from memory_bank.augment import Maps, Ranges, crop_of, draw_view, strong_views
from memory_bank.bank import Bank
from memory_bank.config import Config, Method, protocol_of
from memory_bank.losses import (
    ClassBalance,
    contrastive_loss,
    embeddings_per_image,
    entropy_loss,
    pseudo_label_loss,
    ramp,
    supervised_loss,
)
from memory_bank.network import MemoryBankNetwork, labeler, pseudo_labels, rows_for_bank

Output = dict[str, dict[str, Tensor]]
REFRESHED = "refreshed"


class Restart(nn.Module):
    """Whether student and teacher are to start again from the best, and after which step they last did."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("due", torch.tensor(False))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))


@dataclass
class Parts:
    """All that lasts longer than a step.

    Attributes:
        reader: Reader of the data.
        split: Their lists.
        network: The student.
        wrapped: The student as it is trained.
        teacher: Its average.
        evaluated: The segmenter of student or teacher.
        bank: The same on every process.
        balance: Counts of classes.
        restart: See there.
        optimizer: What `prepare` returned.
    """

    reader: Reader
    split: Split
    network: MemoryBankNetwork
    wrapped: nn.Module
    teacher: MemoryBankNetwork
    evaluated: nn.Module
    bank: Bank
    balance: ClassBalance
    restart: Restart
    optimizer: Any


# ---- before and after the steps


def assemble(config: Config, run: Run, reader: Reader, split: Split) -> Parts:
    """Everything, as the newest checkpoint has it; what a stop had cut short after that is made up for."""
    method = config.method
    network = MemoryBankNetwork(config.model, method.embedding_dim)
    teacher = run.to_device(make_teacher(network))
    bank = Bank(config.model.num_classes, method.bank_size, method.embedding_dim).to(run.device)
    balance, restart = class_balance(config, split).to(run.device), Restart().to(run.device)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    wrapped, optimizer = run.prepare(network, build_optimizer(config.optim, [{"params": learning}]))

    pair = {"student": network, "teacher": teacher}
    evaluated = pair.pop("teacher" if method.save_teacher_test else "student").segmenter
    extra = {name: other.segmenter for name, other in pair.items()}
    extra |= {"student_heads": network.heads, "teacher_heads": teacher.heads}
    extra |= {"bank": bank, "balance": balance, "restart": restart}
    run.resume(model=evaluated, extra=extra, optimizer=optimizer)
    parts = Parts(reader, split, network, wrapped, teacher, evaluated, bank, balance, restart, optimizer)
    if run.evaluation_due:
        take_stock(parts, config, run)
    elif restart.due:
        start_again(parts, config, run)
    return parts


def images_of(reader: Reader, names: list[str], stream: str, config: Config, with_label: bool) -> TrainingImages:
    """A stream of crops."""
    return TrainingImages(reader, names, crop_of(config), config.run.seed, stream, with_label=with_label)


def take_stock(parts: Parts, config: Config, run: Run) -> None:
    """Evaluate and save where that is due; start again from the best where it has been the best for too long."""
    evaluates, protocol = run.evaluation_due, protocol_of(config)
    if evaluates:
        run.log_scores(evaluate_run(parts.evaluated, parts.reader, parts.split, run, protocol))
        save_panel(parts.evaluated, parts.reader, parts.split, run, protocol=protocol)
        waited = run.step - max(run.best_step, int(parts.restart.step))
        too_long = waited > config.method.patience * run.total and run.step < run.total
        parts.restart.due.fill_(too_long and not run.evaluation_due)  # not where a signal cut the evaluation short
    run.save()
    if evaluates and parts.restart.due:
        start_again(parts, config, run)


def start_again(parts: Parts, config: Config, run: Run) -> None:
    """Student and teacher become the best student; optimizer, bank and tables go on, as released."""
    best = run.read_best()
    if best is None:
        run.log.print("warning: the best checkpoint cannot be read; going on without it")
        return
    student = best.extra["student"] if config.method.save_teacher_test else best.model
    parts.network.segmenter.load_state_dict(student)
    parts.network.heads.load_state_dict(best.extra["student_heads"])
    parts.teacher.load_state_dict(parts.network.state_dict())
    parts.restart.due.fill_(False)
    parts.restart.step.fill_(run.step)
    run.log.print(f"step {run.step}: no better evaluation since step {run.best_step}; starting again from that one")


def finish(parts: Parts, unlabeled_batches: StepBatches, config: Config, run: Run) -> None:
    """Batch-norm statistics of the best network taken anew from unlabeled crops, without augmentation; it is kept as
    the best where it scores higher."""
    best = run.read_best() if config.method.refresh_batches and not run.has_variant(REFRESHED) else None
    if best is not None:
        network = deepcopy(parts.evaluated)
        network.load_state_dict(best.model)
        network.train()
        for _ in range(min(config.method.refresh_batches, run.total)):
            run.stop_if_signalled()
            image = next(unlabeled_batches).image
            with torch.no_grad(), run.autocast():
                network(normalize(image))
        run.share_statistics(network)
        scores = evaluate_run(network, parts.reader, parts.split, run, protocol_of(config))
        run.stop_if_signalled()
        run.save_variant(REFRESHED, network, scores)
    run.finish(REFRESHED)


# ---- within a step


def guess_labels(parts: Parts, unlabeled: Batch, config: Config, run: Run) -> tuple[Tensor, Tensor]:
    """Pseudo-labels int64 [B,H,W] of unlabeled images, and their probabilities [B,H,W]."""
    with labeler(parts.network, parts.teacher, config) as network:
        return pseudo_labels(network, normalize(unlabeled.image), unlabeled.image.shape[-2:], run.autocast)


def labeled_view(batch: Batch, ranges: Ranges, stream: str, config: Config, run: Run) -> tuple[Tensor, Tensor]:
    """The weak view of labeled images: normalized [B,3,H,W] and int64 [B,H,W].

    Args:
        ranges: What it is drawn from.
        stream: Name of the view.
    """
    image, label, _ = draw_view(batch.image, batch.label, None, batch.positions, stream, ranges, config, run)
    return normalize(image), label


def unlabeled_views(batch: Batch, guess: tuple[Tensor, Tensor], mixes: bool, config: Config, run: Run) -> Maps:
    """Both strong views of unlabeled images, normalized, with their pseudo-labels and probabilities: [2B,...]."""
    image, pseudo_label, confidence = strong_views(batch.image / 255, *guess, batch.positions, mixes, config, run)
    return normalize(image), pseudo_label, confidence


def fill_bank(parts: Parts, image: Tensor, label: Tensor, config: Config, run: Run) -> None:
    """Let what the teacher gets right in labeled views enter the bank."""
    method = config.method
    with record_function("bank"), labeler(parts.network, parts.teacher, config) as network:
        offered = rows_for_bank(network, image, label, method.bank_threshold, run.autocast)
        lowest = method.bank_ranking == "lowest"
        parts.bank.update(*offered, parts.teacher.heads.selectors, most_rows(config, parts.split), lowest)


def class_weight(parts: Parts, steps: int, begun: bool, method: Method) -> Tensor:
    """[C], after so many counted steps; ones before it has `begun`."""
    return parts.balance.weights(steps) if method.class_balance and begun else parts.balance.ones()


def labeled_terms(
    output: Output, label: Tensor, weight: Tensor, bank: Bank, network: MemoryBankNetwork
) -> dict[str, Tensor]:
    """`loss_supervised`, and `contrast_labeled` where their rows are among the output.

    Args:
        output: What the network returned for `labeled` images.
        label: int64 [B,H,W].
        weight: Of each class, [C].
        bank: With this step's rows.
        network: For its selectors.
    """
    logits = upsample(output["logits"]["labeled"], label.shape[-2:], network.segmenter.align_corners)
    return {"loss_supervised": supervised_loss(logits, label, weight)} | _contrast("labeled", output, bank, network)


def unlabeled_terms(
    output: Output,
    pseudo_label: Tensor,
    confidence: Tensor,
    weight: Tensor,
    bank: Bank,
    network: MemoryBankNetwork,
    step: int,
    method: Method,
) -> dict[str, Tensor]:
    """`loss_pseudo`, `entropy`, and `contrast_unlabeled` where their rows are among the output.

    Args:
        output: What the network returned for `unlabeled` images, both views.
        pseudo_label: int64 [2B,H,W].
        confidence: [2B,H,W], probabilities of the pseudo-labels.
        weight: Of each class, [C].
        bank: With this step's rows.
        network: For its selectors.
        step: From 0.
        method: The hyper-parameters.
    """
    logits = upsample(output["logits"]["unlabeled"], pseudo_label.shape[-2:], network.segmenter.align_corners)
    pseudo = pseudo_label_loss(logits, pseudo_label, confidence, weight, method.confidence_power)
    terms = {
        "loss_pseudo": ramp(step, method.ramp_steps) * pseudo,
        "entropy": entropy_loss(logits, pseudo_label, method.entropy_broadcast),
    }
    return terms | _contrast("unlabeled", output, bank, network)


def with_total(terms: dict[str, Tensor], output: Output, contrast_weight: float, method: Method) -> dict[str, Tensor]:
    """The terms and `loss`, their weighted sum; before the contrastive loss begins, with the idle heads' zero."""
    weights = {"entropy": method.entropy_weight, "contrast_labeled": contrast_weight}
    weights["contrast_unlabeled"] = contrast_weight
    loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
    return terms | {"loss": loss + output["idle"]["heads"] if "idle" in output else loss}


def learn(parts: Parts, losses: dict[str, Tensor], decay: float, contrasts: bool, run: Run) -> None:
    """A step of the optimizer and one of the teacher.

    Args:
        losses: Terms and their sum.
        decay: Of the teacher.
        contrasts: Whether heads and selectors learn already.
    """
    with record_function("optimizer"):
        if not contrasts:
            for parameter in parts.network.heads.parameters():
                parameter.grad = None  # no weight decay before they learn
        stepped = run.step_optimizer(parts.optimizer, losses)
    with record_function("teacher update"):
        if stepped:
            update_teacher(parts.teacher, parts.network, decay)
            run.share_statistics(parts.network, parts.teacher)


def bank_filled(parts: Parts) -> Tensor:
    """[], the share of the bank's places that are taken."""
    return parts.bank.filled.float().mean() / parts.bank.rows.shape[1]


def _contrast(name: str, output: Output, bank: Bank, network: MemoryBankNetwork) -> dict[str, Tensor]:
    if name not in output.get("rows", {}):
        return {}
    # The selectors are called outside the wrapped forward; processes exchange their gradients all the same, as these
    # are part of the one backward pass that follows it.
    rows, classes = output["rows"][name], output["classes"][name]
    return {f"contrast_{name}": contrastive_loss(rows, classes, bank, network.heads.selectors)}


def unlabeled_share(config: Config, run: Run) -> int:
    """Unlabeled images of one process in one backward pass.

    Raises:
        UserError: they cannot be divided evenly, or to single images where DeepLabV3+ needs two for its batch norm.
    """
    total = config.method.unlabeled_batch(config.optim.batch_size)
    share, rest = divmod(total, run.processes * config.optim.accumulation)
    if rest:
        raise UserError(
            f"{total} unlabeled images a step cannot be divided over {run.processes} processes x "
            f"{config.optim.accumulation} accumulation passes; set method.unlabeled_batch_size"
        )
    shared = run.processes > 1 and run.device.type == "cuda"
    if share == 1 and config.model.head == "v3plus_memory_bank" and not shared:
        raise UserError(
            "one unlabeled image a process and pass is too few for batch norm: raise method.unlabeled_batch_size"
        )
    return share


def class_balance(config: Config, split: Split) -> ClassBalance:
    """Tables as long as one pass over the labeled and one over the unlabeled images."""
    batch = config.optim.batch_size
    steps = len(split.labeled) // batch, len(split.unlabeled) // config.method.unlabeled_batch(batch)
    return ClassBalance(config.model.num_classes, *(max(1, count) for count in steps))


def most_rows(config: Config, split: Split) -> int:
    """Rows of a class that enter the bank at most in one update, over all processes."""
    method, accumulation = config.method, config.optim.accumulation
    factor = embeddings_per_image(method.bank_size, len(split.labeled), method.bank_rows_factor)
    return config.optim.batch_size // accumulation * factor
