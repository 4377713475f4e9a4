"""The command line of every paper's `eval.py`: checkpoints of a run, on given devices, by a given protocol."""

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table
from torch import Tensor

from common.config import DataConfig, ModelConfig, config_of, load_config, show_translation
from common.datasets import open_source
from common.datasets.source import Source
from common.datasets.splits import valid_of
from common.errors import UserError, told
from common.evaluation import evaluate, sample_predictions
from common.inference import MeanOfNetworks, Protocol
from common.metrics import Scores
from common.models import build_network
from common.models.weights import STATE_ENTRIES, load_state, read_state
from common.release import Release, convert, is_ours
from common.targets import Target, find_run, find_targets, run_around
from common.visual import Sample, compare, save_ids, save_label, score_curve

State = dict[str, Tensor]


@told
def main_eval(
    paper: str,
    config_class: type,
    argv: Sequence[str] | None = None,
    protocol_of: Callable[[Any], Protocol] | None = None,
    second: str | None = None,
    roles: Sequence[str] = (),
    release: Release | None = None,
) -> None:
    """Evaluate checkpoints of a run of `paper`, print the scores and write them to RUN/eval/<which>.json.

    Args:
        paper: Folder of the paper; its runs lie below runs/<paper>.
        config_class: The `Config` of its train.py.
        argv: Arguments; by default those of the process.
        protocol_of: The paper's protocol for a config; by default whole images.
        second: Name of a second network in the checkpoints of a paper that trains two; it may be chosen.
        roles: `student` and `teacher`, of which one is evaluated in training and both are in the checkpoints, the
            other by that name; either may be chosen.
        release: How the paper's repository writes its networks.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(paper, ("1", "2", "both") if second else roles, release is not None).parse_args(argv)
    if args.convert and not (args.which and Path(args.which).is_file()):
        raise UserError("--convert goes with -e FILE, a checkpoint of the paper's own repository")
    run, config, config_file = _find_config(paper, config_class, args, release)
    usual = protocol_of(config) if protocol_of else Protocol()
    protocol = protocol_from(args, usual)
    if args.convert:
        print(*convert(release, Path(args.which), paper, config, usual, second, args.convert), sep="\n")
        return
    accelerator = accelerator_on(args.devices, config.run.precision, argv)
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    # A training may write checkpoints at this moment: all processes go by what one has seen.
    found = [find_targets(run, args.which, by_epoch=config.run.epochs is not None)]
    ((targets, notes),) = broadcast_object_list(found)
    data = load_config(config_class, args.config).data if args.config else config.data
    source = _open_source(data, config.model, run, accelerator)
    names = valid_of(data, source)
    is_newest = args.run is None and run_around(args.which) is None and config_file == run / "config.json"
    console.print(f"run {run}" + (f" (the newest of {paper})" if is_newest else ""))
    console.print(f"{len(names)} images of {data.lists}, {accelerator.num_processes} process(es), {accelerator.device}")
    if release and targets[0].step is None and not is_ours(read_state(targets[0].file, release.entries)):
        notes = [*notes, f"not used of {targets[0].file}: {release.left_out(targets[0].file)}"]
    for note in notes:
        console.print(f"note: {note}")

    # The weights come from the checkpoint: ImageNet's are neither needed nor downloaded.
    chosen = ("1", "2") if args.network == "both" else (args.network,)
    networks = {name: build_network(replace(config.model, pretrained=False)) for name in chosen}
    network = networks[chosen[0]] if len(chosen) == 1 else MeanOfNetworks(list(networks.values()))
    network.to(accelerator.device)
    results: list[tuple[Target, Scores]] = []
    for target in targets:
        try:
            with _on_all_processes(accelerator):
                for name, one in networks.items():
                    state = _read_network(target.file, name, second, roles, release)
                    load_state(one, state, str(target.file), f"the network of {config_file}")
        except UserError as error:
            # Of several, one may have been pruned by a training that goes on.
            if target is targets[-1] and not results:
                raise
            console.print(f"note: left out: {error}")
            continue
        classes, workers = source.classes, data.workers
        scores = evaluate(network, source, names, len(classes), accelerator, protocol, workers=workers, bar=True)
        results.append((target, scores))
        console.print(_class_table(target, scores, classes, protocol, args.network))
        name = _file_name(target.which, protocol, usual, args.network)
        if accelerator.is_main_process:
            told = _contents(target, scores, classes) | {"data_config": args.config or str(config_file)}
            told["protocol"] = asdict(protocol) | {"text": protocol.describe() + _network_told(args.network)}
            _write_json(run / "eval" / f"{name}.json", told)
        if args.save_pictures:
            mine = names[accelerator.process_index :: accelerator.num_processes]
            samples = sample_predictions(network, source, mine, protocol, accelerator.device)
            with accelerator.autocast():  # in the precision that was scored
                _write_pictures(run / "eval" / "pictures" / name, samples, source)
    if len(targets) > 1:
        console.print(_summary(results, source.classes))
        if accelerator.is_main_process:
            name = _file_name(args.which.replace(":", "_"), protocol, usual, args.network)
            _write_summary(run / "eval" / name, results, source.classes)
    console.print(f"written to {run / 'eval'}")
    accelerator.end_training()


def _find_config(
    paper: str, config_class: type, args: argparse.Namespace, release: Release | None
) -> tuple[Path, Any, Path]:
    """The run folder, the config and the file it is from.

    A weight file that lies in no run comes with a config file, holds its config itself, or is of a released network.
    """
    file = Path(args.which) if args.which else None
    if args.run is None and file and file.is_file() and not run_around(args.which):
        if args.config:
            return Path("runs", paper, Path(args.config).stem), load_config(config_class, args.config), args.config
        translation = release.config_in(file) if release and release.config_in else None
        if translation:
            show_translation(translation, file)
            return Path("runs", paper, file.stem), config_of(config_class, translation.values, file), file
        if release and not is_ours(read_state(file, release.entries)):
            config, config_file = release.config_of(config_class, file)
            print(f"note: no --config: {config_file}, with the network of {file}")
            return Path("runs", paper, file.stem), config, Path(config_file)
    run = find_run(paper, args.run, args.which)
    _check_paper(paper, run)
    return run, load_config(config_class, run / "config.json"), run / "config.json"


def _open_source(data: DataConfig, model: ModelConfig, run: Path, accelerator: Accelerator) -> Source:
    """The reader of the data, whose classes must be those of the network."""
    with accelerator.main_process_first():  # the built-in data are made on first use: by one process
        source = open_source(data)
    if len(source.classes) != model.num_classes:
        raise UserError(
            f"the network of {run} has {model.num_classes} classes, "
            f"but {data.dataset} in {data.root} has {len(source.classes)}; give a --config with the same classes"
        )
    return source


@contextmanager
def _on_all_processes(accelerator: Accelerator) -> Iterator[None]:
    """What one process cannot read, none goes on with: the others would wait for it.

    Raises:
        UserError: on every process, where one did.
    """
    bad: UserError | None = None
    try:
        yield
    except UserError as error:
        bad = error
    if accelerator.reduce(torch.tensor(int(bad is not None), device=accelerator.device), "sum"):
        raise bad or UserError("a checkpoint that another process could not read")


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


def protocol_from(args: argparse.Namespace, usual: Protocol) -> Protocol:
    """The paper's protocol with what the command line changes: `--sliding`, `--whole`, `--scales` and `--flip`."""
    if args.sliding is not None:
        usual = Protocol(crop=(args.sliding, args.sliding))
    elif args.whole:
        usual = replace(usual, crop=None)
    return replace(usual, scales=tuple(args.scales), flip=args.flip)


