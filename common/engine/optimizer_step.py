"""One optimizer step after the other: a step that is not finite is undone, counted and reported."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from common.engine.finite import BufferSnapshot, find_non_finite
from common.engine.gloo import GlooGroup
from common.engine.log import RunLog
from common.engine.progress import Progress
from common.errors import UserError


class OptimizerStep:
    """The current optimizer step of a run.

    Args:
        modules: Modules whose buffers a skipped step must leave as they were.
        progress: Position of the run; holds the totals of skipped steps and files.
        accelerator: The run's Accelerator; its gradient scaler is set only under fp16.
        gloo: Connects the processes.
        log: Prints the warnings and writes the totals.
        max_bad_steps: Number of consecutive bad steps that ends the run.

    Attributes:
        skips: Skipped steps (0 or 1) and skipped files of this process in the current step.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        progress: Progress,
        accelerator: Accelerator,
        gloo: GlooGroup,
        log: RunLog,
        max_bad_steps: int,
    ) -> None:
        self._buffers = BufferSnapshot(modules)
        self._progress, self._accelerator, self._gloo, self._log = progress, accelerator, gloo, log
        self._max_bad_steps = max_bad_steps

    def begin(self) -> None:
        """Start a new step: forget images and skips of the one before, and save the buffers."""
        self._images: list[str] = []
        self.skips = (0, 0)
        self._applied = False
        self._buffers.save()

    def begin_passes(self) -> None:
        """Prepare for backward passes; those after an `apply` within the same step keep its result if they fail."""
        if self._applied:
            self._buffers.save()

    def add_batch(self, batch: Any) -> None:
        """Note the images of a `Batch`; print and count the files that were skipped for it."""
        self._images += batch.names
        self.skips = (self.skips[0], self.skips[1] + len(batch.skipped))
        if batch.skipped:
            # Every process prints its own files; the counts are summed at the end of the step.
            print(*(f"warning: skipped: {reason}" for reason in batch.skipped), sep="\n", flush=True)

    def undo(self) -> None:
        """Reset the buffers to their values at the last `begin` or `begin_passes`."""
        self._buffers.restore()

    def apply(self, optimizer: Any, losses: dict[str, Tensor]) -> bool:
        """Update the weights and clear the gradients, or skip the step; see `Run.step_optimizer`."""
        scaler = self._accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)
        self._applied = True
        non_finite = find_non_finite(losses, optimizer, self._buffers, self._gloo)
        if not non_finite:
            optimizer.step()
        elif scaler is not None:
            scaler.update()  # lowers the scale, as the skipped optimizer step would have done
        lr = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        if not non_finite:
            self._progress.skipped.steps_in_a_row = 0
            return True
        self.undo()
        # fp16 skips steps to find its scale; a scale below 1 shows that there is none to be found.
        if scaler is None or non_finite != ["gradient"] or scaler.get_scale() < 1:
            self._count_bad_step(non_finite, lr)
        return False

    def end(self, steps_skipped: int, files_skipped: int) -> None:
        """Add the skips of the step, over all processes, to the totals, and write the totals if they changed."""
        if not (steps_skipped or files_skipped):
            return
        totals = self._progress.skipped
        totals.steps += steps_skipped
        totals.files += files_skipped
        self._log.write({"step": self._progress.step, "skipped_steps": totals.steps, "skipped_files": totals.files})

    def _count_bad_step(self, non_finite: list[str], lr: float) -> None:
        totals = self._progress.skipped
        totals.steps_in_a_row += 1
        self.skips = (1, self.skips[1])
        step, row, limit = self._progress.step + 1, totals.steps_in_a_row, self._max_bad_steps
        images = ", ".join(self._gloo.gather_strings(self._images))
        reason = f"non-finite {', '.join(non_finite)} (lr {lr:.3g}; images {images})"
        steps = f"{row} consecutive bad step{'s' if row > 1 else ''}"
        if row >= limit:
            raise UserError(
                f"step {step}: {reason}.\n"
                f"{steps} (run.max_bad_steps is {limit}): lower optim.lr or set another run.precision"
            )
        self._log.print(f"warning: step {step} skipped: {reason}. {steps}; the run stops at {limit}.")
