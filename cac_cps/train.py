"""CAC: Semi-supervised Semantic Segmentation with Directional Context-aware Consistency (Lai et al., CVPR 2021).

    accelerate launch cac_cps/train.py --config cac_cps/configs/voc_cac_deeplabv3+_resnet50_1over8_datalist0.json
    accelerate launch cac_cps/train.py --config cac_cps/configs/demo.json      # built-in data, minutes on a CPU

Two crops of an unlabeled image share an area seen in two contexts. There the embedding of the less confident crop is
drawn to that of the more confident one, and away from embeddings of other pseudo-classes in a bank over the past steps.
See cac_cps/README.md for every departure from the released code, hardware and results.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from cac_cps.config import Config, protocol_of
from cac_cps.crops import CELL, Pair, augment_views, overlap_cells
from cac_cps.losses import context_loss
from cac_cps.panels import save_pair_panel
from cac_cps.released import STEPS_PER_EPOCH
from cac_cps.training import augment_labeled, check_unlabeled, make_labeled_images, make_optimizer, pair_crop
from common.config import parse
from common.config.sections import ModelConfig
from common.engine.run import Run
from common.errors import UserError, report_errors
from common.evaluation.evaluate import evaluate_run
from common.images import flatten_pixels, to_device
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import cross_entropy, label_and_confidence, upsample
from common.models import build_network
from common.optim import poly, set_lr

EPOCHS = 80  # of the released runs
EMPTY = 255


class CACNetwork(nn.Module):
    """Everything that is trained: DeepLabV3+ and, on its decoder feature, the embedding of every 8 x 8 pixels.

    Args:
        model: The config's `model` section.
        embedding_dim: Dimensions D of the embedding.
    """

    def __init__(self, model: ModelConfig, embedding_dim: int) -> None:
        super().__init__()
        self.segmenter = build_network(model)
        channels = self.segmenter.feature_channels
        widths = (channels, model.channels, embedding_dim)
        self.projector = nn.Sequential(
            nn.Conv2d(widths[0], widths[1], 1), nn.ReLU(inplace=True), nn.Conv2d(widths[1], widths[2], 1)
        )

    def forward(self, labeled: Tensor, views: Tensor | None = None) -> dict[str, Tensor]:
        """One forward a step; labeled images and either view pass apart, which keeps the paper's batch norm.

        Args:
            labeled: [B,3,H,W], normalized.
            views: [B,2,3,H,W], normalized; None in the steps that learn from labels alone.

        Returns:
            `labeled`: logits [B,C,h,w]. With views also, for cells of 8 x 8 pixels, `embedding1`, `embedding2`:
            [B,D,h,w] of length 1, and `logits1`, `logits2`: [B,C,h,w]; without, `nothing`: a zero that depends on the
            projector, from which processes wait for gradients.
        """
        output = {"labeled": self.segmenter(labeled)}
        if views is None:
            return output | {"nothing": 0.0 * sum(parameter.sum() for parameter in self.projector.parameters())}
        for number in (1, 2):
            cells = F.avg_pool2d(self.segmenter.features(views[:, number - 1]), 2)
            output[f"embedding{number}"] = F.normalize(self.projector(cells).float(), dim=1)
            output[f"logits{number}"] = self.segmenter.classifier(cells)
        return output


class Bank(nn.Module):
    """Embeddings and pseudo-classes of the latest passes, oldest first, the same on every process.

    Args:
        passes: How many passes it holds.
        rows: Rows of a pass, over both views and all processes.
        dims: Dimensions D of an embedding.
    """

    def __init__(self, passes: int, rows: int, dims: int) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.zeros(passes, rows, dims))
        self.register_buffer("label", torch.full((passes, rows), EMPTY, dtype=torch.uint8))
        self.filled = 0
        self.register_load_state_dict_post_hook(lambda bank, _: bank.recount())

    def push(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Add a pass ([rows,D] and [rows]), forget the oldest, and return all [M,D] and int64 [M]."""
        self.embedding = torch.cat([self.embedding[1:], embedding[None]])
        self.label = torch.cat([self.label[1:], label[None].to(torch.uint8)])
        self.filled = min(self.filled + 1, len(self.label))
        kept = slice(len(self.label) - self.filled, None)
        return self.embedding[kept].flatten(0, 1), self.label[kept].flatten().long()

    def recount(self) -> None:
        """Find out how many passes it holds: after loading, or after a step was undone."""
        self.filled = int((self.label[:, 0] != EMPTY).sum())


def select_cells(cells: int, count: int, device: torch.device) -> Tensor | slice:
    """`count` random ones of `cells` cells; all of them where that is the same number, as in the papers' settings."""
    return slice(None) if count == cells else torch.randperm(cells, device=device)[:count]


def context_term(
    output: dict[str, Tensor],
    overlap: tuple[Tensor, Tensor],
    selected: tuple[Tensor | slice, Tensor | slice],
    bank: Bank,
    config: Config,
    run: Run,
) -> dict[str, Tensor]:
    """The two contrastive losses of a step's output, and how confident it is; the bank takes in the step.

    Args:
        output: Of `CACNetwork`.
        overlap: int64 [n] each, the matched cells of the views.
        selected: Cells of either view that go to the bank.
        bank: Of the past steps.

    Returns:
        `loss1`, `loss2`, and `confident`, the share of the overlap's cells above the threshold.
    """
    method = config.method.cac
    embedding = [flatten_pixels(output[f"embedding{number}"]) for number in (1, 2)]
    with torch.no_grad():
        found = [label_and_confidence(flatten_pixels(output[f"logits{number}"])) for number in (1, 2)]
        rows = torch.cat([side[cells] for side, cells in zip(embedding, selected)]).detach()
        labels = torch.cat([label[cells] for (label, _), cells in zip(found, selected)])
        held = bank.push(run.accelerator.gather(rows), run.accelerator.gather(labels))
    confidence = tuple(values[cells] for (_, values), cells in zip(found, overlap))
    losses = context_loss(
        tuple(side[cells] for side, cells in zip(embedding, overlap)),
        confidence,
        tuple(label[cells] for (label, _), cells in zip(found, overlap)),
        held,
        method.pos_thresh_value,
        method.temp,
        config.model.num_classes,
        lambda count: run.accelerator.reduce(count, "mean"),
    )
    confident = torch.stack(confidence).gt(method.pos_thresh_value).float()
    return {"loss1": losses[0], "loss2": losses[1], "confident": confident.sum() / max(confident.numel(), 1)}