def _read_network(
    file: Path,
    name: str | None,
    second: str | None,
    roles: Sequence[str],
    release: Release | None,
) -> State:
    """Weights of a checkpoint's network, with our keys.

    Args:
        file: The weight file.
        name: As `--network` calls the network; None for the one that is evaluated in training.

    The others: see `main_eval`.

    Raises:
        UserError: the checkpoint has no such network.
    """
    if name in roles:
        other = _read_extra(file, name)
        # What is not beside the evaluated network is that itself, if its counterpart is there.
        if other or any(_read_extra(file, role) for role in roles):
            return other or read_state(file)
        raise UserError(f"{file} does not hold student and teacher; evaluate it without --network")
    if name == "2" and file.name == "model.safetensors":
        own = _read_extra(file, second)
        if not own:
            raise UserError(f"{file.parent} holds no second network; evaluate it with --network 1")
        return own
    state = read_state(file, release.entries if release else STATE_ENTRIES)
    return state if is_ours(state) or release is None else release.segmenter(state, 2 if name == "2" else 1)


def _read_extra(file: Path, name: str) -> State:
    """The weights called `name` in the file beside `file`; empty where there are none."""
    extra = file.with_name("extra.safetensors")
    state = read_state(extra) if file.name == "model.safetensors" and extra.is_file() else {}
    return {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}


