"""CAC against what its released functions returned, file by file.

Every number (classes, thresholds, sizes) is read from the file. Departures of ours from the released code are named
where they are allowed for.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import Golden, Replay, check_crop, check_poly_rates, close, close_gradient, read
from networks import CAC_PROJECTOR, Caught, draw_input, fill_small, official_keys, read_keys
from torch import Tensor, nn
from torch.testing import assert_close

from cac_cps.config import CAC, Config, Method
from cac_cps.crops import LongerSideCrop, Pair, draw_pair, overlap_cells
from cac_cps.train import Bank, CACNetwork, context_term
from cac_cps.training import make_optimizer
from common import IGNORE
from common.config.sections import DataConfig, ModelConfig, OptimConfig, RunConfig
from common.evaluation.inference import Protocol, sum_logits
from common.losses import cross_entropy, upsample
from common.metrics import ConfusionMatrix
from common.models.weights import load_state
from common.released.weights import CAC as CAC_KEYS
from common.released.weights import deeplab_from_cac

UNUSED = "nothing that a script of ours runs"


def test_golden(golden: Path) -> None:
    adapter_of(golden.name)(golden)


def test_every_adapter_has_a_golden_of_our_own() -> None:
    names = [path.name for path in (Path(__file__).parent / "goldens" / "cac").iterdir()]
    assert {prefix for prefix in ADAPTERS if not any(name.startswith(prefix) for name in names)} == set()


def adapter_of(name: str) -> Callable[[Path], None]:
    """The check that belongs to a file name."""
    for prefix, adapter in ADAPTERS.items():
        if name.startswith(prefix):
            return adapter
    pytest.fail(f"no adapter for {name}: its prefix is none of {', '.join(ADAPTERS)}")


# ---- the contrastive step


def check_contrast(path: Path) -> None:
    """Steps in a row, so that the bank fills; the released decoder features stand in for the encoder."""
    g = read(path)
    network, bank, config = stub_network(g), None, config_of(g)
    for step in range(int(g["steps"])):
        own = {key.removeprefix(f"s{step}_"): value for key, value in g.items() if key.startswith(f"s{step}_")}
        if bank is None:
            bank = Bank(int(g["step_save"]) + 1, 2 * len(own["sel1"]), g["proj2_bias"].numel())
        check_contrast_step(network, bank, own, config, g)


def stub_network(g: Golden) -> CACNetwork:
    """Our network with the file's classifier and projector, on feature maps in place of images."""
    network = CACNetwork(config_of(g).model, g["proj2_bias"].numel())
    network.segmenter.features = lambda feature: feature
    network.segmenter.classifier = nn.Conv2d(*g["cls_weight"].shape[1::-1], 1)
    state = {"weight": g["cls_weight"], "bias": g["cls_bias"]}
    network.segmenter.classifier.load_state_dict(state)
    names = {f"{i}.{kind}": g[f"proj{i}_{kind}"] for i in (0, 2) for kind in ("weight", "bias")}
    network.projector.load_state_dict(names)
    return network


def config_of(g: Golden) -> Config:
    method = CAC(
        pos_thresh_value=float(g["pos_thresh"]),
        temp=float(g["temp"]),
        weight_unsup=float(g["weight_unsup"]),
        step_save=int(g["step_save"]),
    )
    model = ModelConfig(
        int(g["num_classes"]), "resnet18", head="v3plus_cac", channels=g["cls_weight"].shape[1], pretrained=False
    )
    return Config(DataConfig("voc", "", ""), model, OptimConfig(), RunConfig(), Method(cac=method))


def check_contrast_step(network: CACNetwork, bank: Bank, own: Golden, config: Config, g: Golden) -> None:
    features = [own[f"feat{number}"].requires_grad_() for number in (1, 2)]
    network.zero_grad()
    output = network(own["feat_l"], torch.stack(features, dim=1))
    label = own["target_l"].long()
    supervised = cross_entropy(upsample(output["labeled"], label.shape[-2:], True), label)
    close(supervised, own["loss_sup"].nan_to_num(0.0), rtol=1e-4, atol=1e-5)

    size = output["embedding1"].shape[-2:]
    overlap = tuple(torch.from_numpy(cells) for cells in overlap_cells(pairs_of(own), *size))
    alone = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda values: values, reduce=lambda values, how: values)
    )
    losses = context_term(output, overlap, (own["sel1"], own["sel2"]), bank, config, alone)
    for number in (1, 2):
        close(losses[f"loss{number}"], own[f"loss{number}"], rtol=1e-4, atol=1e-5)
    unsupervised = config.method.cac.weight_unsup * (losses["loss1"] + losses["loss2"])
    close(unsupervised, own["loss_unsup"], rtol=1e-4, atol=1e-5)
    total = supervised + unsupervised
    if not own["total"].isnan():  # NaN where all labels are ignored; ours is the guarded sum
        close(total, own["total"], rtol=1e-4, atol=1e-5)
    total.backward()
    check_contrast_gradients(network, features, own)
    assert bank.filled == own["bank_len"]
    kept = bank.label[len(bank.label) - bank.filled :].flatten()
    assert len(kept) == own["bank_rows"]
    assert_close(kept, own["bank_labels"].to(torch.uint8))


