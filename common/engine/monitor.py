"""Signs that a run gives of itself: constants it never reaches, thresholds nothing passes, classes it loses.

Some are checked once before training (`startup_warnings`), others are counted on the device during it (`Monitor`) and
read with the log. Each is printed once, with what to change; docs/troubleshooting.md explains them.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common import IGNORE
from common.config.lengths import Decay, Steps, decay_of, in_steps
from common.datasets.reader import Reader
from common.engine.log import RunLog
from common.errors import UserError
from common.metrics import count_ids
from common.models.deeplab import RATES
from common.splits.split import Split, classes_in

LAG = 0.05  # of the run: a teacher that lags more than this is evaluated as it was long ago
HIGH_LR_FLOOR = 0.02  # of the learning rate
FEW_CONFIDENT = 0.01  # of the unlabeled pixels
ONE_CLASS = 0.95  # of the pseudo-labels
COMMON_CLASS = 0.9  # of the labels: a class this common may well be that common among pseudo-labels
LABELS_READ = 500  # labels that are read for the classes they show
NAMES_SHOWN = 12  # of classes in a warning
SETTLED, LEAST_STEPS = 0.5, 100  # of the run, and steps: early predictions are unreliable


@dataclass(frozen=True)
class RunFacts:
    """What a config does not state about its run.

    Attributes:
        lr_floor: Smallest learning rate of the schedule.
        skipped: Dotted keys of `Steps` and `Decay` constants, or of sections, that are not examined: those that the run
            does not use, and averages that are not evaluated.
        updates_per_step: Updates per step of the run, if constants in steps count updates.
        sources: Further labeled images: their reader and their ids.
        signs: Signs that the paper itself found, one line each.
    """

    lr_floor: float = 0.0
    skipped: Collection[str] = ()
    updates_per_step: int = 1
    sources: Sequence[tuple[Reader, Sequence[str]]] = ()
    signs: Sequence[str] = ()


def startup_warnings(
    config: Any, total: int, facts: RunFacts, class_names: Sequence[str], shown: Sequence[bool] | None
) -> list[str]:
    """Check the constants of a config against the length of its run, its crops and its labels.

    Args:
        config: The script's config.
        total: Optimizer steps of the run.
        facts: What the config does not state.
        class_names: Names of the classes.
        shown: For each class, True where a labeled image shows it; None where labels were not read.

    Returns:
        One line per sign, without the word warning.
    """
    lr_floor = facts.lr_floor
    signs = [*_unreached(config, total * facts.updates_per_step, facts.skipped), *_late_snapshots(config.run, total)]
    signs += facts.signs
    if lr_floor > HIGH_LR_FLOOR * config.optim.lr:
        signs.append(
            f"the learning rate never falls below {lr_floor:g}, {lr_floor / config.optim.lr:.0%} of optim.lr "
            f"{config.optim.lr:g}: raise optim.lr, or the end of training stays noisy"
        )
    missing = [name for name, there in zip(class_names, shown or ()) if not there]
    if missing:
        signs.append(
            f"no labeled image shows {_listed(missing)}: the network cannot learn "
            f"{'it' if len(missing) == 1 else 'them'}; add labels, or draw another split (data.split)"
        )
    signs += _small_crops(config)
    return signs


def classes_shown(sources: Sequence[tuple[Reader, Sequence[str]]]) -> list[bool] | None:
    """For each class, True where a label shows it; None for more than `LABELS_READ` labels.

    Labels that cannot be read are passed over: training reports them.

    Args:
        sources: Readers, with the ids of the images whose labels they read.
    """
    pairs = [(reader, name) for reader, names in sources for name in names]
    if not 0 < len(pairs) <= LABELS_READ:
        return None

    def occurring(pair: tuple[Reader, str]) -> np.ndarray:
        try:
            return classes_in(*pair)
        except UserError:
            return np.zeros(len(pair[0].classes), bool)

    with ThreadPoolExecutor(16) as pool:
        return np.any(list(pool.map(occurring, pairs)), axis=0).tolist()


class Monitor(nn.Module):
    """Counts of pseudo-labels and predictions, kept on the device and read with the log.

    The counts are a buffer, so that a skipped step is undone and a resumed run counts on.

    Args:
        class_names: Names of the classes.
        total: Optimizer steps of the run.
        accelerator: Adds up over processes.
        log: Prints the warnings.
    """

    def __init__(self, class_names: Sequence[str], total: int, accelerator: Accelerator, log: RunLog) -> None:
        super().__init__()
        self._names, self._total = tuple(class_names), total
        self._accelerator, self._log, self._warned, self._has_threshold = accelerator, log, set(), False
        # Pseudo-labels and confident ones since the last log line, labels and predictions since the last evaluation.
        self.register_buffer("counts", torch.zeros(4, len(self._names), dtype=torch.int64))
        self.to(accelerator.device)

    def warn_at_start(self, config: Any, facts: RunFacts, reader: Reader, split: Split) -> None:
        """Print the signs that a config gives before training, on the main process."""
        if self._accelerator.is_main_process:
            shown = classes_shown([(reader, split.labeled), *facts.sources])
            for sign in startup_warnings(config, self._total, facts, self._names, shown):
                self._log.print(f"warning: {sign}")
        self._accelerator.wait_for_everyone()

    @torch.no_grad()
    def count_pseudo_labels(self, pseudo_label: Tensor, confident: Tensor | None = None) -> None:
        """Count the pseudo-labels of a batch per class.

        Args:
            pseudo_label: int64 of any shape, e.g. [B,H,W]; 255 is not counted.
            confident: bool of the same shape, True where the paper's threshold is passed; None for papers without one.
        """
        self.counts[0] += count_ids(pseudo_label, len(self._names))
        if confident is not None:
            self._has_threshold = True
            self.counts[1] += count_ids(torch.where(confident, pseudo_label, IGNORE), len(self._names))

    @torch.no_grad()
    def count_predictions(self, logits: Tensor, label: Tensor) -> None:
        """Count which classes labeled images show and which the network predicts on them.

        Args:
            logits: [B,C,h,w].
            label: int64 [B,H,W].
        """
        self.counts[2] += count_ids(label, len(self._names))
        self.counts[3] += count_ids(logits.detach().argmax(1), len(self._names))

    def read(self, step: int) -> dict[str, float]:
        """Return the shares since the last call, by their keys in metrics.jsonl, and warn of what they show.

        Collective: all processes call it. Waits for the device.
        """
        labels, confident, shown, _ = self._added_up()
        self.counts[:2] = 0
        if not sum(labels):  # a paper without pseudo-labels, or a run on labels only
            return {}
        values: dict[str, float] = {}
        if self._has_threshold:
            values["confident"] = sum(confident) / sum(labels)
            shares = zip(self._names, confident, labels)
            values |= {f"confident/{name}": part / whole for name, part, whole in shares if whole}
        largest = max(range(len(labels)), key=lambda index: labels[index])
        values["largest_class"] = labels[largest] / sum(labels)
        if self._is_settled(step):
            self._warn_of_pseudo_labels(values, largest, shown)
        return values

    def evaluated(self, step: int) -> list[str]:
        """Return the names of the classes that labels showed and the network never predicted since the last call.

        Collective: all processes call it. Waits for the device.
        """
        _, _, shown, predicted = self._added_up()
        self.counts[2:] = 0
        lost = [name for name, there, found in zip(self._names, shown, predicted) if there and not found]
        if lost and self._is_settled(step):
            self._warn(
                "not_predicted",
                f"labels show {_listed(lost)}, but the network has not predicted them since the last evaluation; set "
                "data.class_balanced true, or optim.supervised_loss ce+dice",
            )
        return lost

    def move_to_main(self) -> None:
        """Add the counts of all processes to those of the main one, which writes the checkpoint. Collective."""
        if self._accelerator.num_processes > 1:
            self.counts.copy_(self._accelerator.reduce(self.counts, "sum"))
            self.keep_on_main()

    def keep_on_main(self) -> None:
        """Clear the counts of the other processes: after loading, they have the main one's."""
        if not self._accelerator.is_main_process:
            self.counts.zero_()

    def _is_settled(self, step: int) -> bool:
        return step >= max(LEAST_STEPS, SETTLED * self._total)

    def _added_up(self) -> list[list[int]]:
        return self._accelerator.reduce(self.counts, "sum").tolist()

    def _warn_of_pseudo_labels(self, values: dict[str, float], largest: int, shown: list[int]) -> None:
        if values.get("confident", 1.0) < FEW_CONFIDENT:
            self._warn(
                "confident",
                f"{values['confident']:.2%} of the unlabeled pixels pass the confidence threshold, so unlabeled images "
                "teach almost nothing; lower the threshold of the method section, or train longer",
            )
        is_common = sum(shown) and shown[largest] / sum(shown) > COMMON_CLASS
        if values["largest_class"] > ONE_CLASS and not is_common:
            self._warn(
                "largest_class",
                f"{values['largest_class']:.0%} of the pseudo-labels are {self._names[largest]}, so training collapses "
                "to it; lower optim.lr, raise the threshold of the method section, or start from pretrained weights",
            )

    def _warn(self, sign: str, text: str) -> None:
        if sign not in self._warned:
            self._warned.add(sign)
            self._log.print(f"warning: {text}")


