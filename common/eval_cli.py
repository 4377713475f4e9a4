"""The command line of every paper's `eval.py`: checkpoints of a run, on given devices, by a given protocol."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.config import load_config
from common.datasets import open_source
from common.datasets.source import Source
from common.datasets.splits import read_split
from common.errors import UserError, told
from common.evaluation import evaluate, sample_predictions
from common.inference import MeanOfNetworks, Protocol
from common.metrics import Scores
from common.models import build_network
from common.models.weights import load_state, read_state
from common.targets import Target, find_run, find_targets
from common.visual import Sample, compare, save_label

State = dict[str, Tensor]


@told
def main_eval(
    paper: str,
    config_class: type,
    argv: Sequence[str] | None = None,
    protocol_of: Callable[[Any], Protocol] | None = None,
    second: str | None = None,
    from_published: Callable[[State, int], State] | None = None,
) -> None:
    """Evaluate checkpoints of a run of `paper`, print the scores and write them to RUN/eval/<which>.json.

    Args:
        paper: Folder of the paper; its runs lie below runs/<paper>.
        config_class: The `Config` of its train.py.
        argv: Arguments; by default those of the process.
        protocol_of: The paper's protocol for a config; by default whole images.
        second: Name of a second network in the checkpoints of a paper that trains two; it may be chosen.
        from_published: Turns weights as the paper's release has them, of network 1 or 2, into ours.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(paper, second is not None).parse_args(argv)
    run = find_run(paper, args.run, args.which)
    _check_paper(paper, run)
    config = load_config(config_class, run / "config.json")
    protocol = _protocol(args, protocol_of(config) if protocol_of else Protocol())
    accelerator = _accelerator(args.devices, config.run.precision, argv)
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    targets, notes = find_targets(run, args.which, by_epoch=config.run.epochs is not None)
    data = load_config(config_class, args.config).data if args.config else config.data
    # The built-in data are made on first use: by one process.
    with accelerator.main_process_first():
        source = open_source(data)
    if len(source.classes) != config.model.num_classes:
        raise UserError(
            f"the network of {run} has {config.model.num_classes} classes, "
            f"but {data.dataset} in {data.root} has {len(source.classes)}; give a --config with the same classes"
        )
    names = read_split(data.split, data.allow_overlap, data.dataset, data.root).valid
    console.print(f"run {run}" + ("" if args.run else f" (the newest of {paper})"))
    console.print(f"{len(names)} images of {data.split}, {accelerator.num_processes} process(es), {accelerator.device}")
    for note in notes:
        console.print(f"note: {note}")

    # The weights come from the checkpoint: ImageNet's are neither needed nor downloaded.
    numbers = {"1": (1,), "2": (2,), "both": (1, 2)}[args.network]
    networks = [build_network(replace(config.model, pretrained=False)).to(accelerator.device) for _ in numbers]
    network = networks[0] if len(networks) == 1 else MeanOfNetworks(networks)
    results = []
    for target in targets:
        for one, number in zip(networks, numbers):
            state = _read_network(target.file, number, second, from_published)
            load_state(one, state, str(target.file), f"the network of {run / 'config.json'}")
        classes, workers = source.classes, data.workers
        scores = evaluate(network, source, names, len(classes), accelerator, protocol, workers=workers, bar=True)
        results.append(scores)
        console.print(_class_table(target, scores, classes, protocol, args.network))
        if accelerator.is_main_process:
            _write_scores(run, target, scores, classes, protocol, args.config, args.network)
        if args.save_pictures:
            mine = names[accelerator.process_index :: accelerator.num_processes]
            samples = sample_predictions(network, source, mine, protocol, accelerator.device)
            _write_pictures(run / "eval" / "pictures" / _file_name(target, protocol, args.network), samples, source)
    if len(targets) > 1:
        console.print(_summary(targets, results))
    console.print(f"written to {run / 'eval'}")
    accelerator.end_training()


def _check_paper(paper: str, run: Path) -> None:
    """Refuse a run of another paper by name, rather than by the first key of its config that is not ours."""
    try:
        script = json.loads((run / "run.json").read_text())["script"]
    except (OSError, ValueError, KeyError):
        return  # copied without it; the config decides
    if script.split("/")[0] != paper:
        raise UserError(f"{run} is a run of {script}: evaluate it with {script.split('/')[0]}/eval.py")


