"""The checkpoints of one run: when to save, what to store, which ones to keep, and where to resume."""

import json
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate import Accelerator
from torch import nn

from common.config import to_dict
from common.engine import checkpoint_files
from common.engine.finite import non_finite_tensors
from common.engine.gloo import GlooGroup
from common.engine.log import RunLog
from common.engine.progress import Progress, RunLength
from common.errors import UserError
from common.metrics import Scores

SIGNS = "signs"  # name of the counts among the extra modules


@dataclass(frozen=True)
class CheckpointContents:
    """The objects whose state a checkpoint stores.

    Attributes:
        model: The evaluated network.
        extra: Other modules (student, heads, banks) by their name in the file.
        optimizer: The optimizer that `Run.prepare` returned.
    """

    model: nn.Module
    extra: dict[str, nn.Module]
    optimizer: Any

    def modules(self) -> list[nn.Module]:
        """The model and the extra modules."""
        return [self.model, *self.extra.values()]


class Checkpointer:
    """Saves and resumes a run; the files themselves are written and read by `common.engine.checkpoint_files`.

    The main process writes. Every process must call the public methods, except `link_best` and `require_last`.

    Args:
        contents: The objects to store.
        progress: The run's position, stored too.
        length: Number of steps of the run and between checkpoints.
        config: The script's config.
        script: Name of the script.
        accelerator: The run's Accelerator.
        gloo: Connects the processes.
        log: Prints messages.
    """

    def __init__(
        self,
        contents: CheckpointContents,
        progress: Progress,
        length: RunLength,
        config: Any,
        script: str,
        accelerator: Accelerator,
        gloo: GlooGroup,
        log: RunLog,
    ) -> None:
        self.contents = contents
        self._progress, self._length, self._config, self._script = progress, length, config, script
        self._accelerator, self._gloo, self._log = accelerator, gloo, log
        self._folder = Path(config.run.dir)
        self._root = self._folder / "checkpoints"
        self._saved_step = self._loaded_step = 0

    # Resuming

    def resume(self) -> None:
        """Load the newest intact checkpoint, if there is one.

        Raises:
            UserError: every checkpoint is damaged, the newest one belongs to another network, or the processes found
                different ones.
        """
        if self._accelerator.is_main_process:
            checkpoint_files.restore(self._root)
        self._accelerator.wait_for_everyone()
        damaged = False
        for checkpoint in checkpoint_files.newest(self._root):
            if isinstance(checkpoint, str):
                damaged = True
                self._log.print(f"warning: {checkpoint}; trying the previous one")
                continue
            self._load(checkpoint)
            self._log.print(f"continuing {self._folder} after step {self._progress.step} of {self._length.total}")
            break
        if damaged and not self._progress.step:
            raise UserError(f"{self._folder} contains no intact checkpoint; move it away to start from the beginning")
        if len({step for (step,) in self._gloo.gather_ints(self._progress.step)}) > 1:
            raise UserError(
                f"the processes found different checkpoints: {self._folder} must be on a disk that all of them share"
            )

    def tidy(self) -> None:
        """Finish what a kill during saving left undone: delete temporary folders, update links, prune."""
        if not self._accelerator.is_main_process:
            return
        try:
            checkpoint_files.clean(self._root)
            if self._progress.step:
                self._link_and_prune()
        except OSError as error:
            self._log.print(f"warning: {self._root} could not be tidied ({error.strerror or error}); going on")

    @property
    def best_step(self) -> int:
        """Step of the best evaluation so far; 0 before the first."""
        return self._progress.best["step"] if self._progress.best else 0

    def read_best(self) -> checkpoint_files.Checkpoint | None:
        """Read the checkpoint of the best evaluation; None, on all processes, where one of them cannot read it."""
        found = None
        if self._progress.best:
            with suppress(UserError):
                found = checkpoint_files.read(self._best_folder())
        return found if self._all_processes(found is not None) else None

    # Saving

    def save_if_due(self, stopping: bool) -> None:
        """Write a checkpoint if one is due: by cadence, for a new best, for the last step, or because the run stops.

        Raises:
            UserError: the network is not finite.
        """
        step = self._progress.step
        if self.is_due(stopping):
            self._save(resumable=True)
        elif self._is_snapshot(step) and step != self._loaded_step:  # the loaded checkpoint stays resumable
            self._save(resumable=False)

    def is_due(self, stopping: bool) -> bool:
        """True if `save_if_due` will write a checkpoint that a run resumes from; the same on all processes."""
        step = self._progress.step
        is_regular = step % self._length.save_every == 0 or step == self._length.total
        return is_regular or self._progress.is_best or stopping

    def save_before_error(self) -> None:
        """Write a resumable checkpoint after the last complete step, unless there is one."""
        if self._saved_step != self._progress.step:
            self._write(resumable=True)
        # The first process to end takes the others down, even one that is still writing.
        self._accelerator.wait_for_everyone()

    def has_variant(self, name: str) -> bool:
        """True, on all processes, if `save_variant` has written weights of this name."""
        return self._all_processes(self._best_folder(name).is_dir())

    def save_variant(self, name: str, network: nn.Module, scores: Scores) -> None:
        """Write weights derived from the best ones to `checkpoints/<name>_<step of the best>`."""
        if self._accelerator.is_main_process:
            meta = self._meta() | {"step": self._progress.best["step"], "scores": {"miou": scores.miou}}
            try:
                checkpoint_files.write(self._root, meta, network.state_dict(), prefix=name)
            except OSError as error:
                self._log.print(f"warning: {name} weights could not be written ({error.strerror or error}); going on")
        self._accelerator.wait_for_everyone()

    # The end of a run

    def link_best(self, variant: str | None) -> None:
        """Print the best mIoU; link `best` to the variant of these weights if its mIoU is higher."""
        if not self._progress.best:
            return
        step, miou, chosen = self._progress.best["step"], self._progress.best["miou"], ""
        if variant and self._best_folder(variant).is_dir():
            variant_miou = checkpoint_files.read_meta(self._best_folder(variant))["scores"]["miou"]
            self._log.print(f"{variant}: mIoU {100 * variant_miou:.2f}, before {100 * miou:.2f}")
            if variant_miou > miou:
                with suppress(OSError):  # on a full disk the variant stays available under its own name
                    checkpoint_files.point(self._root, "best", step, variant)
                miou, chosen = variant_miou, f", {variant}"
        self._log.print(f"best mIoU {100 * miou:.2f} after step {step}{chosen} (chosen on the valid list)")

    def require_last(self) -> None:
        """Make sure that the last step has a checkpoint.

        Raises:
            UserError: it could not be written.
        """
        if self._saved_step < self._progress.step:
            raise UserError(
                f"no checkpoint of the last step, {self._progress.step}, could be written to {self._root}: "
                f"free disk space and repeat the command; it continues after step {self._saved_step}"
            )

    # Inside

    def _load(self, checkpoint: checkpoint_files.Checkpoint) -> None:
        contents, scaler = self.contents, self._accelerator.scaler
        try:
            contents.model.load_state_dict(checkpoint.model)
            for name, module in contents.extra.items():
                if name != SIGNS or name in checkpoint.extra:  # older checkpoints have no counts
                    module.load_state_dict(checkpoint.extra[name])
            contents.optimizer.load_state_dict(checkpoint.state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"checkpoint {checkpoint.path} is of another network: {reason}; set another run.dir"
            ) from None
        if scaler is not None and checkpoint.state["scaler"]:
            scaler.load_state_dict(checkpoint.state["scaler"])
        self._progress.load_state_dict(checkpoint.meta["step"], checkpoint.state)
        self._saved_step = self._loaded_step = self._progress.step

    def _save(self, resumable: bool) -> None:
        broken = non_finite_tensors(self.contents.model.state_dict())
        if broken:
            raise UserError(
                f"step {self._progress.step}: {broken[0]} of the network is not finite, so nothing is saved and older "
                "checkpoints stay;\nset another run.dir and lower optim.lr or choose another run.precision"
            )
        self._write(resumable)
        self._accelerator.wait_for_everyone()

    def _write(self, resumable: bool) -> None:
        if not self._accelerator.is_main_process:
            return
        try:
            self._log.sync()
            self._write_files(resumable)
            if resumable:
                self._saved_step = self._progress.step
                self._link_and_prune()
        except OSError as error:
            # A full disk must not end a run of days: it goes on, and the older checkpoint stays.
            step = self._progress.step
            self._log.print(f"warning: no checkpoint of step {step} ({error.strerror or error}); going on")

    def _write_files(self, resumable: bool) -> None:
        contents, scaler = self.contents, self._accelerator.scaler
        if not resumable:
            checkpoint_files.write(self._root, self._meta(), contents.model.state_dict())
            return
        extra = {name: module.state_dict() for name, module in contents.extra.items()}
        state = {
            "optimizer": contents.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        state |= self._progress.state_dict()
        checkpoint_files.write(self._root, self._meta(), contents.model.state_dict(), extra, state)

    def _meta(self) -> dict[str, Any]:
        progress, text = self._progress, json.dumps(to_dict(self._config), sort_keys=True)
        return {
            "step": progress.step,
            "epoch": progress.step / self._length.steps_per_epoch if self._config.run.epochs else None,
            "scores": {"miou": progress.scores.miou} if progress.scores else None,
            "script": self._script,
            "config_hash": f"{zlib.crc32(text.encode()):08x}",
            "versions": {"torch": torch.__version__, "accelerate": accelerate.__version__, "timm": timm.__version__},
        }

    def _link_and_prune(self) -> None:
        checkpoint_files.point(self._root, "last", self._progress.step)
        if self._progress.is_best:
            checkpoint_files.point(self._root, "best", self._progress.step)
        checkpoint_files.prune(self._root, self._config.run.keep, self._is_snapshot)

    def _is_snapshot(self, step: int) -> bool:
        run = self._config.run
        first = run.snapshot_from or run.snapshot_every
        return run.snapshot_every > 0 and step >= first and (step - first) % run.snapshot_every == 0

    def _best_folder(self, variant: str = "step") -> Path:
        """Folder of the best checkpoint, or of a variant of it; of step 0, which does not exist, before any."""
        return checkpoint_files.step_folder(self._root, self.best_step, variant)

    def _all_processes(self, answer: bool) -> bool:
        return all(others for (others,) in self._gloo.gather_ints(int(answer)))