def _parser(paper: str, networks: Sequence[str], released: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{paper}/eval.py", description="Evaluate checkpoints on the validation images.", allow_abbrev=False
    )
    parser.add_argument("run", nargs="?", type=Path, help=f"run folder; by default the newest below runs/{paper}")
    parser.add_argument(
        "-e",
        "--model-path",
        dest="which",
        help="best, last, a number N, a range A-B or A- (0-based epochs where the config counts epochs, else steps; "
        "step:N and step:A-B are always steps), or a weight file; by default best, else last",
    )
    parser.add_argument("-d", "--devices", help="cpu, 0, 0,1, 0-3 or * (all GPUs); by default one GPU, else the CPU")
    if released:
        told = "write -e FILE of the paper's own repository as a run folder of ours, and end"
        parser.add_argument("--convert", type=Path, metavar="DIR", help=told)
    else:
        parser.set_defaults(convert=None)
    parser.add_argument("-s", "--save-pictures", action="store_true", help="write a picture of every prediction")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0], help="scales whose predictions are averaged")
    parser.add_argument("--flip", action="store_true", help="average with the prediction of the mirrored image")
    area = parser.add_mutually_exclusive_group()
    area.add_argument("--sliding", type=int, metavar="CROP", help="slide a window of this side")
    area.add_argument("--whole", action="store_true", help="whole images, where the paper slides a window")
    if networks:
        usual = networks[0] if networks[-1] == "both" else None
        told = "both: the mean of their logits" if usual else "by default the one that was evaluated in training"
        parser.add_argument("--network", choices=networks, default=usual, help=told)
    else:
        parser.set_defaults(network=None)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="evaluate on the data section of this config; with -e FILE of no run, its network too",
    )
    return parser


def accelerator_on(devices: str | None, precision: str | None, argv: list[str]) -> Accelerator:
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


def _class_table(
    target: Target, scores: Scores, classes: Sequence[str], protocol: Protocol, network: str | None
) -> Table:
    caption = protocol.describe() + _network_told(network)
    table = Table(title=_told(target), caption=caption, title_justify="left", caption_justify="left")
    table.add_column("class")
    table.add_column("IoU %", justify="right")
    for name, iou in zip(classes, scores.per_class_iou):
        table.add_row(name, _percent(iou), style="dim" if math.isnan(iou) else None)
    table.add_section()
    table.add_row(f"mean over {scores.classes_counted} of {len(classes)} classes", _percent(scores.miou))
    if _has_background(classes):
        table.add_row("mean without background", _percent(scores.miou_without_first))
    table.add_row("pixel accuracy", _percent(scores.pixel_accuracy))
    return table


def _has_background(classes: Sequence[str]) -> bool:
    return classes[0] == "background"