def parse_devices(text: str, count: int) -> list[int]:
    """The GPUs that `-d` names, ascending; none for `cpu`.

    Args:
        text: `cpu`, `*`, or numbers and ranges such as `0`, `0,1` or `0-3`.
        count: How many GPUs there are.

    Raises:
        UserError: a GPU that is not there, or anything else.
    """
    if text == "cpu":
        return []
    if not re.fullmatch(r"\*|\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"-d {text} is not understood; give cpu, 0, 0,1, 0-3 or *")
    if count == 0:
        raise UserError(f"-d {text}: there is no GPU here; use -d cpu")
    parts = [f"0-{count - 1}"] if text == "*" else text.split(",")
    spans = [range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1) for part in parts]
    if not all(span and span[-1] < count for span in spans):
        raise UserError(f"-d {text} names no device that is here; there are {count}, numbered from 0")
    return sorted(set().union(*spans))


def _protocol(args: argparse.Namespace, usual: Protocol) -> Protocol:
    """The paper's protocol with what the command line changes."""
    if args.sliding is not None:
        usual = Protocol(crop=(args.sliding, args.sliding))
    elif args.whole:
        usual = replace(usual, crop=None)
    return replace(usual, scales=tuple(args.scales), flip=args.flip)


def _read_network(
    file: Path, number: int, second: str | None, from_published: Callable[[State, int], State] | None
) -> State:
    """Weights of network 1 or 2 of a checkpoint, with our keys.

    Raises:
        UserError: the checkpoint has no second network.
    """
    if number == 2 and file.name == "model.safetensors":
        extra = file.with_name("extra.safetensors")
        state = read_state(extra) if extra.is_file() else {}
        own = {key.removeprefix(f"{second}/"): value for key, value in state.items() if key.startswith(f"{second}/")}
        if not own:
            raise UserError(f"{file.parent} holds no second network; evaluate it with --network 1")
        return own
    state = read_state(file)
    is_ours = any(key.startswith("low.") for key in state)
    return state if is_ours or from_published is None else from_published(state, number)


def _parser(paper: str, two_networks: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{paper}/eval.py", description="Evaluate checkpoints on the validation images.", allow_abbrev=False
    )
    parser.add_argument("run", nargs="?", type=Path, help=f"run folder; by default the newest below runs/{paper}")
    parser.add_argument(
        "-e",
        dest="which",
        help="best, last, a number N, a range A-B or A- (0-based epochs where the config counts epochs, else steps; "
        "step:N and step:A-B are always steps), or a weight file; by default best, else last",
    )
    parser.add_argument("-d", "--devices", help="cpu, 0, 0,1, 0-3 or * (all GPUs); by default one GPU, else the CPU")
    parser.add_argument("-s", "--save-pictures", action="store_true", help="write a picture of every prediction")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="scales whose predictions are averaged")
    parser.add_argument("--flip", action="store_true", help="average with the prediction of the mirrored image")
    area = parser.add_mutually_exclusive_group()
    area.add_argument("--sliding", type=int, metavar="CROP", help="slide a window of this side")
    area.add_argument("--whole", action="store_true", help="whole images, where the paper slides a window")
    if two_networks:
        parser.add_argument("--network", choices=("1", "2", "both"), default="1", help="both: the mean of their logits")
    else:
        parser.set_defaults(network="1")
    parser.add_argument("--config", metavar="FILE", help="evaluate on the data section of this config")
    return parser


def _accelerator(devices: str | None, precision: str | None, argv: list[str]) -> Accelerator:
    """The Accelerator of the asked devices; several GPUs replace this process by `accelerate launch`.

    The run's precision is kept, so that scores are those seen in training; a CPU takes fp32 for fp16.
    """
    on_cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if devices is not None:
        gpus = parse_devices(devices, torch.cuda.device_count())
        if gpus and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("-d is for a plain start; this one was launched with its processes: leave -d away")
        if len(gpus) > 1:
            command = launch_command(gpus, argv)
            os.execv(command[0], command)
        if gpus:
            torch.cuda.set_device(gpus[0])
        on_cpu = not gpus
    mixed = "no" if precision in (None, "fp32") or (on_cpu and precision == "fp16") else precision
    # Processes that finish early wait for the slowest one, which may take longer than the 10 minutes of the default.
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[timeout])


