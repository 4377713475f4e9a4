"""One run: devices, folder, checkpoints and continuing. The script calls it; it never calls the script."""

import json
import math
import os
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate.utils import set_seed
from torch import nn

from common.config import to_dict
from common.config.files import flatten
from common.engine import checkpoints
from common.engine.devices import make_accelerator, share_batch
from common.engine.finite import BufferSnapshot, gradients_are_finite, not_finite
from common.engine.gloo import GlooGroup
from common.engine.log import RunLog
from common.engine.run_folder import check_folder, open_folder
from common.errors import UserError
from common.metrics import Scores
from common.seeding import derive_seed
from common.visual import curve

# Launchers pass on a signal that the process group got already: only a later one asks to stop at once.
REPEAT_SECONDS = 2.0


class Stopped(SystemExit):
    """The run was asked to stop and has written its checkpoint. The status is the shell's for the signal (143, 130)."""


@dataclass
class CheckpointContents:
    """What a checkpoint is made of: the evaluated network, other modules by name, and the optimizer."""

    model: nn.Module
    extra: dict[str, nn.Module]
    optimizer: Any

    def modules(self) -> list[nn.Module]:
        """The model and the others."""
        return [self.model, *self.extra.values()]


@dataclass
class SkipCounts:
    """What did not count: steps and files so far, and how many bad steps came in a row."""

    steps: int = 0
    files: int = 0
    steps_in_a_row: int = 0