def _summary(results: Sequence[tuple[Target, Scores]], classes: Sequence[str]) -> Table:
    by_epoch = all(target.epoch is not None for target, _ in results)
    columns = [*(["epoch"] if by_epoch else []), "step", "mIoU %"]
    columns += [*(["without background %"] if _has_background(classes) else []), "classes", "pixel accuracy %", ""]
    table = Table(*columns, title="all", title_justify="left")
    best = _best(results)
    for target, scores in results:
        row = [*([f"{target.epoch:g}"] if by_epoch else []), str(target.step), _percent(scores.miou)]
        row += [_percent(scores.miou_without_first)] if _has_background(classes) else []
        row += [str(scores.classes_counted), _percent(scores.pixel_accuracy), "best" if target is best else ""]
        table.add_row(*row, style="bold" if target is best else None)
    return table


def _best(results: Sequence[tuple[Target, Scores]]) -> Target:
    """The first of those with the largest mIoU; NaN is none."""
    return max(results, key=lambda result: -1.0 if math.isnan(result[1].miou) else result[1].miou)[0]


def _network_told(network: str | None) -> str:
    if network in ("1", None):
        return ""
    return {"2": "; network 2", "both": "; mean of both networks"}.get(network, f"; {network}")


def _file_name(which: str, protocol: Protocol, usual: Protocol, network: str | None) -> str:
    """`best`, or with what departs from the paper's protocol: `best_sliding96_scales0.75-1_flip_network2`."""
    window = f"sliding{protocol.crop[0]}" if protocol.crop else "whole"
    sliding = [] if protocol.crop == usual.crop else [window]
    scales = [] if protocol.scales == (1.0,) else ["scales" + "-".join(f"{scale:g}" for scale in protocol.scales)]
    chosen = [] if network in ("1", None) else [f"network{network}" if network in ("2", "both") else network]
    return "_".join([which, *sliding, *scales, *(["flip"] if protocol.flip else []), *chosen])


def _contents(target: Target, scores: Scores, classes: Sequence[str]) -> dict[str, Any]:
    """What is written of a checkpoint's scores; null stands for what there is not."""
    shares = {"miou": scores.miou}
    if _has_background(classes):
        shares["miou_without_background"] = scores.miou_without_first
    shares["pixel_accuracy"] = scores.pixel_accuracy
    told = {"network": str(target.file), "step": target.step, "epoch": target.epoch}
    told |= {name: _or_null(share) for name, share in shares.items()} | {"classes_counted": scores.classes_counted}
    return told | {"per_class_iou": {name: _or_null(iou) for name, iou in zip(classes, scores.per_class_iou)}}


def _or_null(share: float) -> float | None:
    return None if math.isnan(share) else share


def _write_summary(stem: Path, results: Sequence[tuple[Target, Scores]], classes: Sequence[str]) -> None:
    """<stem>.json, the scores of all checkpoints, and <stem>.png, their curve."""
    lines = [_contents(target, scores, classes) for target, scores in results]
    _write_json(stem.with_name(f"{stem.name}.json"), {"best_step": _best(results).step, "checkpoints": lines})
    unit = "epoch" if all(target.epoch is not None for target, _ in results) else "step"
    numbers = [getattr(target, unit) for target, _ in results]
    try:
        score_curve(numbers, [scores.miou for _, scores in results], unit, stem.with_name(f"{stem.name}.png"))
    except OSError as error:
        raise UserError(f"the curve cannot be written to {stem}.png: {error.strerror}") from None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"scores cannot be written to {path}: {error.strerror}") from None


def _write_pictures(folder: Path, samples: Iterable[Sample], source: Source) -> None:
    """For every image: prediction/ (in colour), ids/ (grey, a pixel's value its class), side_by_side/ (with label)."""
    try:
        for kind in ("prediction", "ids", "side_by_side"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for sample in samples:
            save_label(sample.prediction, source.palette, folder / "prediction" / f"{sample.name}.png")
            save_ids(sample.prediction, folder / "ids" / f"{sample.name}.png")
            compare(sample, source.palette).save(folder / "side_by_side" / f"{sample.name}.png")
    except OSError as error:
        raise UserError(f"pictures cannot be written to {folder}: {error.strerror}") from None