def _listed(names: Sequence[str]) -> str:
    """Names of classes in one line, which 171 classes would not fit."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more classes" if more > 0 else "")


def _unreached(section: Any, total: int, skipped: Collection[str], prefix: str = "") -> Iterator[str]:
    """Constants in steps that lie beyond the run, and decays of a teacher that lags too long."""
    hints = get_type_hints(type(section))
    for field in fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        if value is None or key in skipped:
            continue
        if is_dataclass(value):
            yield from _unreached(value, total, skipped, f"{key}.")
        elif hints[field.name] == Steps and (steps := in_steps(value, total)) >= total:
            yield (
                f"{key} is {steps} steps, but the run has {total}, so the change that it times never happens; lower "
                'it, or state it as a share of the run ("30%")'
            )
        elif hints[field.name] == Decay and (lag := _lag(decay_of(value, total))) > LAG * total:
            yield (
                f"the average of {key} {value} (the teacher) lags {lag:.0f} steps, {lag / total:.0%} of the run: it "
                'is the network of that time; lower it, or state the lag as a share of the run ("2%")'
            )


def _lag(decay: float) -> float:
    """Steps that an average of this decay lags."""
    return 1 / (1 - decay) if decay < 1 else math.inf


def _late_snapshots(run: Any, total: int) -> Iterator[str]:
    first = run.snapshot_from or run.snapshot_every
    if run.snapshot_every and first > total:
        key = "snapshot_from" if run.snapshot_from else "snapshot_every"
        yield (
            f"run.{key} is {first} steps, but the run has {total}, so no snapshot is kept; lower it, or set "
            "run.snapshot_every 0"
        )


def _small_crops(config: Any) -> Iterator[str]:
    model, crop = config.model, config.data.crop_size
    if not model.head.startswith("v3plus"):
        return
    # The deep stem of PRCL and CSS keeps stride 8; there the output stride chooses the rates alone.
    stride = 8 if model.head == "v3plus" and model.stem == "deep" else model.output_stride
    smallest, cells = min(model.rates or RATES[model.output_stride]), -(-min(crop) // stride)
    if cells < smallest:
        yield (
            f"crops of {crop[0]}x{crop[1]} are {cells} features wide at stride {stride}, but the smallest rate of the "
            f"ASPP is {smallest}, so its branches see borders alone; set model.rates, or larger crops in data.crop_size"
        )
