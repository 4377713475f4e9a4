"""Supervised baseline of every paper: the same network, data and schedule, without unlabeled images.

    accelerate launch supervised/train.py --config supervised/configs/voc.json
    accelerate launch supervised/train.py --config supervised/configs/demo.json

`--method.fully_labeled true` also uses the labels of the unlabeled list (upper bound). `--method.source_dataset` takes
the labels of another domain (baseline of domain adaptation).
"""

from dataclasses import dataclass
from typing import Literal, Optional

from torch.profiler import record_function

from common.augment.views import CropTransform, augment_labeled
from common.config.sections import BaseConfig
from common.datasets import open_source_domain
from common.engine.run import Run
from common.engine.start import start
from common.errors import report_errors
from common.evaluation.evaluate import evaluate_run, save_panel
from common.images import normalize
from common.loaders import StepBatches, TrainingImages, open_data
from common.losses import supervised_loss, upsample
from common.models import build_network
from common.optim import build_optimizer, poly, set_lr
from common.splits.split import Split


@dataclass
class Method:
    """Options of the baseline.

    Args:
        fully_labeled: Also use the labels of the unlabeled list.
        source_dataset: Train on the labels of another dataset with the same classes instead; its layout, as in
            `data.dataset`.
        source_root: Folder of that dataset; by default it is looked for beside `data.root`. The built-in data are drawn
            in another domain on first use, by default in the folder `data.root` with the suffix `_b`.
    """

    fully_labeled: bool = False
    source_dataset: Optional[Literal["gta5", "cityscapes", "voc", "shapes"]] = None
    source_root: Optional[str] = None


@dataclass
class Config(BaseConfig):
    method: Method


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "supervised/train.py", argv) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim = config.optim

    source, split = open_data(config, run.accelerator)
    learned, names = source, split.labeled + (split.unlabeled if config.method.fully_labeled else [])
    if config.method.source_dataset:
        with run.accelerator.main_process_first():  # one process draws the built-in data
            learned = open_source_domain(config.data, config.method.source_dataset, config.method.source_root)
        names = learned.names("train")
    run.set_length(-(-len(names) // optim.batch_size))
    run.check_settings(learned, Split(names, split.unlabeled, split.valid))
    scaled = CropTransform(config.data.crop_size, config.data.scale_range)
    images = TrainingImages(learned, names, scaled, config.run.seed, "labeled", with_label=True)

    network = build_network(config.model)
    wrapped, optimizer = run.prepare(network, build_optimizer(optim, network))

    run.resume(model=network, extra={}, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(network, source, split, run))
        save_panel(network, source, split, run)

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    batches = StepBatches(images, run)

    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power))
        for _ in run.accumulate(wrapped):
            with record_function("data"):
                batch = next(batches)
            with record_function("augmentation"):
                image, label = augment_labeled(batch.image, batch.label, batch.positions, config.run.seed)
            with record_function("student"):
                logits = wrapped(normalize(image))
            with record_function("losses"):
                upsampled = upsample(logits, label.shape[-2:], network.align_corners)
                loss = supervised_loss(upsampled, label, kind=optim.supervised_loss)
                run.monitor.count_predictions(logits, label)
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            if run.step_optimizer(optimizer, {"loss": loss}):
                run.average_batch_norm(network)

        run.finish_step({"loss": loss, "lr": optimizer.param_groups[0]["lr"]}, images=optim.batch_size)
        if run.evaluation_due:
            score()
        run.save()
    run.finish()


if __name__ == "__main__":
    main()