def cells_of(pairs: Sequence[Pair], output: dict[str, Tensor], run: Run) -> tuple[Tensor, Tensor]:
    """Numbers of the cells that both crops of each pair show, on the device."""
    first, second = overlap_cells(pairs, *output["embedding1"].shape[-2:])
    return to_device(first, run.device), to_device(second, run.device)


def first_contrastive_step(config: Config, run: Run) -> int:
    """How many steps learn from labels alone; a run stated in steps is as long as the papers' 80 epochs."""
    if config.method.cac.supervised:
        return run.total
    epochs, begin = config.run.epochs or EPOCHS, config.method.cac.epoch_start_unsup
    if begin >= epochs:
        run.log.print(f"warning: labels alone throughout: method.cac.epoch_start_unsup {begin:g}, epochs {epochs}")
    return round(run.total * begin / epochs)


def cells_per_process(config: Config, run: Run) -> int:
    """Cells of a view that a process puts into the bank in a pass.

    Raises:
        UserError: crops that are not whole cells, or cells that cannot be shared or are not there.
    """
    crop, total = config.data.crop_size, config.method.cac.selected_num
    if any(side % CELL for side in crop):
        raise UserError(f"data.crop_size is {list(crop)}; CAC needs multiples of {CELL}")
    share, rest = divmod(total, run.processes * config.optim.accumulation)
    cells = run.batch_size * (crop[0] // CELL) * (crop[1] // CELL)
    if rest or share > cells:
        raise UserError(
            f"method.cac.selected_num is {total}; it must be a multiple of processes x accumulation, and at most "
            f"{cells * run.processes * config.optim.accumulation}, the cells of a batch"
        )
    return share


@report_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, "cac_cps/train.py", argv)
    with Run(config, "cac_cps/train.py") as run:
        train(config, run)


def train(config: Config, run: Run) -> None:
    optim, method = config.optim, config.method.cac

    reader, split = open_data(config, run.accelerator)
    run.set_length(max(1, len(split.labeled) // optim.batch_size) if method.supervised else STEPS_PER_EPOCH)
    labeled_images = make_labeled_images(reader, split.labeled, config)
    if not method.supervised:
        check_unlabeled(split.unlabeled, config.data.lists)
        unlabeled_images = TrainingImages(
            reader, split.unlabeled, pair_crop(config), config.run.seed, "unlabeled", with_label=False
        )
    selected_num = cells_per_process(config, run)

    network = CACNetwork(config.model, method.proj_final_dim)
    passes, rows = (method.step_save + 1) * optim.accumulation, 2 * selected_num * run.processes
    bank = run.to_device(Bank(passes, rows, method.proj_final_dim))
    wrapped, optimizer = run.prepare(network, make_optimizer(config, network))

    run.resume(model=network.segmenter, extra={"projector": network.projector, "bank": bank}, optimizer=optimizer)

    def score() -> None:
        run.log_scores(evaluate_run(network.segmenter, reader, split, run, protocol_of(config)))
        save_pair_panel(network, reader, split, config, run)

    if run.evaluation_due:  # what a stop had cut short
        score()
        run.save()
    begin = first_contrastive_step(config, run)
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = None if method.supervised else StepBatches(unlabeled_images, run, first_step=begin)

    for step in run.steps():
        set_lr(optimizer, poly(step, run.total, optim.poly_power))
        use_contrast = step >= begin
        for _ in run.accumulate(wrapped):
            with record_function("data"):
                labeled: Batch = next(labeled_batches)
                unlabeled: Batch | None = next(unlabeled_batches) if use_contrast else None
            with record_function("augmentation"):
                image = augment_labeled(labeled, config)
                views = augment_views(unlabeled.image, unlabeled.positions, config.run.seed) if use_contrast else None
            with record_function("student"):
                output = wrapped(image, views)
            with record_function("losses"):
                size, corners = labeled.label.shape[-2:], network.segmenter.align_corners
                supervised = cross_entropy(upsample(output["labeled"], size, corners), labeled.label)
                values = {"loss_supervised": supervised}
                loss = supervised
                if use_contrast:
                    overlap = cells_of(unlabeled.details, output, run)
                    cells = output["embedding1"][:, 0].numel()
                    selected = tuple(select_cells(cells, selected_num, run.device) for _ in (1, 2))
                    values |= context_term(output, overlap, selected, bank, config, run)
                    loss = loss + method.weight_unsup * (values["loss1"] + values["loss2"])
                else:
                    loss = loss + output["nothing"]
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            losses = {"loss": loss} | {name: value for name, value in values.items() if name.startswith("loss")}
            if run.step_optimizer(optimizer, losses):
                run.share_statistics(network)
            else:
                bank.recount()

        values = {"loss": loss} | values | {"lr": optimizer.param_groups[0]["lr"]}
        run.finish_step(values, images=(3 if use_contrast else 1) * optim.batch_size)
        if run.evaluation_due:
            score()
        run.save()
    run.finish()


if __name__ == "__main__":
    main()