def launch_command(gpus: list[int], argv: list[str]) -> list[str]:
    """This very command, without `-d`, with a process on each of `gpus`."""
    devices = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    devices.add_argument("-d", "--devices")
    _, rest = devices.parse_known_args(argv)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # --gpu_ids replaces CUDA_VISIBLE_DEVICES: where that is set, our numbers count within it.
    ids = [visible.split(",")[gpu] if visible else str(gpu) for gpu in gpus]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    # Port 0 takes a free one: the default may belong to a training that still runs.
    launch += ["--num_processes", str(len(gpus)), "--gpu_ids", ",".join(ids), "--main_process_port", "0"]
    launch += ["--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no"]
    spec = sys.modules["__main__"].__spec__
    return launch + (["--module", spec.name] if spec else [sys.argv[0]]) + rest


def _told(target: Target) -> str:
    step = "" if target.step is None else f", step {target.step}"
    return target.which + step + ("" if target.epoch is None else f", epoch {target.epoch:g}")


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


def _class_table(target: Target, scores: Scores, classes: Sequence[str], protocol: Protocol, network: str) -> Table:
    caption = f"pixel accuracy {_percent(scores.pixel_accuracy)}; {protocol.describe()}{_network_told(network)}"
    table = Table(title=_told(target), caption=caption, title_justify="left", caption_justify="left", show_footer=True)
    table.add_column("class", f"mean over {scores.classes_counted} of {len(classes)} classes")
    table.add_column("IoU %", _percent(scores.miou), justify="right")
    for name, iou in zip(classes, scores.per_class_iou):
        table.add_row(name, _percent(iou), style="dim" if math.isnan(iou) else None)
    return table


def _summary(targets: Sequence[Target], results: Sequence[Scores]) -> Table:
    table = Table("checkpoint", "mIoU %", "classes", "pixel accuracy %", title="all", title_justify="left")
    best = max(scores.miou for scores in results)
    for target, scores in zip(targets, results):
        row = (_percent(scores.miou), str(scores.classes_counted), _percent(scores.pixel_accuracy))
        table.add_row(_told(target), *row, style="bold" if scores.miou == best else None)
    return table


def _network_told(network: str) -> str:
    return {"1": "", "2": "; network 2", "both": "; mean of both networks"}[network]


def _file_name(target: Target, protocol: Protocol, network: str) -> str:
    """`best`, or with what departs from the usual protocol: `best_sliding96_scales0.75-1_flip_network2`."""
    sliding = [f"sliding{protocol.crop[0]}"] if protocol.crop else []
    scales = [] if protocol.scales == (1.0,) else ["scales" + "-".join(f"{scale:g}" for scale in protocol.scales)]
    chosen = [] if network == "1" else [f"network{network}"]
    return "_".join([target.which, *sliding, *scales, *(["flip"] if protocol.flip else []), *chosen])


def _write_scores(
    run: Path,
    target: Target,
    scores: Scores,
    classes: Sequence[str],
    protocol: Protocol,
    config: str | None,
    network: str,
) -> None:
    per_class = {name: None if math.isnan(iou) else iou for name, iou in zip(classes, scores.per_class_iou)}
    content = {
        "network": str(target.file),
        "step": target.step,
        "epoch": target.epoch,
        "data_config": config or str(run / "config.json"),
        "protocol": asdict(protocol) | {"text": protocol.describe() + _network_told(network)},
        "miou": None if math.isnan(scores.miou) else scores.miou,
        "classes_counted": scores.classes_counted,
        "pixel_accuracy": None if math.isnan(scores.pixel_accuracy) else scores.pixel_accuracy,
        "per_class_iou": per_class,
    }
    path = run / "eval" / f"{_file_name(target, protocol, network)}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"scores cannot be written to {path}: {error.strerror}") from None


def _write_pictures(folder: Path, samples: Iterable[Sample], source: Source) -> None:
    """prediction/<name>.png (ids in colour) and side_by_side/<name>.png (image, prediction, label)."""
    try:
        for kind in ("prediction", "side_by_side"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for sample in samples:
            save_label(sample.prediction, source.palette, folder / "prediction" / f"{sample.name}.png")
            compare(sample, source.palette).save(folder / "side_by_side" / f"{sample.name}.png")
    except OSError as error:
        raise UserError(f"pictures cannot be written to {folder}: {error.strerror}") from None
