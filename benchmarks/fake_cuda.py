"""Training as on a GPU, on a machine without one: tensors with shapes and a device of `cuda`, but without values.

    with FakeCuda() as fake:
        prcl.train.main([...])
    fake.waits, fake.peak

PyTorch's `FakeTensorMode` computes shape, type and device of every result, and fails where an operation meets two
devices. This module adds what a run needs around it: networks that move to the device, batches made outside the mode,
a backward pass that calls the graph's functions one by one (autograd's own engine needs a driver), and checkpoints that
are not written. Every value that the CPU reads is given as 1, and noted with the place in the code that waits for it.
"""

import heapq
import itertools
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import sgd
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.data import DataLoader
from torch.utils.weak import WeakIdKeyDictionary

from common.augment.photometric import hue_constants
from common.engine import checkpoint_files, devices
from common.engine.run import Run
from common.images import imagenet_statistics

ROOT = Path(__file__).parent.parent
CUDA = torch.device("cuda", 0)
BLOCK_BYTES = 512  # CUDA's allocator rounds up to blocks of this size
MIB = 2**20
ops = torch.ops.aten
# Places that read another value than 1: no process failed, and none was stopped.
GIVEN = {"common/evaluation/evaluate.py evaluate": 0}
COPIES = (ops._to_copy.default, ops.copy_.default)


@dataclass(frozen=True)
class Wait:
    """A place where the CPU waits for the device.

    Attributes:
        place: Function of the project's code, e.g. `common/engine/finite.py find_non_finite`.
        operation: What waits, e.g. `aten._local_scalar_dense.default`.
        phase: `step`, `log` (a step whose losses are logged), or `between` steps.
    """

    place: str
    operation: str
    phase: str


class Memory:
    """Bytes of all live storages on one kind of device, in the blocks in which CUDA allocates them.

    Args:
        device: Type of the device.

    Attributes:
        now: Bytes now.
        peaks: Most bytes so far, by `Wait.phase`.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.now = 0
        self.peaks: Counter[str] = Counter()
        self._device = device
        self._live: set[int] = set()

    def see(self, tensor: Tensor, phase: str) -> None:
        """Count the storage of a tensor, if it is on the device, until it is freed."""
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live:
            size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
            self._live.add(storage._cdata)
            self.now += size
            weakref.finalize(storage, self._free, storage._cdata, size).atexit = False
        self.peaks[phase] = max(self.peaks[phase], self.now)

    def _free(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.now -= size


class Watch(TorchDispatchMode):
    """See every operation: count memory, and note what waits for the device.

    Args:
        memory: Counts the storages.

    Attributes:
        phase: See `Wait`.
        waits: What waited so far.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory, self.phase = memory, "between"
        self.waits: list[Wait] = []
        self.pinned = WeakIdKeyDictionary()  # tensors in page-locked memory, as keys

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is ops._local_scalar_dense.default and getattr(args[0], "constant", None) is None:
            self.note(args[0], function)
            return given(args[0])
        if function is ops.nonzero.default:
            self.note(args[0], function)
            return self._seen(args[0].new_empty(half(args[0]), args[0].dim(), dtype=torch.int64))
        if function is ops.index.Tensor and any(map(is_mask, args[1])):
            self.note(args[0], function)
            rows = [masked_rows(part) if is_mask(part) else [part] for part in args[1]]
            return self._seen(function(args[0], list(itertools.chain(*rows))))
        if function is ops.index_put_.default and any(map(is_mask, args[1])) and args[2].numel() > 1:
            self.note(args[0], function)
        if function is ops.equal.default:
            self.note(args[0], function)
            return True
        result = function(*args, **kwargs)
        if function in COPIES:
            self._check_copy(function, args, kwargs, result)
        for tensor in flat(result):
            self._seen(tensor)
        return result

    def note(self, tensor: Tensor, operation: Any) -> None:
        """Note that the CPU waits for a tensor, if that is on the device."""
        if tensor.device.type == "cuda":
            self.waits.append(Wait(place(), str(operation), self.phase))

    def _seen(self, tensor: Tensor) -> Tensor:
        self.memory.see(tensor, self.phase)
        return tensor

    def _check_copy(self, function: Any, args: tuple, kwargs: dict[str, Any], result: Tensor) -> None:
        """A copy between host and device waits, unless it is asynchronous and from page-locked memory."""
        source = args[1] if function is ops.copy_.default else args[0]
        asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2])
        if source.device.type == result.device.type or (asynchronous and source in self.pinned):
            return
        self.note(source if source.device.type == "cuda" else result, function)