def check_contrast_gradients(network: CACNetwork, features: list[Tensor], own: Golden) -> None:
    for number, feature in enumerate(features, start=1):
        want, gradient = own[f"grad_feat{number}"], feature.grad
        if gradient.shape != want.shape:  # a part is stored: every second cell of the last rows
            gradient = gradient[..., ::2, ::2][..., -want.shape[-2] :, :]
        near(gradient, want)
    for i in (0, 2):
        near(network.projector[i].weight.grad, own[f"grad_proj{i}_weight"])


def near(gradient: Tensor, want: Tensor) -> None:
    """Within 1e-4 of the largest."""
    want = want.nan_to_num(0.0)
    close(gradient, want, rtol=0, atol=1e-4 * float(want.abs().max()) + 1e-12)


def pairs_of(own: Golden) -> list[Pair]:
    def area(number: int, index: int) -> tuple[int, ...]:
        return (*own[f"ul{number}"][index].tolist(), *own[f"br{number}"][index].tolist())

    flips = own["flip"].tolist()
    return [Pair(0, 0, ((0, 0), (0, 0)), (area(1, i), area(2, i)), tuple(flips[i])) for i in range(len(flips))]


# ---- crops


def check_crop_geometry(path: Path) -> None:
    """Recorded draws take the place of random ones. The bounds of scale and overlap are those of the config files."""
    g = read(path)
    released = CAC()
    for (crop, base, height, width, draws), rows, want in zip(g["meta"].tolist(), g["draws"], g["out"].tolist()):
        replay = Replay(rows[:draws])
        pair = draw_pair(replay, (height, width), (crop, crop), base, released.scale_range, released.iou_bound)
        ours = [*pair.overlaps[0], *pair.overlaps[1], *map(int, pair.flips)]
        assert ours == want
        assert not replay.rows


def check_augmentation(path: Path) -> None:
    """Images within a gray level; labels as released or those of the next row or column, as OpenCV rounds down."""
    g = read(path)
    for name in [key.removesuffix("_draws") for key in g if key.endswith("_draws")]:
        base, crop = g[f"{name.split('_')[0]}_base_crop"].tolist()
        _, shortest, longest, _ = g[f"{name}_draws"][0].tolist()
        transform = LongerSideCrop((crop, crop), base, (shortest / base, longest / base))
        check_crop(transform, g["image"], g["label"], g[f"{name}_draws"], g[f"{name}_image"], g[f"{name}_label"])


# ---- networks


def check_network(path: Path) -> None:
    g = read(path)
    network = CACNetwork(model_config(path, g), 128).eval()
    state = fill_small(official_keys(network.segmenter, CAC_KEYS) | CAC_PROJECTOR)
    load_state(network.segmenter, deeplab_from_cac(state), path.name, "the segmenter")
    projector = {key.removeprefix("project."): value for key, value in state.items() if key.startswith("project.")}
    network.projector.load_state_dict(projector)

    assert sum(p.numel() for p in network.parameters()) == g["n_params"]
    backbone = len(list(network.segmenter.encoder.parameters()))
    assert backbone == g["n_backbone"]
    assert len(list(network.parameters())) - backbone == g["n_other"]

    segmenter, image = network.segmenter, draw_input(7, g["x"].shape)
    assert_close(image, g["x"])
    caught = Caught(encoder=segmenter.encoder, aspp=segmenter.aspp, decoder=segmenter.decoder)
    with torch.no_grad():
        logits = upsample(segmenter(image), image.shape[-2:], segmenter.align_corners)
        cells = F.avg_pool2d(caught["decoder"], 2)
        projected = F.normalize(network.projector(cells), dim=1)
    same = {"rtol": 1e-4, "atol": 2e-6}
    assert list(logits.shape) == g["logits_shape"].tolist()
    close(logits[..., ::4, ::4], g["logits_sub"], **same)
    close(logits.double().sum((2, 3)), g["logits_sum"], rtol=1e-4, atol=2e-6 * logits[0, 0].numel())
    low, high = caught["encoder"]
    close(high[:, ::16], g["backbone_sub"], **same)
    close(low[:, ::16, ::2, ::2], g["low_sub"], **same)
    close(caught["aspp"][:, ::4], g["aspp_sub"], **same)
    close(caught["decoder"][:, ::8, ::2, ::2], g["decoder_sub"], **same)
    close(projected[:, ::4], g["projector_sub"], **same)


