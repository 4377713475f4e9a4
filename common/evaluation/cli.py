"""Command line of every paper's `eval.py`: checkpoints, devices and protocol of an evaluation."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console
from torch import nn

from common.config import config_of, load_config
from common.config.files import show_translation
from common.config.sections import DataConfig, ModelConfig
from common.datasets import open_reader
from common.datasets.reader import Reader
from common.engine.devices import accelerator_on
from common.engine.run_folder import RUN_FILE
from common.errors import UserError, report_errors
from common.evaluation.evaluate import evaluate, sample_predictions
from common.evaluation.flags import add_protocol_flags, protocol_from
from common.evaluation.inference import Protocol
from common.evaluation.networks import EvaluatedNetwork, PaperNetworks
from common.evaluation.released_checkpoints import Release, convert_checkpoint, has_project_keys
from common.evaluation.report import Report
from common.evaluation.selection import CheckpointRef, find_checkpoints, find_run, run_containing
from common.metrics import Scores
from common.models.weights import read_state
from common.splits.split import valid_of


@dataclass(frozen=True)
class _SelectedRun:
    """Run folder, its config, and the file that the config comes from."""

    folder: Path
    config: Any
    config_file: Path


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
    """Evaluate checkpoints of a paper's run, print the scores and write them to RUN/eval/<name>.json.

    Args:
        paper: Folder of the paper; its runs are below runs/<paper>.
        config_class: `Config` of the paper's train.py.
        argv: Arguments; by default those of the process.
        protocol_of: Function from a config to the paper's protocol; by default whole images.
        second: Name of the second network in the checkpoints of a paper that trains two.
        roles: `student` and `teacher`, for a paper whose checkpoints hold both; see `PaperNetworks`.
        release: Checkpoint format of the paper's own repository.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    paper_networks = PaperNetworks(second, roles, release)
    args = _parser(paper, paper_networks).parse_args(argv)
    if args.convert and not (args.which and Path(args.which).is_file()):
        raise UserError("--convert goes with -e FILE, a checkpoint of the paper's own repository")
    run = _select_run(paper, config_class, args, release)
    paper_protocol = protocol_of(run.config) if protocol_of else Protocol()
    protocol = protocol_from(args, paper_protocol)
    if args.convert:
        file = Path(args.which)
        lines = convert_checkpoint(release, file, paper, run.config, paper_protocol, second, args.convert)
        print(*lines, sep="\n")
        return
    accelerator = accelerator_on(args.devices, run.config.run.precision, argv)
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    # A training may write checkpoints at this moment, so all processes use the list that one process has seen.
    found = [find_checkpoints(run.folder, args.which, by_epoch=run.config.run.epochs is not None)]
    ((checkpoints, notes),) = broadcast_object_list(found)
    translate = release.translate if release else None
    data = load_config(config_class, args.config, translate).data if args.config else run.config.data
    reader = _open_reader(data, run.config.model, run.folder, accelerator)
    names = valid_of(data, reader)
    is_newest = (
        args.run is None and run_containing(args.which) is None and run.config_file == run.folder / "config.json"
    )
    console.print(f"run {run.folder}" + (f" (the newest of {paper})" if is_newest else ""))
    console.print(f"{len(names)} images of {data.lists}, {accelerator.num_processes} process(es), {accelerator.device}")
    for note in (*notes, *_unused_weights(checkpoints[0], release)):
        console.print(f"note: {note}")

    data_config = args.config or str(run.config_file)
    report = Report(reader.classes, protocol, paper_protocol, args.network, data_config, run.folder / "eval")
    network = EvaluatedNetwork(paper_networks, args.network, run.config.model, accelerator)
    evaluation = _Evaluation(reader, names, data.workers, accelerator, console, report, args.save_pictures)
    results = evaluation.score_all(network, checkpoints, run.config_file)
    if len(checkpoints) > 1:
        console.print(report.summary(results))
        if accelerator.is_main_process:
            report.write_summary(args.which, results)
    console.print(f"written to {report.folder}")
    accelerator.end_training()