class Saved:
    """A tensor kept for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class Graph:
    """Backward passes without autograd's engine: the functions of the graph are called in the engine's order."""

    def __init__(self) -> None:
        self._used: list[Saved] = []
        self._passes = itertools.count()

    def keep_saved(self) -> saved_tensors_hooks:
        """Context in which tensors are kept for `backward`, which frees each once it is used."""
        return saved_tensors_hooks(Saved, self._unpack)

    def _unpack(self, saved: Saved) -> Tensor:
        self._used.append(saved)
        return saved.tensor

    @torch.no_grad()
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` [] to all parameters that it depends on."""
        missing = dependencies(loss.grad_fn)
        gradients: dict[Any, list[Tensor | None]] = defaultdict(list)
        gradients[loss.grad_fn] = [torch.ones_like(loss)]
        ready, order = [(0, 0, loss.grad_fn)], itertools.count(1)
        # Recomputed activations belong to the pass with this number.
        number = next(self._passes)
        with patch("torch._C._current_graph_task_id", lambda: number):
            while ready:
                node = heapq.heappop(ready)[2]
                for following in self._hand_on(node, self._call(node, gradients.pop(node)), gradients):
                    missing[following] -= 1
                    if not missing[following]:
                        # Gradients of parameters are added at once, as the engine does.
                        urgency = -sys.maxsize if hasattr(following, "variable") else -following._sequence_nr()
                        heapq.heappush(ready, (urgency, next(order), following))

    def _hand_on(self, node: Any, results: Sequence[Tensor | None], gradients: dict[Any, list]) -> list[Any]:
        """Add the results of a function to the gradients of those that follow, and return these."""
        found = []
        for (following, slot), result in zip(node.next_functions, results):
            if following is None:
                continue
            found.append(following)
            held = gradients[following]
            held += [None] * (slot + 1 - len(held))
            if result is None:
                continue
            expected = following._input_metadata[slot]
            if result.device != expected.device:
                raise RuntimeError(f"{node} returns a gradient on {result.device} for {expected.device}")
            # Operands that were broadcast, or converted, get a gradient of their own form.
            result = result.sum_to_size(expected.shape).to(expected.dtype)
            held[slot] = result if held[slot] is None else held[slot] + result
        return found

    def _call(self, node: Any, gradients: list[Tensor | None]) -> Sequence[Tensor | None]:
        if all(gradient is None for gradient in gradients):
            return [None] * len(node.next_functions)
        self._used.clear()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            shapes = [(entry.shape, entry.dtype) for entry in node._input_metadata]
            gradients = gradients + [None] * (len(shapes) - len(gradients))
            full = [
                torch.zeros(shape, dtype=dtype, device=CUDA) if gradient is None else gradient
                for gradient, (shape, dtype) in zip(gradients, shapes)
            ]
            results = node.apply(*full)
        else:
            gradients = gradients + [None] * (len(node._input_metadata) - len(gradients))
            results = node(*gradients)
        for saved in self._used:
            saved.tensor = None
        self._used.clear()
        return results if isinstance(results, tuple) else (results,)


