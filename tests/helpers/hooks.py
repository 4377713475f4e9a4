"""Hooks for runs in child processes: what a run saw and holds, and mishaps at a chosen step."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer

import common.evaluation.batches
import common.evaluation.evaluate
from common.engine.run import Run


def record(folder: Path) -> None:
    """Write what each process sees to `folder`/<processes>_<rank>.pt, and what its modules hold in the end.

    `batches`: (names, images) as loaded; `inputs`: what the trained network is given; `end`: all tensors.
    """
    seen: dict[str, list] = {"batches": [], "inputs": []}

    def register_batch(run: Run, batch) -> None:
        checked(run, batch)
        seen["batches"].append((batch.names, batch.image.clone()))

    def given(network, inputs) -> None:
        if network.training:
            # Some networks are given their images by name, and nothing in place of labels at first.
            leaves = [values.values() if isinstance(values, dict) else values for values in inputs]
            leaves = [[values] if values is None or torch.is_tensor(values) else values for values in leaves]
            seen["inputs"].append([tensor.clone() for tensors in leaves for tensor in tensors if tensor is not None])

    def prepare(run: Run, network, optimizer):
        network.register_forward_pre_hook(given)
        return prepared(run, network, optimizer)

    def finish(run: Run, *kind: str) -> None:
        end = {
            f"{number}.{name}": tensor.clone()
            for number, module in enumerate(run.checkpointer.contents.modules())
            for name, tensor in module.state_dict().items()
        }
        torch.save(seen | {"end": end}, folder / f"{run.processes}_{run.rank}.pt")
        finished(run, *kind)

    checked, prepared, finished = Run.register_batch, Run.prepare, Run.finish
    Run.register_batch, Run.prepare, Run.finish = register_batch, prepare, finish


def spoil_gradient(step: int) -> None:
    """Let this process's gradient of one step be NaN, after a forward that is as always."""

    def backward(run: Run, loss: torch.Tensor) -> None:
        done(run, loss * float("nan") if run.step == step else loss)

    done, Run.backward = Run.backward, backward


def scale_gradients() -> None:
    """Let gradients be scaled as for fp16 on a GPU."""

    def prepare(run: Run, network, optimizer):
        wrapped, optimizer = prepared(run, network, optimizer)
        run.accelerator.scaler = torch.amp.GradScaler("cpu")
        return wrapped, AcceleratedOptimizer(optimizer.optimizer, scaler=run.accelerator.scaler)

    prepared, Run.prepare = Run.prepare, prepare


def spoil_files(step: int, paths: list[Path]) -> None:
    """Truncate files after a step."""

    def finish_step(run: Run, *arguments, **named) -> None:
        finished(run, *arguments, **named)
        if run.step == step:
            for path in paths:
                path.write_bytes(path.read_bytes()[:50])

    finished, Run.finish_step = Run.finish_step, finish_step


def stop_in_evaluation() -> None:
    """Get SIGTERM at the first batch of the first evaluation."""

    def predict(*arguments):
        common.evaluation.evaluate.sum_logits = predicted
        os.kill(os.getpid(), signal.SIGTERM)
        return predicted(*arguments)

    common.evaluation.batches.MAX_BATCH_PIXELS = 1  # batches of one image: there is a next one
    predicted, common.evaluation.evaluate.sum_logits = common.evaluation.evaluate.sum_logits, predict


def both(*hooks: Callable[[], None]) -> None:
    """Several hooks in one."""
    for hook in hooks:
        hook()
