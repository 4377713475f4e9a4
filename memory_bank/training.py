"""Training state, restart, batch-norm refresh and batch sizes that the three training scripts share."""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.datasets.reader import Reader
from common.engine.devices import share_batch
from common.engine.monitor import RunFacts
from common.engine.run import Run
from common.engine.run_folder import stored_before
from common.evaluation.evaluate import evaluate_run
from common.images import normalize
from common.loaders import StepBatches
from common.splits.split import Split
from memory_bank.bank import Bank
from memory_bank.config import Config, protocol_of
from memory_bank.losses import ClassBalance, contrastive_loss, embeddings_per_image
from memory_bank.network import MemoryBankNetwork

REFRESHED = "refreshed"  # checkpoint kind


class Restart(nn.Module):
    """Bookkeeping for restarting from the best checkpoint: whether a restart is due, and the step of the last one.

    `due` is set before a checkpoint is saved: a run that is killed between saving and restarting restarts on resume.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("due", torch.tensor(False))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def schedule(self, run: Run, patience: float) -> None:
        """Set `due` after an evaluation, if the best one or the last restart is over `patience` of the run ago."""
        waited = run.step - max(run.checkpointer.best_step, int(self.step))
        is_finished = run.step == run.total
        # An evaluation that a signal cut short is still due: it is repeated on resume.
        self.due.fill_(waited > patience * run.total and not is_finished and not run.evaluation_due)


@dataclass
class TrainState:
    """Training state that outlives a step, except the optimizer's.

    Attributes:
        network: The student.
        teacher: Its moving average.
        bank: Embeddings of each class, the same on every process.
        balance: Class counts of labels and pseudo-labels.
        restart: Bookkeeping for restarting from the best checkpoint.
        evaluated: The segmenter that is evaluated, of student or teacher.
        extra: Everything else in a checkpoint, by name.
    """

    network: MemoryBankNetwork
    teacher: MemoryBankNetwork
    bank: Bank
    balance: ClassBalance
    restart: Restart
    evaluated: nn.Module
    extra: dict[str, nn.Module]


def build(network: MemoryBankNetwork, teacher: MemoryBankNetwork, split: Split, config: Config, run: Run) -> TrainState:
    """Build the initial training state around student and teacher."""
    method = config.method
    bank = Bank(config.model.num_classes, method.bank_size, method.embedding_dim).to(run.device)
    balance, restart = build_class_balance(config, split).to(run.device), Restart().to(run.device)
    extra = {"student": network.segmenter, "teacher": teacher.segmenter}
    evaluated = extra.pop("teacher" if method.save_teacher_test else "student")
    extra |= {"student_heads": network.heads, "teacher_heads": teacher.heads}
    extra |= {"bank": bank, "balance": balance, "restart": restart}
    return TrainState(network, teacher, bank, balance, restart, evaluated, extra)


def restart_from_best(state: TrainState, config: Config, run: Run) -> None:
    """Load the best checkpoint's student into student and teacher; optimizer, bank and counts stay, as released."""
    best = run.checkpointer.read_best()
    if best is None:
        run.log.print("warning: the best checkpoint cannot be read; training continues without a restart")
        return
    student = best.extra["student"] if config.method.save_teacher_test else best.model
    state.network.segmenter.load_state_dict(student)
    state.network.heads.load_state_dict(best.extra["student_heads"])
    state.teacher.load_state_dict(state.network.state_dict())
    state.restart.due.fill_(False)
    state.restart.step.fill_(run.step)
    run.log.print(
        f"step {run.step}: no better evaluation since step {run.checkpointer.best_step}; restarted from its checkpoint"
    )


def refresh_batch_norm(
    state: TrainState, reader: Reader, split: Split, unlabeled_batches: StepBatches | None, config: Config, run: Run
) -> None:
    """Recompute the best network's batch-norm statistics on unlabeled crops, and save the network with its new score.

    A run on labels only leaves them as they are.

    Raises:
        Stopped: a signal asked for it; the same command repeats this.
    """
    refresh = config.method.refresh_batches and not config.method.labels_only
    best = run.checkpointer.read_best() if refresh and not run.checkpointer.has_variant(REFRESHED) else None
    if best is None:
        return
    network = deepcopy(state.evaluated)
    network.load_state_dict(best.model)
    network.train()
    for _ in range(min(config.method.refresh_batches, run.total)):
        run.stop_if_signalled()
        image = next(unlabeled_batches).image
        with torch.no_grad(), run.autocast():
            network(normalize(image))
    run.average_batch_norm(network)
    scores = evaluate_run(network, reader, split, run, protocol_of(config))
    run.stop_if_signalled()
    run.checkpointer.save_variant(REFRESHED, network, scores)