def model_config(path: Path, g: Golden) -> ModelConfig:
    backbone = "resnet101" if "101" in path.name else "resnet50"
    return ModelConfig(g["logits_shape"][1].item(), backbone, head="v3plus_cac", pretrained=False)


def check_key_list(path: Path) -> None:
    keys = read_keys(path)
    backbone = "resnet101" if "101" in path.name else "resnet50"
    model = ModelConfig(keys["classifier.1.bias"][0], backbone, head="v3plus_cac", pretrained=False)
    with torch.device("meta"):
        network = CACNetwork(model, keys["project.2.bias"][0])
    projector = {f"project.{key}": tuple(value.shape) for key, value in network.projector.state_dict().items()}
    assert official_keys(network.segmenter, CAC_KEYS) | projector == keys


# ---- schedule, supervised loss, metrics, evaluation


def check_poly(path: Path) -> None:
    """Rates of everything but the backbone, then of the backbone, as our optimizer has them."""
    g = read(path)
    for name in ("voc", "city"):
        lr, epochs, steps = g[f"{name}_cfg"].tolist()
        model = ModelConfig(3, "resnet18", head="v3plus_cac", channels=8, pretrained=False)
        config = Config(DataConfig("voc", "", ""), model, OptimConfig(lr=lr), RunConfig(), Method())
        optimizer = make_optimizer(config, CACNetwork(model, 8))
        want = torch.cat([g[f"{name}_lr_used"], g[f"{name}_after_last"][None]])
        check_poly_rates(optimizer, want, int(epochs * steps))


def check_supervised(path: Path) -> None:
    """Cross-entropy. Of the other losses in the file there is no trace in the method: the release never calls them."""
    g = read(path)
    logits = g["logits"].requires_grad_()
    loss = cross_entropy(logits, g["target"])
    close(loss, g["ce"], rtol=1e-4, atol=1e-5)
    loss.backward()
    close_gradient(logits.grad, g["ce_grad"])
    close(cross_entropy(logits.detach() / 2, g["target"]), g["ce_temp2"], rtol=1e-4, atol=1e-5)
    nothing = cross_entropy(logits.detach(), torch.full_like(g["target"], IGNORE))
    assert nothing == g["ce_all_ignored"].nan_to_num(0.0)


def check_metrics(path: Path) -> None:
    """Ours is the mean over classes that occur; the released one counts an absent class as 0."""
    g = read(path)
    confusion = ConfusionMatrix(g["logits"].shape[1])
    confusion.update(g["logits"].argmax(1), g["target"])
    counts = confusion.matrix.double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    close(counts.diagonal(), g["inter"], rtol=0, atol=0)
    close(union, g["union"], rtol=0, atol=0)
    assert int(counts.sum()) == g["labeled"]
    assert int(counts.diagonal().sum()) == g["correct"]
    scores = confusion.scores()
    assert np.nan_to_num(scores.per_class_iou) == pytest.approx(g["iou"].numpy(), abs=1e-6)
    assert scores.pixel_accuracy == pytest.approx(float(g["pixacc"]), abs=1e-6)
    if (union > 0).all():
        assert scores.miou == pytest.approx(float(g["miou"]), abs=1e-6)
    empty = ConfusionMatrix(g["logits"].shape[1])
    empty.update(g["logits"].argmax(1), torch.full_like(g["target"], IGNORE))
    assert int(empty.matrix.sum()) == g["ign_labeled"]
    assert int(empty.matrix.diagonal().sum()) == g["ign_correct"]


def check_validation(path: Path) -> None:
    g = read(path)
    height, width = g["x"].shape[-2:]
    multiple = 8
    assert g["padded_shape"][-2:].tolist() == [height + -height % multiple, width + -width % multiple]
    convolution = nn.Conv2d(*g["weight"].shape[1::-1], g["weight"].shape[-1], stride=multiple, padding=1)
    convolution.load_state_dict({"weight": g["weight"], "bias": g["bias"]})
    convolution.align_corners = True
    # Our evaluation takes images in [0,1]; the file has what is already normalized.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.evaluation.inference.normalize", lambda image: image)
        ours, _ = sum_logits(convolution, g["x"], (height, width), Protocol(multiple=multiple))
    close(ours, g["out"], rtol=1e-4, atol=1e-5)


def skip_unused(path: Path) -> None:
    pytest.skip(f"{path.name}: {UNUSED}")


# The first prefix that fits counts.
ADAPTERS: dict[str, Callable[[Path], None]] = {
    "augmentation": check_augmentation,
    "cac_": check_key_list,
    "contrast_": check_contrast,
    "crop_geometry": check_crop_geometry,
    "metrics": check_metrics,
    "network_": check_network,
    "poly_lr": check_poly,
    "rampup": skip_unused,
    "supervised_losses": check_supervised,
    "val_padding": check_validation,
}