class FakeCuda(ExitStack):
    """Context in which a training script runs on a fake GPU, to be called through its `main`.

    Attributes:
        memory: Bytes on the device.
        logged: Values given to the log, one dictionary per step.
        saved: Tensors that checkpoints would have stored.
        waits: What made the CPU wait for the device.
        optimizers: The optimizers of the runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory()
        self.logged: list[dict[str, Any]] = []
        self.saved: list[Tensor] = []
        self._watch, self._graph = Watch(self.memory), Graph()
        self.waits = self._watch.waits
        self.optimizers: list[torch.optim.Optimizer] = []
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._moved = WeakIdKeyDictionary()  # parameters on the CPU -> those on the device

    def __enter__(self) -> "FakeCuda":
        super().__enter__()
        for cached in (imagenet_statistics, hue_constants):
            cached.cache_clear()
            self.callback(cached.cache_clear)  # fake tensors are of no use outside
        for target, name, new in (
            (devices, "Accelerator", self._accelerator),
            (Accelerator, "backward", lambda accelerator, loss: self._backward(accelerator, loss)),
            (Accelerator, "prepare", self._prepare(Accelerator.prepare)),
            (nn.Module, "to", lambda module, *args, **kwargs: self._to(module, *args, **kwargs)),
            (DataLoader, "__iter__", self._batches(DataLoader.__iter__)),
            (Run, "steps", self._steps(Run.steps)),
            (Run, "finish_step", self._finish_step(Run.finish_step)),
            (checkpoint_files, "write", self._write),
            (checkpoint_files, "point", lambda *_: None),
            (checkpoint_files, "prune", lambda *_: None),
            (FakeTensor, "numpy", lambda tensor: self._numpy(tensor)),
            (FakeTensor, "__deepcopy__", copied),
            (FakeTensor, "tolist", lambda tensor: self._numpy(tensor).tolist()),
            (Tensor, "pin_memory", lambda tensor: self._pinned(tensor)),
            (F, "scaled_dot_product_attention", attention),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda: True),
            # As for real tensors on a GPU.
            (sgd, "_default_to_fused_or_foreach", lambda *_, **__: (False, True)),
        ):
            self.enter_context(patch.object(target, name, new, create=name == "__deepcopy__"))
        for context in (self._mode, self._watch, self._graph.keep_saved()):
            self.enter_context(context)
        return self

    def _accelerator(self, **kwargs: Any) -> Accelerator:
        accelerator = Accelerator(**kwargs)
        for state in (AcceleratorState, PartialState):
            state._shared_state["device"] = CUDA
        return accelerator

    def _backward(self, accelerator: Accelerator, loss: Tensor) -> None:
        self._graph.backward(loss / accelerator.gradient_accumulation_steps)

    def _numpy(self, tensor: Tensor) -> np.ndarray:
        self._watch.note(tensor, "numpy")
        return np.full(tensor.shape, given(tensor), str(tensor.dtype).removeprefix("torch."))

    def _pinned(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self._watch.pinned[copy] = True
        return copy

    def _to(
        self, module: nn.Module, device: torch.device | None = None, memory_format: Any = torch.preserve_format
    ) -> nn.Module:
        """`Module.to`, which cannot change fake parameters: it replaces them."""

        def moved(tensor: Tensor) -> Tensor:
            fits = tensor.dim() == 4 or memory_format == torch.preserve_format
            layout = memory_format if fits else torch.preserve_format
            return tensor.to(device or tensor.device, memory_format=layout)

        for part in module.modules():
            for name, old in part._parameters.items():
                if old is not None and old not in self._moved:
                    new = moved(value := old.detach())
                    if new is value:
                        continue
                    self._moved[old] = nn.Parameter(new, old.requires_grad)
                part._parameters[name] = self._moved.get(old) if old is not None else None
            for name, old in part._buffers.items():
                part._buffers[name] = old if old is None else moved(old)
        return module

    def _newest(self, parameter: nn.Parameter) -> nn.Parameter:
        while parameter in self._moved:
            parameter = self._moved[parameter]
        return parameter

    def _prepare(self, prepare: Callable[..., tuple]) -> Callable[..., tuple]:
        """`Accelerator.prepare`, after which the optimizer has the parameters on the device."""

        def prepared(accelerator: Accelerator, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
            network.to(CUDA)
            for group in optimizer.param_groups:
                group["params"] = [self._newest(parameter) for parameter in group["params"]]
            self.optimizers.append(optimizer)
            return prepare(accelerator, network, optimizer)

        return prepared

    def _batches(self, begin: Callable[[DataLoader], Iterator[Any]]) -> Callable[[DataLoader], Iterator[Any]]:
        """Batches that are made outside the mode."""

        def batches(loader: DataLoader) -> Iterator[Any]:
            with outside():
                iterator = begin(loader)
            while True:
                with outside():
                    batch = next(iterator, None)
                if batch is None:
                    return
                yield self._fake(batch, loader.pin_memory)

        return batches

    def _fake(self, batch: Any, pinned: bool) -> Any:
        """The batch with a fake tensor on the CPU for every tensor."""
        if isinstance(batch, Tensor):
            fake = self._mode.from_tensor(batch)
            return self._pinned(fake) if pinned else fake
        if isinstance(batch, tuple):
            return tuple(self._fake(part, pinned) for part in batch)
        if is_dataclass(batch):
            return replace(batch, **{one.name: self._fake(getattr(batch, one.name), pinned) for one in fields(batch)})
        return batch

    def _steps(self, begin: Callable[[Run], Iterator[int]]) -> Callable[[Run], Iterator[int]]:
        def steps(run: Run) -> Iterator[int]:
            for step in begin(run):
                self._watch.phase = "step"
                yield step
                self._watch.phase = "between"

        return steps

    def _finish_step(self, finish: Callable[..., dict[str, float]]) -> Callable[..., dict[str, float]]:
        def finish_step(run: Run, values: dict[str, Any], images: int) -> dict[str, float]:
            self.logged.append(values)
            if (run.step + 1) % run.config.run.log_every == 0 or run.step + 1 == run.total:
                self._watch.phase = "log"
            logged = finish(run, values, images)
            self._watch.phase = "between"
            return logged

        return finish_step

    def _write(
        self, root: Path, meta: dict[str, Any], model: dict[str, Tensor], extra: Any = None, *_: Any, **__: Any
    ) -> Path:
        self.saved += [*model.values(), *(tensor for state in (extra or {}).values() for tensor in state.values())]
        return root


@contextmanager
def outside() -> Iterator[None]:
    """Context with real tensors."""
    with _disable_current_modes():
        yield


def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` of a fake tensor."""
    copy = tensor.detach().clone()
    memo[id(tensor)] = copy = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return copy


def attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """Attention by one of the kernels of a GPU; the choice among them asks the driver, and all need as much memory."""
    kept = torch.is_grad_enabled() and query.requires_grad
    return ops._scaled_dot_product_efficient_attention(query, key, value, None, kept)[0]


def dependencies(root: Any) -> Counter:
    """Number of gradients that each function of a graph waits for."""
    found, seen, stack = Counter(), {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            found[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return found


def given(tensor: Tensor) -> bool | int | float:
    """The value that is read from every element of a tensor."""
    value = GIVEN.get(place(), 1)
    return bool(value) if tensor.dtype == torch.bool else float(value) if tensor.is_floating_point() else value


def half(tensor: Tensor) -> int:
    """Number of elements that are taken to be True or not 0, where a size depends on values."""
    return (tensor.numel() + 1) // 2


def is_mask(part: Any) -> bool:
    """True for a mask among the parts of an index."""
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)


def masked_rows(mask: Tensor) -> list[Tensor]:
    """Numbers of the elements that a mask selects, one tensor per dimension."""
    return [mask.new_empty(half(mask), dtype=torch.int64) for _ in range(mask.dim())]


def flat(result: Any) -> Iterator[Tensor]:
    """All tensors in the result of an operation."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from flat(part)


def place() -> str:
    """File and function of the project, outside this file, that runs the current operation."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)} {frame.f_code.co_qualname.split('.<locals>')[0]}"
        frame = frame.f_back
    return "elsewhere"