def contrastive_term(name: str, output: dict[str, Tensor], bank: Bank, network: MemoryBankNetwork) -> Tensor:
    """The contrastive loss [] of the images `name`; the network's `idle` zero where it returned no embeddings."""
    if f"{name}_embeddings" not in output:
        return output["idle"]
    # The selectors run outside the wrapped forward. Their gradients are reduced over processes all the same, because
    # the one backward pass after it includes them.
    embeddings, classes = output[f"{name}_embeddings"], output[f"{name}_classes"]
    return contrastive_loss(embeddings, classes, bank, network.heads.selectors)


def facts_of(config: Config, split: Split, total: int, updates_per_step: int = 1, source: tuple = ()) -> RunFacts:
    """RunFacts with which a run of `total` steps is examined: constants that it does not use, and its class balance.

    Args:
        config: The script's config.
        split: Lists of the images.
        total: Optimizer steps of the run.
        updates_per_step: 2 where labeled and unlabeled images take turns.
        source: Reader and ids of the source domain's images; empty without domain adaptation.
    """
    method, unused, signs = config.method, [], []
    if not source or method.labels_only:
        unused.append("method.adaptation")
    if method.labels_only:
        unused += ["method.bank_start", "method.contrast_start", "method.ramp_steps"]
    if not (method.save_teacher_test or (method.use_teacher_train and not method.labels_only)):
        unused.append("method.alpha")
    balance = build_class_balance(config, split)
    first = max(len(balance.labeled), len(balance.unlabeled))
    if method.class_balance and not method.labels_only and first > total:
        signs.append(
            f"method.class_balance counts {first} steps, one pass over labeled and unlabeled images, before it weights "
            f"classes, but the run has {total}, so it never does; raise run.steps, or set method.class_balance false"
        )
    sources = () if method.labels_only or not source else (source,)
    return RunFacts(skipped=unused, updates_per_step=updates_per_step, sources=sources, signs=signs)


def steps_per_epoch(labeled_images: int, batch_size: int) -> int:
    """Steps in one pass over the labeled images, without an incomplete last batch."""
    return max(1, labeled_images // batch_size)


def freezes_norms(config: Config, run: Run) -> bool:
    """True if scale and shift of the backbone's batch norms stay as they are: those of loaded weights, as released.

    Departure: without pretrained weights they are trained; the release always freezes them.
    """
    # `method.labels_only` came together with this rule: a run folder whose config lacks it resumes as it began.
    return config.model.pretrained is not False or stored_before(run.folder, "method.labels_only")


def unlabeled_share(config: Config, run: Run) -> int:
    """Unlabeled images per process and backward pass.

    Raises:
        UserError: they cannot be divided evenly, or only one is left where DeepLabV3+ needs two for its batch norm.
    """
    total = config.method.unlabeled_batch(config.optim.batch_size)
    needs_two = config.model.head == "v3plus_memory_bank"  # it pools an image to one pixel
    accumulation = config.optim.accumulation
    return share_batch(total, "method.unlabeled_batch_size", run.accelerator, accumulation, needs_two)


def build_class_balance(config: Config, split: Split) -> ClassBalance:
    """Build count tables as long as one pass over the labeled and one over the unlabeled images."""
    batch_size = config.optim.batch_size
    unlabeled_steps = max(1, len(split.unlabeled) // config.method.unlabeled_batch(batch_size))
    return ClassBalance(config.model.num_classes, steps_per_epoch(len(split.labeled), batch_size), unlabeled_steps)


def max_new_per_class(config: Config, split: Split) -> int:
    """Embeddings that may enter the bank per class and update, over all processes."""
    method = config.method
    per_image = embeddings_per_image(method.bank_size, len(split.labeled), method.bank_rows_factor)
    return config.optim.batch_size // config.optim.accumulation * per_image