class Run(AbstractContextManager):
    """A run of `script` under `config`, on the devices Accelerate finds.

    Args:
        config: The script's config, with the shared sections.
        script: Name of the script, `prcl/train.py` say; a run folder belongs to one script.

    Attributes:
        accelerator: The Accelerator everything runs on.
        device: Where tensors of this process live.
        step: Optimizer steps done so far.
        total: Optimizer steps of the whole run (after `set_length`).
        batch_size: Labeled images per process and backward pass.

    Raises:
        UserError: precision or device that is not there, a batch that cannot be divided evenly, a run folder of
            another script or config.
    """

    def __init__(self, config: Any, script: str) -> None:
        self.config, self.script = config, script
        self.folder = Path(config.run.dir)
        self.accelerator = make_accelerator(config)
        # What the launcher chose becomes part of the config: evaluation and continuing go by it.
        precision = self.accelerator.mixed_precision
        config.run.precision = "fp32" if precision == "no" else precision
        check_folder(self.folder, script, config)
        self.device = self.accelerator.device
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        optim = config.optim
        self.batch_size = share_batch(optim.batch_size, self.processes, optim.accumulation, self._has_shared_batch_norm)
        self.step, self.total, self.steps_per_epoch = 0, 0, None
        self.log = RunLog(self.folder / "metrics.jsonl", self.is_main)
        self._best: dict[str, Any] | None = None
        self._scores: Scores | None = None
        self._contents: CheckpointContents | None = None
        self._signal = self._stopping = 0
        self._evaluation_pending = False  # whether the evaluation after this step is due and has not been done
        self._skipped, self._new_skips = SkipCounts(), (0, 0)
        self._images: list[str] = []  # of this process in the step at hand
        self._optimizer_steps = 0  # of the step at hand
        self._saved_step = self._loaded_step = 0
        self._gloo = GlooGroup(self.processes, config.run.timeout)
        set_seed(config.run.seed)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.accelerator.is_main_process

    def __enter__(self) -> "Run":
        self._handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.log.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None or issubclass(kind, Stopped):
            self.accelerator.end_training()

    # Before the loop

    def set_length(self, steps_per_epoch: int) -> None:
        """Turn the config's steps or epochs into `total` steps; `steps_per_epoch` is the paper's rule."""
        run = self.config.run
        self.steps_per_epoch = run.steps_per_epoch or steps_per_epoch
        self.total = run.steps or run.epochs * self.steps_per_epoch
        every = self.steps_per_epoch if run.epochs else max(1, self.total // 10)
        self._eval_every = run.eval_every or every
        self._save_every = run.save_every or self._eval_every

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Move the trained network to the device and wrap it for processes and precision."""
        wrapped, optimizer = self.accelerator.prepare(self._prepare_layout(network), optimizer)
        if self.processes > 1:
            # SyncBatchNorm or `share_statistics` keep buffers equal; broadcasting them would undo a step's update.
            wrapped.broadcast_buffers = False
        # The network itself is not compiled: evaluation has another size for every image.
        return (torch.compile(wrapped) if self.config.run.compile else wrapped), optimizer

    def to_device(self, network: nn.Module) -> nn.Module:
        """Move a network that takes no gradients to the device. Call it under `autocast`."""
        return self._prepare_layout(network).to(self.device)

    def autocast(self) -> AbstractContextManager:
        """Mixed precision for forwards of networks that are not wrapped."""
        return self.accelerator.autocast()

    def resume(self, model: nn.Module, extra: dict[str, nn.Module], optimizer: Any) -> None:
        """Say what the checkpoints hold, load the newest one where the folder has any, and open the folder.

        Args:
            model: The evaluated network.
            extra: Other modules to save (student, heads, banks) by the name they have in the file.
            optimizer: What `prepare` returned.

        Raises:
            UserError: every checkpoint of the folder is damaged, one is of another network, or the folder cannot be
                written.
        """
        self._contents = CheckpointContents(model, extra, optimizer)
        self._buffers = BufferSnapshot(self._contents.modules())
        if self.is_main:
            checkpoints.restore(self.folder / "checkpoints")
        self.accelerator.wait_for_everyone()
        damaged = False
        for checkpoint in checkpoints.newest(self.folder / "checkpoints"):
            if isinstance(checkpoint, str):
                damaged = True
                self.log.print(f"warning: {checkpoint}; trying the one before")
                continue
            self._load(checkpoint)
            self.log.print(f"continuing {self.folder} after step {self.step} of {self.total}")
            break
        if damaged and not self.step:
            raise UserError(f"{self.folder} holds no checkpoint that is whole; move it away to start anew")
        if len({step for (step,) in self._gloo.gather_ints(self.step)}) > 1:
            raise UserError(f"the processes found different checkpoints: {self.folder} must lie on a disk they share")
        if self.is_main:
            open_folder(self.folder, self.script, self.config)
            self.log.truncate_after(self.step, scored=not self._evaluation_pending)
            self._tidy()
        self.accelerator.wait_for_everyone()
        if self.config.run.trackers:
            plain = {key: str(value) for key, value in flatten(to_dict(self.config)).items()}
            self.accelerator.init_trackers(self.script.split("/")[0], config=plain)

    # The loop

    def steps(self) -> Iterator[int]:
        """Steps still to do, counted from 0; the loop body does one optimizer step each.

        Random numbers drawn in step k depend on (seed, k, process) alone, so a continued run draws the same ones.

        Raises:
            Stopped: a signal asked for it, and `save` has written the checkpoint.
        """
        self._end_if_stopping()
        self.log.start(self.step, self.total)
        while self.step < self.total:
            self._images, self._new_skips, self._optimizer_steps = [], (0, 0), 0
            self._buffers.save()
            set_seed(derive_seed(self.config.run.seed, "step", self.step, self.rank))
            yield self.step
            self._end_if_stopping()
        self.log.stop()

    def accumulate(self, wrapped: nn.Module) -> Iterator[int]:
        """The backward passes of one optimizer step: more than one only under `optim.accumulation`."""
        if self._optimizer_steps:  # a second one in this step: what the first has done stands
            self._buffers.save()
        for index in range(self.config.optim.accumulation):
            with self.accelerator.accumulate(wrapped):
                yield index

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of `loss`, scaled for precision and accumulation."""
        self.accelerator.backward(loss)

    def register_batch(self, batch: Any) -> None:
        """Note the images of a step. A batch that could not be read on any process ends the run on all of them.

        Args:
            batch: A `Batch`, or the `UserError` of what could not be read.

        Raises:
            UserError: naming the file; what the steps before have done is saved.
        """
        error = batch if isinstance(batch, UserError) else None
        if any(bad for (bad,) in self._gloo.gather_ints(int(error is not None))):
            told = self._gloo.gather_strings([str(error)] if error else [])
            self._buffers.restore()
            if self._saved_step != self.step:
                self._write()
            self.accelerator.wait_for_everyone()  # the first process to end takes the others down, also one that writes
            raise UserError(
                f"{told[0]}. Stopped before step {self.step + 1}; data.skip_bad_files leaves such files out"
            )
        self._images += batch.names
        self._new_skips = (self._new_skips[0], self._new_skips[1] + len(batch.skipped))
        if batch.skipped:
            # Every process tells its own: the counts are added up at the end of the step.
            print(*(f"warning: skipped: {reason}" for reason in batch.skipped), sep="\n", flush=True)

    def step_optimizer(self, optimizer: Any, losses: dict[str, torch.Tensor]) -> bool:
        """One optimizer step and no gradients left, or, if a loss or gradient is not finite, none: as if never begun.

        A skipped step leaves weights, buffers (batch norm, banks) and optimizer as they were before it, on all
        processes. To know costs the one synchronization a step: what follows is already bound to wait for the gradient.

        Args:
            optimizer: What `prepare` returned.
            losses: The terms, 0-d tensors by name.

        Returns:
            Whether the weights changed: what follows them (teacher, banks) is to be updated only then.

        Raises:
            UserError: `run.max_bad_steps` bad ones in a row.
        """
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(optimizer.optimizer)
        self._optimizer_steps += 1
        wrong = self._non_finite(optimizer, losses)
        if not wrong:
            optimizer.step()
        elif scaler is not None:
            scaler.update()  # what the step left out would have done: the scale goes down
        lr = optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        if not wrong:
            self._skipped.steps_in_a_row = 0
            return True
        self._buffers.restore()
        # fp16 leaves steps out to find its scale; below 1 there is none to be found.
        if scaler is None or wrong != ["gradient"] or scaler.get_scale() < 1:
            self._count_bad_step(wrong, lr)
        return False

    def share_statistics(self, *networks: nn.Module) -> None:
        """Average running batch-norm statistics over processes where SyncBatchNorm does not exist (CPU)."""
        if self.processes == 1 or self._has_shared_batch_norm:
            return
        buffers = [buffer for network in networks for buffer in network.buffers() if buffer.is_floating_point()]
        flat = self.accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), "mean")
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(mean.view_as(buffer))

    def from_next_process(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors that the next process calls this with (the first process follows the last)."""
        if self.processes == 1:
            return tensors
        following = (self.rank + 1) % self.processes
        return tuple(self.accelerator.gather(tensor.unsqueeze(0))[following] for tensor in tensors)

    def finish_step(self, values: dict[str, Any], images: int) -> dict[str, float]:
        """Count the step; every `log_every` steps write and show `values` (scalars, averaged over processes).

        Args:
            values: Numbers or 0-d tensors by name.
            images: Images of the step over all processes, for images a second.

        Returns:
            What was logged; nothing after most steps.
        """
        self.step += 1
        self._scores, self._evaluation_pending = None, self.step % self._eval_every == 0 or self.step == self.total
        signals, steps, files = zip(*self._gloo.gather_ints(self._signal, *self._new_skips))
        self._stopping = max(signals)  # of any process: all must stop after the same step
        self.log.advance(self.step)
        if steps[0] or any(files):
            self._skipped.steps += steps[0]
            self._skipped.files += sum(files)
            self.log.write(
                {"step": self.step, "skipped_steps": self._skipped.steps, "skipped_files": self._skipped.files}
            )
        due = self.step % self.config.run.log_every == 0 or self.step == self.total
        if not due or steps[0]:
            return {}
        scalars = [torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in values.values()]
        means = self.accelerator.reduce(torch.stack(scalars).detach(), "mean").tolist()
        # The losses are finite; of what is only watched, a number that is none has no place in JSON.
        shown = {name: mean for name, mean in zip(values, means) if math.isfinite(mean)}
        numbers = self.log.log_step(self.step, shown, images)
        if self.config.run.trackers:
            self.accelerator.log(numbers, step=self.step)
        return numbers

    @property
    def evaluation_due(self) -> bool:
        """Whether the network is to be evaluated now; before the first step: because a stop came in between."""
        return self._evaluation_pending

    def stop_requested(self) -> bool:
        """Whether this process has got a signal: work between steps gives up, and the run ends at its next save."""
        return bool(self._signal or self._stopping)

    def log_scores(self, scores: Scores | None) -> None:
        """Write and print the scores of the evaluated network after this step, and remember the best.

        Args:
            scores: None where the evaluation was cut short by a signal: a continued run makes up for it.
        """
        self._stopping = max(signal for (signal,) in self._gloo.gather_ints(self._signal))
        if scores is None:
            return
        self._scores, self._evaluation_pending = scores, False
        best = self._best is None or math.isnan(self._best["miou"]) or scores.miou >= self._best["miou"]
        if best:
            self._best = {"step": self.step, "miou": scores.miou}
        names = ("miou", "pixel_accuracy", "classes_counted")
        numbers = {f"valid/{name}": getattr(scores, name) for name in names}
        self.log.write({"step": self.step} | numbers)
        if self.config.run.trackers:
            self.accelerator.log(numbers, step=self.step)
        mark = ", the best so far" if best else ""
        self.log.print(f"step {self.step}: mIoU {100 * scores.miou:.2f} over {scores.classes_counted} classes{mark}")

    def picture_path(self) -> Path:
        """Where the panel of an evaluation after this step goes."""
        return self.folder / "pictures" / f"step_{self.step:08d}.png"

    def save(self) -> None:
        """Write a checkpoint where one is due: by cadence, a new best, the last step, or because of a signal."""
        is_best = self._best is not None and self._best["step"] == self.step
        due = self.step % self._save_every == 0 or self.step == self.total
        if due or is_best or self._stopping:
            self._save(resumable=True)
        elif self._is_snapshot(self.step) and self.step != self._loaded_step:  # that one can be continued from
            self._save(resumable=False)
        self.log.restart_clock(self.step)

    @property
    def best_step(self) -> int:
        """Step of the best evaluation so far; 0 before the first."""
        return self._best["step"] if self._best else 0

    def read_best(self) -> checkpoints.Checkpoint | None:
        """The checkpoint of the best evaluation so far; None, on all processes, where one cannot read it."""
        found = None
        if self._best:
            with suppress(UserError):
                found = checkpoints.read(checkpoints.step_folder(self.folder / "checkpoints", self.best_step))
        return found if all(there for (there,) in self._gloo.gather_ints(int(found is not None))) else None

    def stop_if_signalled(self) -> None:
        """Between pieces of work after the last step.

        Raises:
            Stopped: any process got a signal.
        """
        self._stopping = max(signal for (signal,) in self._gloo.gather_ints(self._signal))
        self._end_if_stopping()

    def has_variant(self, kind: str) -> bool:
        """Whether `save_variant` has written this kind; the same answer on all processes."""
        there = checkpoints.step_folder(self.folder / "checkpoints", self.best_step, kind).is_dir()
        return all(found for (found,) in self._gloo.gather_ints(int(there)))

    def save_variant(self, kind: str, network: nn.Module, scores: Scores) -> None:
        """Write weights that were made of the best ones after the last step to `checkpoints/<kind>_<step>`."""
        if self.is_main:
            meta = self._meta() | {"step": self.best_step, "scores": {"miou": scores.miou}}
            try:
                checkpoints.write(self.folder / "checkpoints", meta, network.state_dict(), kind=kind)
            except OSError as error:
                self.log.print(f"warning: {kind} weights could not be written ({error.strerror or error}); going on")
        self.accelerator.wait_for_everyone()

    def finish(self, kind: str | None = None) -> None:
        """Draw the curve of the run and say where everything is.

        Args:
            kind: Of weights made of the best ones, to which `best` points if they have a higher mIoU.

        Raises:
            UserError: the checkpoint of the last step could not be written.
        """
        if not self.is_main:
            return
        curve(self.folder / "metrics.jsonl", self.folder / "pictures" / "curve.png")
        if self._best:
            miou, step = self._best["miou"], self._best["step"]
            better = self._better_variant(kind) if kind else None
            if better is not None:
                with suppress(OSError):  # a full disk: it then stands beside the others under its own name
                    checkpoints.point(self.folder / "checkpoints", "best", step, kind)
            weights = f", {kind}" if better is not None else ""
            shown = miou if better is None else better
            self.log.print(f"best mIoU {100 * shown:.2f} after step {step}{weights} (chosen on the valid list)")
        self.log.print(f"pictures in {self.folder / 'pictures'}")
        if self._saved_step < self.step:
            raise UserError(
                f"no checkpoint of the last step, {self.step}, could be written to {self.folder / 'checkpoints'}: "
                f"make room, and give the same command again; it continues after step {self._saved_step}"
            )

    # Inside

    def _better_variant(self, kind: str) -> float | None:
        """mIoU of the weights of this kind, where it is above the best evaluation's."""
        folder = checkpoints.step_folder(self.folder / "checkpoints", self.best_step, kind)
        if not folder.is_dir():
            return None
        miou = checkpoints.read_meta(folder)["scores"]["miou"]
        self.log.print(f"{kind}: mIoU {100 * miou:.2f}, before {100 * self._best['miou']:.2f}")
        return miou if miou > self._best["miou"] else None

    def _end_if_stopping(self) -> None:
        if self._stopping:
            self.log.print(f"stopped after step {self.step} of {self.total}; the same command continues the run")
            raise Stopped(128 + self._stopping)

    @property
    def _has_shared_batch_norm(self) -> bool:
        return self.processes > 1 and self.device.type == "cuda"

    def _prepare_layout(self, network: nn.Module) -> nn.Module:
        if self._has_shared_batch_norm:
            network = timm.layers.convert_sync_batchnorm(network)
        # The layout convolutions are fastest in, most of all in half precision.
        return network.to(memory_format=torch.channels_last)

    def _load(self, checkpoint: checkpoints.Checkpoint) -> None:
        parts = self._contents
        try:
            parts.model.load_state_dict(checkpoint.model)
            for name, module in parts.extra.items():
                module.load_state_dict(checkpoint.extra[name])
            parts.optimizer.load_state_dict(checkpoint.state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"checkpoint {checkpoint.path} is of another network: {reason}") from None
        if self.accelerator.scaler is not None and checkpoint.state["scaler"]:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        self.step, self._best = checkpoint.meta["step"], checkpoint.state["best"]
        self._evaluation_pending = checkpoint.state.get("unscored", False)
        self._saved_step = self._loaded_step = self.step
        self._skipped = SkipCounts(**checkpoint.state.get("skipped", {}))

    def _non_finite(self, optimizer: Any, losses: dict[str, torch.Tensor]) -> list[str]:
        """Names of what is not finite on any process; the same answer on all of them."""
        finite = {name: loss.detach().isfinite().all() for name, loss in losses.items()}
        finite["gradient"] = gradients_are_finite(optimizer)
        finite["running statistics"] = self._buffers.are_finite().to(self.device)
        found = self._gloo.gather_ints(*torch.stack(list(finite.values())).int().tolist())
        return [name for name, fine in zip(finite, zip(*found)) if not all(fine)]

    def _count_bad_step(self, wrong: list[str], lr: float) -> None:
        self._skipped.steps_in_a_row += 1
        self._new_skips = (1, self._new_skips[1])
        row, most = self._skipped.steps_in_a_row, self.config.run.max_bad_steps
        images = self._gloo.gather_strings(self._images)
        told = (
            f"step {self.step + 1}: {', '.join(wrong)} not finite, learning rate {lr:.3g}, images {', '.join(images)}"
        )
        if row >= most:
            raise UserError(
                f"{told};\n{row} bad steps in a row (run.max_bad_steps): lower optim.lr or give another run.precision"
            )
        self.log.print(f"warning: {told}; skipped ({row} in a row, {most} end the run)")

    def _save(self, resumable: bool) -> None:
        broken = not_finite(self._contents.model.state_dict())
        if broken:
            raise UserError(
                f"step {self.step}: {broken[0]} of the network is not finite, so nothing is saved over what was;\n"
                "lower optim.lr, or give another run.precision, in another run.dir"
            )
        self._write(resumable)
        self.accelerator.wait_for_everyone()

    def _write(self, resumable: bool = True) -> None:
        if not self.is_main:
            return
        root = self.folder / "checkpoints"
        try:
            self.log.sync()
            self._write_checkpoint(root, resumable)
            if resumable:
                self._saved_step = self.step
                self._point_and_prune(root)
        except OSError as error:
            # A full disk must not end a run of days: it goes on, and the older checkpoint stands.
            self.log.print(f"warning: no checkpoint of step {self.step} ({error.strerror or error}); going on")

    def _tidy(self) -> None:
        """Finish what a kill in the middle of saving left: temporary folders, links of the checkpoint before."""
        root = self.folder / "checkpoints"
        try:
            checkpoints.clean(root)
            if self.step:
                self._point_and_prune(root)
        except OSError as error:
            self.log.print(f"warning: {root} could not be tidied ({error.strerror or error}); going on")

    def _write_checkpoint(self, root: Path, resumable: bool) -> None:
        parts, scaler = self._contents, self.accelerator.scaler
        if not resumable:
            checkpoints.write(root, self._meta(), parts.model.state_dict())
            return
        extra = {name: module.state_dict() for name, module in parts.extra.items()}
        state = {
            "optimizer": parts.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "best": self._best,
            "unscored": self._evaluation_pending,
            "skipped": asdict(self._skipped),
        }
        checkpoints.write(root, self._meta(), parts.model.state_dict(), extra, state)

    def _is_snapshot(self, step: int) -> bool:
        run = self.config.run
        first = run.snapshot_from or run.snapshot_every
        return run.snapshot_every > 0 and step >= first and (step - first) % run.snapshot_every == 0

    def _point_and_prune(self, root: Path) -> None:
        checkpoints.point(root, "last", self.step)
        if self._best and self._best["step"] == self.step:
            checkpoints.point(root, "best", self.step)
        checkpoints.prune(root, self.config.run.keep, self._is_snapshot)

    def _meta(self) -> dict[str, Any]:
        text = json.dumps(to_dict(self.config), sort_keys=True)
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch if self.config.run.epochs else None,
            "scores": {"miou": self._scores.miou} if self._scores else None,
            "script": self.script,
            "config_hash": f"{zlib.crc32(text.encode()):08x}",
            "versions": {"torch": torch.__version__, "accelerate": accelerate.__version__, "timm": timm.__version__},
        }

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._signal_time = number, now
        elif now - self._signal_time > REPEAT_SECONDS:
            os._exit(128 + number)