@dataclass(frozen=True)
class _Evaluation:
    """Images, processes and outputs of one command."""

    reader: Reader
    names: Sequence[str]
    workers: int
    accelerator: Accelerator
    console: Console
    report: Report
    save_pictures: bool

    def score_all(
        self, network: EvaluatedNetwork, checkpoints: Sequence[CheckpointRef], config_file: Path
    ) -> list[tuple[CheckpointRef, Scores]]:
        """Evaluate checkpoints in order, and skip those that cannot be read. Raises UserError if none can be read."""
        results: list[tuple[CheckpointRef, Scores]] = []
        for checkpoint in checkpoints:
            try:
                network.load(checkpoint.file, config_file)
            except UserError as error:
                # A training that goes on may have pruned a checkpoint of the range.
                if checkpoint is checkpoints[-1] and not results:
                    raise
                self.console.print(f"note: skipped a checkpoint: {error}")
                continue
            results.append((checkpoint, self._score(network.module, checkpoint)))
        return results

    def _score(self, network: nn.Module, checkpoint: CheckpointRef) -> Scores:
        """Evaluate a loaded network, and print and write its scores and pictures."""
        accelerator, report, classes = self.accelerator, self.report, len(self.reader.classes)
        scores = evaluate(
            network, self.reader, self.names, classes, accelerator, report.protocol, workers=self.workers, bar=True
        )
        self.console.print(report.table(checkpoint, scores))
        if accelerator.is_main_process:
            report.write(checkpoint, scores)
        if self.save_pictures:
            share = self.names[accelerator.process_index :: accelerator.num_processes]
            samples = sample_predictions(network, self.reader, share, report.protocol, accelerator.device)
            with accelerator.autocast():  # in the precision of the scores
                written = report.write_pictures(checkpoint, samples, self.reader.palette)
            everywhere = dict(gather_object(list(written.items())))
            if accelerator.is_main_process:
                report.write_image_scores(checkpoint, everywhere)
        return scores


def _select_run(paper: str, config_class: type, args: argparse.Namespace, release: Release | None) -> _SelectedRun:
    """Find the run folder and its config.

    For a weight file outside any run, the folder is runs/<paper>/<name>, and the config is `--config`, the one that the
    file holds, or the paper's config for the released network that the file holds, in this order.
    """
    file = Path(args.which) if args.which else None
    if args.run is None and file and file.is_file() and not run_containing(args.which):
        if args.config:
            config_file = Path(args.config)
            config = load_config(config_class, config_file, release.translate if release else None)
            return _SelectedRun(Path("runs", paper, config_file.stem), config, config_file)
        folder = Path("runs", paper, file.stem)
        translation = release.config_in(file) if release and release.config_in else None
        if translation:
            show_translation(translation, file)
            return _SelectedRun(folder, config_of(config_class, translation.values, file), file)
        if release and not has_project_keys(read_state(file, release.entries)):
            config, config_file = release.infer_config(config_class, file)
            print(f"note: no --config given; using {config_file} with the architecture found in {file}")
            return _SelectedRun(folder, config, Path(config_file))
    folder = find_run(paper, args.run, args.which)
    _check_paper(paper, folder)
    return _SelectedRun(folder, load_config(config_class, folder / "config.json"), folder / "config.json")


def _check_paper(paper: str, run: Path) -> None:
    """Refuse a run of another paper, whose config would be refused by its first unknown key instead."""
    try:
        script = json.loads((run / RUN_FILE).read_text())["script"]
    except (OSError, ValueError, KeyError):
        return  # a folder copied without the file: its config decides
    owner = script.split("/")[0]
    if owner != paper:
        raise UserError(f"{run} is a run of {script}: evaluate it with {owner}/eval.py")


def _open_reader(data: DataConfig, model: ModelConfig, run: Path, accelerator: Accelerator) -> Reader:
    """Open the data. Raises UserError where their number of classes is not the network's."""
    with accelerator.main_process_first():  # one process makes the built-in data, on first use
        reader = open_reader(data)
    if len(reader.classes) != model.num_classes:
        raise UserError(
            f"the network of {run} has {model.num_classes} classes, "
            f"but {data.dataset} in {data.root} has {len(reader.classes)}; give a --config with the same classes"
        )
    return reader


def _unused_weights(checkpoint: CheckpointRef, release: Release | None) -> list[str]:
    """Note what a released checkpoint holds beyond the evaluated network; empty for this project's checkpoints."""
    if release is None or checkpoint.step is not None or has_project_keys(read_state(checkpoint.file, release.entries)):
        return []
    return [f"unused in {checkpoint.file}: {release.unused(checkpoint.file)}"]


def _parser(paper: str, networks: PaperNetworks) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{paper}/eval.py", description="Evaluate checkpoints on the validation images.", allow_abbrev=False
    )
    parser.set_defaults(convert=None, network=None)
    parser.add_argument("run", nargs="?", type=Path, help=f"run folder; by default the newest below runs/{paper}")
    add_protocol_flags(parser)
    parser.add_argument("-s", "--save-pictures", action="store_true", help="write a picture of every prediction")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="use the data section of this config; for a weight file outside any run, the whole config",
    )
    if networks.release:
        parser.add_argument(
            "--convert",
            type=Path,
            metavar="DIR",
            help="convert -e FILE, a checkpoint of the paper's own repository, to the run folder DIR, and exit",
        )
    if networks.second:
        help_text = "network to evaluate; both: the mean of their logits"
        parser.add_argument("--network", choices=networks.choices, default="1", help=help_text)
    elif networks.roles:
        help_text = "network to evaluate; by default the one evaluated in training"
        parser.add_argument("--network", choices=networks.choices, help=help_text)
    return parser
