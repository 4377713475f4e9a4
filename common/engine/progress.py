"""The length of a run, and how far it has come: the plain values that its checkpoints store beside the tensors."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from common.metrics import Scores


@dataclass(frozen=True)
class RunLength:
    """Numbers of optimizer steps.

    Attributes:
        total: Steps of the whole run.
        steps_per_epoch: Steps of one epoch.
        eval_every: Steps between evaluations.
        save_every: Steps between checkpoints.
    """

    total: int
    steps_per_epoch: int
    eval_every: int
    save_every: int

    @classmethod
    def from_config(cls, run: Any, steps_per_epoch: int) -> "RunLength":
        """Convert the steps or epochs of a config's `run` section.

        Args:
            run: The `run` section.
            steps_per_epoch: The paper's rule, used unless the section sets its own number.
        """
        steps_per_epoch = run.steps_per_epoch or steps_per_epoch
        total = run.steps or run.epochs * steps_per_epoch
        eval_every = run.eval_every or (steps_per_epoch if run.epochs else max(1, total // 10))
        return cls(total, steps_per_epoch, eval_every, run.save_every or eval_every)


@dataclass
class SkipCounts:
    """Skipped steps and files since the start of the run, and consecutive bad steps up to now."""

    steps: int = 0
    files: int = 0
    steps_in_a_row: int = 0


@dataclass
class Progress:
    """State of a run after `step` optimizer steps.

    Attributes:
        step: Optimizer steps done.
        scores: Scores of the network after this step; None where it was not evaluated.
        best: `step` and `miou` of the best evaluation so far; None before the first.
        evaluation_due: An evaluation after this step is due and not done yet.
        skipped: Skipped steps and files.
    """

    step: int = 0
    scores: Scores | None = None
    best: dict[str, Any] | None = None
    evaluation_due: bool = False
    skipped: SkipCounts = field(default_factory=SkipCounts)

    @property
    def is_best(self) -> bool:
        """True if the evaluation after this step is the best so far."""
        return self.best is not None and self.best["step"] == self.step

    def count_step(self, length: RunLength) -> None:
        """Count one more step."""
        self.step += 1
        self.scores = None
        self.evaluation_due = self.step % length.eval_every == 0 or self.step == length.total

    def add_scores(self, scores: Scores) -> None:
        """Record the evaluation after this step. Of equal scores, the later one counts as the best."""
        self.scores, self.evaluation_due = scores, False
        if self.best is None or math.isnan(self.best["miou"]) or scores.miou >= self.best["miou"]:
            self.best = {"step": self.step, "miou": scores.miou}

    def state_dict(self) -> dict[str, Any]:
        """The part of `state.pt` that is not about the optimizer."""
        return {"best": self.best, "unscored": self.evaluation_due, "skipped": asdict(self.skipped)}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        """Continue from the checkpoint of `step`; checkpoints of earlier versions lack some keys of `state`."""
        self.step, self.best = step, state["best"]
        self.evaluation_due = state.get("unscored", False)
        self.skipped = SkipCounts(**state.get("skipped", {}))
