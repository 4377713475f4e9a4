"""CAC: Semi-supervised Semantic Segmentation with Directional Context-aware Consistency (Lai et al., CVPR 2021).

    accelerate launch cac_cps/train.py --config cac_cps/configs/voc_cac_deeplabv3+_resnet50_1over8_datalist0.json
    accelerate launch cac_cps/train.py --config cac_cps/configs/demo.json      # built-in data, minutes on a CPU

Two overlapping crops of an unlabeled image show their common area in two contexts. There, the embedding of the less
confident crop is attracted to that of the more confident one and repelled by embeddings of other pseudo-classes in a
bank of past steps.
See cac_cps/README.md for every departure from the released code, hardware and results.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from cac_cps.config import STEPS_PER_EPOCH, Config, protocol_of
from cac_cps.crops import CELL, Pair, augment_views, overlap_cells
from cac_cps.losses import context_loss
from cac_cps.panels import save_pair_panel
from cac_cps.released import translate
from cac_cps.training import augment_labeled, check_unlabeled, make_labeled_images, make_optimizer, pair_crop
from common.config.lengths import in_steps
from common.config.sections import ModelConfig
from common.engine.run import Run
from common.engine.start import start
from common.errors import UserError, report_errors
from common.evaluation.evaluate import evaluate_run
from common.images import flatten_pixels, to_device
from common.loaders import Batch, StepBatches, TrainingImages, open_data
from common.losses import label_and_confidence, supervised_loss, upsample, zero_loss
from common.models import build_network
from common.optim import poly, set_lr

EPOCHS = 80  # length of the released runs
EMPTY = 255


class CACNetwork(nn.Module):
    """The trained network: DeepLabV3+ and, on its decoder feature, an embedding per cell of 8 x 8 pixels.

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
        """Run the one forward of a step; separate passes of labeled images and each view keep the paper's batch norm.

        Args:
            labeled: Normalized images [B,3,H,W].
            views: Normalized crops [B,2,3,H,W]; None in steps that learn from labels only.

        Returns:
            `labeled`: logits [B,C,h,w]. With views also, per cell of 8 x 8 pixels, `embedding1`, `embedding2`:
            [B,D,h,w] of length 1, and `logits1`, `logits2`: [B,C,h,w]. Without views `idle`: a zero that depends on
            the projector, for whose gradients DDP waits.
        """
        output = {"labeled": self.segmenter(labeled)}
        if views is None:
            return output | {"idle": zero_loss(self.projector)}
        for number in (1, 2):
            # At stride 4, as in the paper, the mean of 2 x 2 features; encoders and heads of other strides fit too.
            size = [side // CELL for side in views.shape[-2:]]
            cells = F.adaptive_avg_pool2d(self.segmenter.features(views[:, number - 1]), size)
            output[f"embedding{number}"] = F.normalize(self.projector(cells).float(), dim=1)
            output[f"logits{number}"] = self.segmenter.classifier(cells)
        return output


class Bank(nn.Module):
    """Embeddings and pseudo-classes of the latest forward passes, oldest first, identical on all processes.

    Args:
        passes: Number of passes held.
        rows: Embeddings per pass, over both views and all processes.
        dims: Dimensions D of an embedding.
    """

    def __init__(self, passes: int, rows: int, dims: int) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.zeros(passes, rows, dims))
        self.register_buffer("label", torch.full((passes, rows), EMPTY, dtype=torch.uint8))
        self.filled = 0
        self.register_load_state_dict_post_hook(lambda bank, _: bank.recount())

    def push(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Add a pass ([rows,D] and [rows]), drop the oldest, and return all embeddings [M,D] and classes int64 [M]."""
        self.embedding = torch.cat([self.embedding[1:], embedding[None]])
        self.label = torch.cat([self.label[1:], label[None].to(torch.uint8)])
        self.filled = min(self.filled + 1, len(self.label))
        kept = slice(len(self.label) - self.filled, None)
        return self.embedding[kept].flatten(0, 1), self.label[kept].flatten().long()

    def recount(self) -> None:
        """Count the passes held, after loading or after a step was undone."""
        self.filled = int((self.label[:, 0] != EMPTY).sum())


def select_cells(cells: int, count: int, device: torch.device) -> Tensor | slice:
    """Draw `count` of `cells` cells at random; all of them where the numbers are equal, as in the papers' settings."""
    return slice(None) if count == cells else torch.randperm(cells, device=device)[:count]


def context_term(
    output: dict[str, Tensor],
    overlap: tuple[Tensor, Tensor],
    selected: tuple[Tensor | slice, Tensor | slice],
    bank: Bank,
    config: Config,
    run: Run,
) -> dict[str, Tensor]:
    """Add a step to the bank, compute its two contrastive losses, and count its confident cells among the signs.

    Args:
        output: Output of `CACNetwork`.
        overlap: Matched cells of the two views, int64 [n] each.
        selected: Cells of each view that go to the bank.
        bank: Embeddings of past steps, updated in place.

    Returns:
        `loss1` and `loss2`.
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
    counted = torch.cat([label[cells] for (label, _), cells in zip(found, overlap)])
    run.monitor.count_pseudo_labels(counted, torch.cat(confidence) > method.pos_thresh_value)
    return {"loss1": losses[0], "loss2": losses[1]}


def cells_of(pairs: Sequence[Pair], output: dict[str, Tensor], run: Run) -> tuple[Tensor, Tensor]:
    """Indices of the cells that both crops of each pair show, on the device."""
    first, second = overlap_cells(pairs, *output["embedding1"].shape[-2:])
    return to_device(first, run.device), to_device(second, run.device)


def first_contrastive_step(config: Config, run: Run) -> int:
    """Count the steps that learn from labels only; a run given in steps counts as the 80 epochs of the paper."""
    if config.method.labels_only:
        return run.total
    epochs, begin = config.run.epochs or EPOCHS, config.method.cac.epoch_start_unsup
    if isinstance(begin, str):
        return in_steps(begin, run.total)
    if begin >= epochs:
        run.log.print(f"warning: no contrastive loss: method.cac.epoch_start_unsup {begin:g}, epochs {epochs}")
    return round(run.total * begin / epochs)


def cells_per_process(config: Config, run: Run) -> int:
    """Cells per view and pass that each process adds to the bank.

    Raises:
        UserError: the crop is not made up of whole cells, or the cells cannot be divided over processes and passes.
    """
    crop, total = config.data.crop_size, config.method.cac.selected_num
    if any(side % CELL for side in crop):
        raise UserError(f"data.crop_size is {list(crop)}; CAC needs multiples of {CELL}")
    share, rest = divmod(total, run.processes * config.optim.accumulation)
    cells = run.process_batch_size * (crop[0] // CELL) * (crop[1] // CELL)
    if rest or share > cells:
        raise UserError(
            f"method.cac.selected_num is {total}; it must be a multiple of processes x accumulation, and at most "
            f"{cells * run.processes * config.optim.accumulation}, the cells of a batch"
        )
    return share


@report_errors
def main(argv: list[str] | None = None) -> None:
    with start(Config, "cac_cps/train.py", argv, translate) as run:
        train(run.config, run)


def train(config: Config, run: Run) -> None:
    optim, method, labels_only = config.optim, config.method.cac, config.method.labels_only

    reader, split = open_data(config, run.accelerator)
    run.set_length(max(1, len(split.labeled) // optim.batch_size) if labels_only else STEPS_PER_EPOCH)
    run.check_settings(reader, split)
    labeled_images = make_labeled_images(reader, split.labeled, config)
    if not labels_only:
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

    if run.evaluation_due:  # resumed after an interrupted evaluation
        score()
        run.save()
    begin = first_contrastive_step(config, run)
    labeled_batches = StepBatches(labeled_images, run)
    unlabeled_batches = None if labels_only else StepBatches(unlabeled_images, run, first_step=begin)

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
                logits = upsample(output["labeled"], size, corners)
                supervised = supervised_loss(logits, labeled.label, kind=optim.supervised_loss)
                run.monitor.count_predictions(output["labeled"], labeled.label)
                values = {"loss_supervised": supervised}
                loss = supervised
                if use_contrast:
                    overlap = cells_of(unlabeled.details, output, run)
                    cells = output["embedding1"][:, 0].numel()
                    selected = tuple(select_cells(cells, selected_num, run.device) for _ in (1, 2))
                    values |= context_term(output, overlap, selected, bank, config, run)
                    loss = loss + method.weight_unsup * (values["loss1"] + values["loss2"])
                else:
                    loss = loss + output["idle"]
            with record_function("backward"):
                run.backward(loss)
        with record_function("optimizer"):
            losses = {"loss": loss} | {name: value for name, value in values.items() if name.startswith("loss")}
            if run.step_optimizer(optimizer, losses):
                run.average_batch_norm(network)
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
