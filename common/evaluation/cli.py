"""The command line of every paper's `eval.py`: checkpoints of a run, on given devices, by a given protocol."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.console import Console
from torch import Tensor

from common.config import config_of, load_config
from common.config.files import show_translation
from common.config.sections import DataConfig, ModelConfig
from common.datasets import open_reader
from common.datasets.reader import Reader
from common.engine.devices import accelerator_on
from common.errors import UserError, report_errors
from common.evaluation.evaluate import evaluate, sample_predictions
from common.evaluation.inference import MeanOfNetworks, Protocol
from common.evaluation.released_checkpoints import Release, convert, is_ours
from common.evaluation.report import Report
from common.evaluation.selection import CheckpointRef, find_run, find_targets, run_around
from common.metrics import Scores
from common.models import build_network
from common.models.weights import STATE_ENTRIES, load_state, read_state
from common.splits.split import valid_of

State = dict[str, Tensor]


@report_errors
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
    reader = _open_reader(data, config.model, run, accelerator)
    names = valid_of(data, reader)
    is_newest = args.run is None and run_around(args.which) is None and config_file == run / "config.json"
    console.print(f"run {run}" + (f" (the newest of {paper})" if is_newest else ""))
    console.print(f"{len(names)} images of {data.lists}, {accelerator.num_processes} process(es), {accelerator.device}")
    if release and targets[0].step is None and not is_ours(read_state(targets[0].file, release.entries)):
        notes = [*notes, f"not used of {targets[0].file}: {release.left_out(targets[0].file)}"]
    for note in notes:
        console.print(f"note: {note}")

    data_config = args.config or str(config_file)
    report = Report(reader.classes, protocol, usual, args.network, data_config, run / "eval")
    # The weights come from the checkpoint: ImageNet's are neither needed nor downloaded.
    chosen = ("1", "2") if args.network == "both" else (args.network,)
    networks = {name: build_network(replace(config.model, pretrained=False)) for name in chosen}
    network = networks[chosen[0]] if len(chosen) == 1 else MeanOfNetworks(list(networks.values()))
    network.to(accelerator.device)
    results: list[tuple[CheckpointRef, Scores]] = []
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
        classes = len(reader.classes)
        scores = evaluate(network, reader, names, classes, accelerator, protocol, workers=data.workers, bar=True)
        results.append((target, scores))
        console.print(report.table(target, scores))
        if accelerator.is_main_process:
            report.write(target, scores)
        if args.save_pictures:
            mine = names[accelerator.process_index :: accelerator.num_processes]
            samples = sample_predictions(network, reader, mine, protocol, accelerator.device)
            with accelerator.autocast():  # in the precision that was scored
                report.write_pictures(target, samples, reader.palette)
    if len(targets) > 1:
        console.print(report.summary(results))
        if accelerator.is_main_process:
            report.write_summary(args.which, results)
    console.print(f"written to {report.folder}")
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


def _open_reader(data: DataConfig, model: ModelConfig, run: Path, accelerator: Accelerator) -> Reader:
    """The reader of the data, whose classes must be those of the network."""
    with accelerator.main_process_first():  # the built-in data are made on first use: by one process
        reader = open_reader(data)
    if len(reader.classes) != model.num_classes:
        raise UserError(
            f"the network of {run} has {model.num_classes} classes, "
            f"but {data.dataset} in {data.root} has {len(reader.classes)}; give a --config with the same classes"
        )
    return reader


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
    return state if is_ours(state) or release is None else release.ours(state, file, 2 if name == "2" else 1)


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
