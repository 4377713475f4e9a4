"""One training run: devices, steps, logging, evaluation, resuming. The script calls it; it never calls the script."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from common.config import to_dict
from common.config.files import flatten
from common.datasets.reader import Reader
from common.engine.checkpointer import SIGNS, CheckpointContents, Checkpointer
from common.engine.devices import (
    average_buffers,
    has_sync_batch_norm,
    make_accelerator,
    next_process_tensors,
    prepare_layout,
    share_batch,
)
from common.engine.gloo import GlooGroup
from common.engine.log import RunLog
from common.engine.monitor import Monitor, RunFacts
from common.engine.optimizer_step import OptimizerStep
from common.engine.progress import Progress, RunLength
from common.engine.run_folder import check_folder, open_folder
from common.engine.signals import Stopped, StopSignal
from common.errors import UserError
from common.metrics import Scores
from common.seeding import derive_seed
from common.splits.split import Split
from common.visual import curve


class Run(AbstractContextManager):
    """A run of `script` under `config`, on the devices that Accelerate finds.

    A script makes these calls, in this order:

        with Run(config, "paper/train.py") as run:
            run.set_length(steps_per_epoch)                        # sets run.total
            run.check_settings(reader, split)                      # warns of settings that the run cannot meet
            teacher = run.to_device(make_teacher(network))         # networks that take no gradients
            wrapped, optimizer = run.prepare(network, optimizer)   # the trained network
            run.resume(model=teacher, extra={"student": network}, optimizer=optimizer)
            batches = StepBatches(images, run)                     # calls run.register_batch for every batch
            for step in run.steps():
                for _ in run.accumulate(wrapped):                  # once, unless optim.accumulation > 1
                    ...                                            # run.autocast, run.from_next_process, run.monitor
                    run.backward(loss)
                if run.step_optimizer(optimizer, losses):          # False: not finite, so the step is undone
                    update_teacher(...)
                    run.average_batch_norm(network, teacher)       # batch-norm statistics, on CPUs
                logged = run.finish_step(losses, images)           # counts the step, logs every run.log_every steps
                if run.evaluation_due:
                    run.log_scores(evaluate_run(teacher, reader, split, run))
                run.save()                                         # if a checkpoint is due
            run.finish()

    `run.log.print` and `run.log.print_once` print on the main process.

    Args:
        config: The script's config, with the shared sections.
        script: Name of the script, e.g. `prcl/train.py`; a run folder belongs to one script.

    Attributes:
        config: The config; `run.precision` is set to the precision in use.
        folder: The run folder, `run.dir`.
        accelerator, device: The Accelerator of the run, and the device of this process.
        processes, rank: Number of processes, and index of this one.
        process_batch_size: Labeled images per process and backward pass.
        log: Writes `metrics.jsonl` and prints.
        monitor: Counts what shows that a run goes wrong (after `check_settings`).
        checkpointer: Saves and resumes (after `resume`).

    Raises:
        UserError: a precision or device that is not available, a batch that cannot be divided evenly, a run folder of
            another script or config.
    """

    def __init__(self, config: Any, script: str) -> None:
        self.config, self.script = config, script
        self.folder = Path(config.run.dir)
        self.accelerator = make_accelerator(config)
        # The launcher's choice becomes part of the config: evaluation and resuming go by it.
        precision = self.accelerator.mixed_precision
        config.run.precision = "fp32" if precision == "no" else precision
        check_folder(self.folder, script, config)
        self.device = self.accelerator.device
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        total, accumulation = config.optim.batch_size, config.optim.accumulation
        self.process_batch_size = share_batch(total, "optim.batch_size", self.accelerator, accumulation)
        self.log = RunLog(self.folder / "metrics.jsonl", self.accelerator)
        self._gloo = GlooGroup(self.processes, config.run.timeout)
        self._stop = StopSignal(self._gloo)
        self._progress = Progress()
        set_seed(config.run.seed)

    def __enter__(self) -> "Run":
        self._stop.install()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.log.stop()
        self._stop.uninstall()
        if kind is None or issubclass(kind, Stopped):
            self.accelerator.end_training()

    @property
    def is_main(self) -> bool:
        """True on the process that prints and writes."""
        return self.accelerator.is_main_process

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self._progress.step

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run (after `set_length`)."""
        return self._length.total

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch (after `set_length`)."""
        return self._length.steps_per_epoch

    # Before the loop

    def set_length(self, steps_per_epoch: int) -> None:
        """Set the length of the run from the config's steps or epochs; `steps_per_epoch` is the paper's rule."""
        self._length = RunLength.from_config(self.config.run, steps_per_epoch)

    def check_settings(self, reader: Reader, split: Split, facts: RunFacts = RunFacts()) -> None:
        """Warn of settings that the run cannot meet, e.g. constants in steps beyond its end; create `monitor`.

        `reader` reads the labeled images of `split`; `facts` are those that the config does not state.
        """
        self.monitor = Monitor(reader.classes, self.total, self.accelerator, self.log)
        self.monitor.warn_at_start(self.config, facts, reader, split)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Move the trained network to the device and wrap it for processes and precision."""
        wrapped, optimizer = self.accelerator.prepare(prepare_layout(network, self.accelerator), optimizer)
        if self.processes > 1:
            # SyncBatchNorm or `average_batch_norm` keep buffers equal; broadcasting them would undo a step's update.
            wrapped.broadcast_buffers = False
        # Only the wrapper is compiled: evaluation calls the bare network, with a new size for every image.
        return (torch.compile(wrapped) if self.config.run.compile else wrapped), optimizer

    def to_device(self, network: nn.Module) -> nn.Module:
        """Move a network that is not trained, e.g. a teacher, to the device; run its forwards `with run.autocast()`."""
        return prepare_layout(network, self.accelerator).to(self.device)

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for forwards of networks that are not wrapped."""
        return self.accelerator.autocast()

    def resume(self, model: nn.Module, extra: dict[str, nn.Module], optimizer: Any) -> None:
        """Declare the checkpoint contents, resume from the newest checkpoint if there is one, create the run folder.

        Args:
            model: The evaluated network.
            extra: Other modules to save (student, heads, banks) by their name in the file.
            optimizer: The optimizer that `prepare` returned.

        Raises:
            UserError: every checkpoint of the folder is damaged, one is of another network, or the folder cannot be
                written.
        """
        contents = CheckpointContents(model, extra | {SIGNS: self.monitor}, optimizer)
        max_bad_steps, services = self.config.run.max_bad_steps, (self.accelerator, self._gloo, self.log)
        self._optimizer_step = OptimizerStep(contents.modules(), self._progress, *services, max_bad_steps)
        self.checkpointer = Checkpointer(contents, self._progress, self._length, self.config, self.script, *services)
        self.checkpointer.resume()
        self.monitor.keep_on_main()
        if self.is_main:
            open_folder(self.folder, self.script, self.config)
            self.log.truncate_after(self.step, scored=not self.evaluation_due)
        self.checkpointer.tidy()
        self.accelerator.wait_for_everyone()
        self.log.start_trackers(self.script.split("/")[0], flatten(to_dict(self.config)))

    # The loop

    def steps(self) -> Iterator[int]:
        """Iterate over the remaining steps, counted from 0; the loop body does one optimizer step each.

        Random numbers drawn in step k depend on (seed, k, rank) alone, so a resumed run draws the same ones.

        Raises:
            Stopped: a signal stopped the run, and `save` has written the checkpoint.
        """
        self._raise_if_stopped()
        self.log.start(self.step, self.total)
        while self.step < self.total:
            self._optimizer_step.begin()
            set_seed(derive_seed(self.config.run.seed, "step", self.step, self.rank))
            yield self.step
            self._raise_if_stopped()
        self._optimizer_step.begin()  # a bad file after the last step must not undo that step
        self.log.stop()

    def accumulate(self, wrapped: nn.Module) -> Iterator[int]:
        """Iterate over the backward passes of one optimizer step: `optim.accumulation` of them."""
        self._optimizer_step.begin_passes()
        for index in range(self.config.optim.accumulation):
            with self.accelerator.accumulate(wrapped):
                yield index

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients of `loss`, scaled for precision and accumulation."""
        self.accelerator.backward(loss)

    def register_batch(self, batch: Any) -> None:
        """Note the images of a step. A file that one process cannot read ends the run on all of them.

        Args:
            batch: A `Batch`, or the `UserError` of a file that cannot be read.

        Raises:
            UserError: a file cannot be read; the state after the last complete step is saved.
        """
        errors = [str(batch)] if isinstance(batch, UserError) else []
        if any(count for (count,) in self._gloo.gather_ints(len(errors))):
            first = self._gloo.gather_strings(errors)[0]
            self._optimizer_step.undo()
            self.monitor.move_to_main()
            self.checkpointer.save_before_error()
            raise UserError(
                f"{first}. Stopped before step {self.step + 1}; set data.skip_bad_files to leave such files out"
            )
        self._optimizer_step.add_batch(batch)

    def step_optimizer(self, optimizer: Any, losses: dict[str, torch.Tensor]) -> bool:
        """Update the weights and clear the gradients; skip the update if a loss or gradient is not finite.

        A skipped step leaves weights, buffers (batch norm, banks) and optimizer as they were before it, on all
        processes. The check makes the CPU wait for the device, once per step.

        Args:
            optimizer: The optimizer that `prepare` returned.
            losses: The terms of the last backward pass, 0-d tensors by name.

        Returns:
            True if the weights changed; update the teacher only then. Banks and other buffers of the modules passed to
            `resume` may change earlier: a skipped step restores them.

        Raises:
            UserError: the step is the last of `run.max_bad_steps` consecutive bad ones.
        """
        return self._optimizer_step.apply(optimizer, losses)

    def average_batch_norm(self, *networks: nn.Module) -> None:
        """Average running batch-norm statistics over processes where SyncBatchNorm does not exist (CPU)."""
        if self.processes > 1 and not has_sync_batch_norm(self.accelerator):
            average_buffers(networks, self.accelerator)

    def from_next_process(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Exchange tensors: return those of the next process (the first process follows the last)."""
        return next_process_tensors(tensors, self.accelerator)

    def finish_step(self, values: dict[str, Any], images: int) -> dict[str, float]:
        """Count the step; every `log_every` steps write and show `values`, averaged over processes.

        Args:
            values: Numbers or 0-d tensors by name.
            images: Images of the step over all processes, for images per second.

        Returns:
            The logged numbers; an empty dict if no line is due or the step was skipped.
        """
        self._progress.count_step(self._length)
        signals, steps, files = zip(*self._gloo.gather_ints(self._stop.received, *self._optimizer_step.skips))
        self._stop.agreed = max(signals)  # on any process: all must stop after the same step
        self.log.advance(self.step)
        self._optimizer_step.end(steps[0], sum(files))
        due = self.step % self.config.run.log_every == 0 or self.step == self.total
        if not due or steps[0]:  # a step is skipped on all processes or none
            return {}
        return self.log.log_step(self.step, values | self.monitor.read(self.step), images)

    @property
    def evaluation_due(self) -> bool:
        """True if an evaluation is due: after this step, or before the first one if a stop interrupted the last."""
        return self._progress.evaluation_due

    def log_scores(self, scores: Scores | None) -> None:
        """Write and print the scores of the evaluated network after this step, and remember the best.

        Args:
            scores: None if a signal interrupted the evaluation; the resumed run repeats it.
        """
        self._stop.exchange()
        if scores is None:
            return
        self._progress.add_scores(scores)
        lost = {"classes_not_predicted": len(self.monitor.evaluated(self.step))}
        self.log.log_scores(self.step, scores, lost, self._progress.is_best)

    def picture_path(self) -> Path:
        """Path of the panel drawn after this step's evaluation."""
        return self.folder / "pictures" / f"step_{self.step:08d}.png"

    def save(self) -> None:
        """Write a checkpoint if one is due: by cadence, for a new best, for the last step, or because of a signal.

        Raises:
            UserError: the network is not finite.
        """
        if self.checkpointer.is_due(stopping=bool(self._stop.agreed)):
            self.monitor.move_to_main()
        self.checkpointer.save_if_due(stopping=bool(self._stop.agreed))
        self.log.exclude_pause()

    def stop_requested(self) -> bool:
        """True once a signal requests a stop: an evaluation gives up, and the run ends after its next save."""
        return bool(self._stop.received or self._stop.agreed)

    def stop_if_signalled(self) -> None:
        """Raise `Stopped` if any process received a signal; for work after the last step."""
        self._stop.exchange()
        self._raise_if_stopped()

    def finish(self, variant: str | None = None) -> None:
        """Draw the curve of the run, and print the best score and where the pictures are.

        Args:
            variant: Name of weights written by `save_variant`: `best` is linked to them if they have a higher mIoU.

        Raises:
            UserError: the checkpoint of the last step could not be written.
        """
        if not self.is_main:
            return
        curve(self.folder / "metrics.jsonl", self.folder / "pictures" / "curve.png")
        self.checkpointer.link_best(variant)
        self.log.print(f"pictures in {self.folder / 'pictures'}")
        self.checkpointer.require_last()

    def _raise_if_stopped(self) -> None:
        if self._stop.agreed:
            self.log.print(f"stopped after step {self.step} of {self.total}; the same command continues the run")
            raise Stopped(128 + self._stop.agreed)
