"""Prediction of images from a run folder, and export of the network."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.config.sections import DataConfig, ModelConfig, RunConfig
from common.datasets.reader import read_picture, voc_palette
from common.engine import checkpoint_files
from common.engine.run_folder import check_folder, open_folder
from common.errors import UserError
from common.evaluation.export import MIN_SIDE, Deployed, export_network
from common.evaluation.inference import Protocol, predict
from common.evaluation.metainfo import MetaInfo, default_metainfo, read_metainfo, write_metainfo
from common.models import build_network
from common.predict import load_predictor, main

MODEL = ModelConfig(3, "resnet18", channels=8, pretrained=False)
SIZES = {"a": (40, 52), "sub/b": (40, 52), "c": (3, 70), "gray": (33, 20)}


@dataclass
class SimpleConfig:
    """Config of a run without a paper."""

    run: RunConfig


METAINFO = MetaInfo(("road", "sky", "car"), voc_palette(), Protocol(multiple=8))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    content = {"data": vars(DataConfig("voc", "gone", "gone")), "model": vars(MODEL) | {"pretrained": True}}
    (folder / "config.json").write_text(json.dumps(content | {"method": {"of": "a paper"}, "run": {"steps": 4}}))
    torch.manual_seed(0)
    network = build_network(MODEL)
    for step in (2, 4):
        nn.init.normal_(network.classifier[-1].weight)
        checkpoint_files.write(folder / "checkpoints", {"step": step, "epoch": None}, network.state_dict())
    checkpoint_files.point(folder / "checkpoints", "last", 4)
    write_metainfo(folder, METAINFO)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    (folder / "sub").mkdir()
    for name, size in SIZES.items():
        pixels = rng.integers(0, 256, size if name == "gray" else (*size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def call(*arguments: object) -> None:
    main([*map(str, arguments), "-d", "cpu"])


def expected(run: Path, file: Path, protocol: Protocol = Protocol(multiple=8)) -> torch.Tensor:
    network = build_network(MODEL)
    network.load_state_dict(checkpoint_files.load_file(run / "checkpoints" / "last" / "model.safetensors"))
    image = read_picture(file)
    return predict(network, image[None], tuple(image.shape[-2:]), protocol)[0]


def test_every_image_of_a_folder(run, images, tmp_path, capsys):
    call(run, images, "--out", tmp_path, "--save", "mask", "overlay", "probability", "--batch-size", 2)
    assert "4 of 4 images" in capsys.readouterr().out
    for name, size in SIZES.items():
        want = expected(run, images / f"{name}.png")
        mask = Image.open(tmp_path / "mask" / f"{name}.png")
        assert np.array_equal(np.asarray(mask), want.argmax(0).numpy()) and mask.mode == "P"
        probability = np.load(tmp_path / "probability" / f"{name}.npy")
        np.testing.assert_allclose(probability, want.numpy(), atol=2e-3)
        assert probability.dtype == np.float16
        overlay = np.asarray(Image.open(tmp_path / "overlay" / f"{name}.png"))
        assert overlay.shape == (*size, 3)
        # VOC's background is black and leaves the image as it is, but for borders.
        pixels = read_picture(images / f"{name}.png").permute(1, 2, 0).numpy()
        kept = (overlay == 255).all(-1) | (overlay == pixels).all(-1)
        assert kept[np.asarray(mask) == 0].all()


def test_one_image_by_a_checkpoint_and_another_protocol(run, images, tmp_path, capsys):
    checkpoint = run / "checkpoints" / "step_00000004"
    call(checkpoint, images / "a.png", "--out", tmp_path, "--sliding", 32, "--flip", "--save", "mask")
    want = expected(run, images / "a.png", Protocol((32, 32), flip=True)).argmax(0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "mask" / "a.png")), want.numpy())
    assert "sliding window 32x32" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]


def test_16_bit_images_are_scaled_as_in_training(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other, symlinks=True)
    config = json.loads((other / "config.json").read_text())
    config["data"]["image_range"] = [0, 4095]
    (other / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(0).integers(0, 4096, (40, 52)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    Image.fromarray((values / 4095 * 255).round().astype(np.uint8)).save(tmp_path / "plain.png")
    call(other, tmp_path / "deep.png", "--out", tmp_path / "out", "--save", "probability")
    probability = np.load(tmp_path / "out" / "probability" / "deep.npy")
    np.testing.assert_allclose(probability, expected(run, tmp_path / "plain.png").numpy(), atol=2e-3)


def test_a_bad_file_is_named_and_the_others_are_predicted(run, images, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "good.png").write_bytes((images / "a.png").read_bytes())
    (folder / "no_picture.png").write_text("<html>")
    (folder / "torn.png").write_bytes((images / "a.png").read_bytes()[:900])
    with pytest.raises(SystemExit) as ended:
        call(run, folder, "--out", folder / "out")
    output = capsys.readouterr()
    assert ended.value.code == 2 and "2 of 3 images could not be read" in output.err
    assert "no_picture.png" in output.out and "torn.png" in output.out
    assert [path.name for path in (folder / "out" / "mask").iterdir()] == ["good.png"]
    (folder / "no_picture.png").unlink(), (folder / "torn.png").unlink()
    call(run, folder, "--out", folder / "out")  # what was written is not taken for images
    assert "1 of 1 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}"], "give either images"),
        (["{run}", "{images}"], "--out FOLDER is missing"),
        (["{run}/none", "{images}", "--out", "{out}"], "does not exist"),
        (["{images}", "{images}", "--out", "{out}"], "is not a run folder"),
        (["{run}", "{images}/sub/none.png", "--out", "{out}"], "no such file or folder"),
        (["{run}", "{run}/checkpoints", "--out", "{out}"], "no images in"),
        (["{run}", "{images}", "--out", "{out}", "-e", "0-"], "selects 2 checkpoints; give one"),
        (["{run}", "{images}", "--out", "{images}/a.png"], "pictures cannot be written"),
        (["{run}", "--export", "{out}/network.tflite"], "must end in .pt2 (for PyTorch) or .onnx"),
        (["{run}", "{images}", "--out", "{out}", "--half"], "--half goes with --export"),
        (["{run}", "--export", "{out}/network.pt2", "--sliding", "32"], "add --whole"),
        (["{run}", "--export", "{out}/network.pt2", "--scales", "0.5"], "leave --scales away"),
    ],
)
def test_wrong_arguments_are_refused_in_two_lines(run, images, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        call(*(text.format(run=run, images=images, out=tmp_path) for text in arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and words in error and len(error.splitlines()) <= 2, error


def test_metainfo_is_read_as_it_was_written(run, tmp_path):
    metainfo = read_metainfo(run, 3)
    assert (metainfo.classes, metainfo.protocol) == (METAINFO.classes, METAINFO.protocol)
    write_metainfo(tmp_path, replace(METAINFO, protocol=Protocol((32, 48), (0.5, 1.0), True)))
    assert read_metainfo(tmp_path, 3).protocol == Protocol((32, 48), (0.5, 1.0), True)
    assert read_metainfo(tmp_path / "none", 3) is None
    with pytest.raises(UserError, match=r"names 3 classes, but the network of .* has 5"):
        read_metainfo(tmp_path, 5)
    (tmp_path / "run.json").write_text('{"classes": []}')
    with pytest.raises(UserError, match="damaged"):
        read_metainfo(tmp_path, 3)


def test_metainfo_and_script_share_run_json(tmp_path):
    config = SimpleConfig(RunConfig(steps=4))
    for _ in range(2):  # a new run, and the same run continued
        open_folder(tmp_path, "toy/train.py", config)
        write_metainfo(tmp_path, METAINFO)
        open_folder(tmp_path, "toy/train.py", config)
    check_folder(tmp_path, "toy/train.py", config)
    assert read_metainfo(tmp_path, 3).classes == METAINFO.classes
    with pytest.raises(UserError, match=r"is a run of toy/train\.py"):
        check_folder(tmp_path, "toy/other.py", config)


@pytest.mark.parametrize("key", ["colors", "colours"])
def test_metainfo_of_earlier_versions_is_read_from_usage_json(tmp_path, key):
    (tmp_path / "run.json").write_text('{"script": "toy/train.py"}')
    protocol = {"crop": [32, 48], "scales": [1.0], "flip": False, "multiple": 1, "reduce": 1}
    content = {"classes": ["road", "sky"], key: [[1, 2, 3], [4, 5, 6]], "protocol": protocol}
    (tmp_path / "usage.json").write_text(json.dumps(content))
    metainfo = read_metainfo(tmp_path, 2)
    assert metainfo.classes == ("road", "sky") and metainfo.protocol == Protocol((32, 48))
    assert metainfo.palette[:2].tolist() == [[1, 2, 3], [4, 5, 6]]


class Toy(nn.Module):
    align_corners = True

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, stride=4, padding=1), nn.BatchNorm2d(3))

    def forward(self, image):
        return self.layers(image)


@pytest.mark.parametrize("protocol", [Protocol(multiple=8, flip=True), Protocol(reduce=2)])
def test_exported_programs_take_any_size(tmp_path, protocol):
    """The networks themselves are exported by the stress tests and the commands of docs/predict.md."""
    torch.manual_seed(0)
    network = Toy().eval()
    metainfo = default_metainfo(3)
    export_network(network, MetaInfo(metainfo.classes, metainfo.palette, protocol), tmp_path / "toy.pt2")
    extra = {"metainfo.json": ""}
    program = torch.export.load(tmp_path / "toy.pt2", extra_files=extra).module()
    assert json.loads(extra["metainfo.json"])["classes"] == list(metainfo.classes)
    for size in ((3, 3, MIN_SIDE, MIN_SIDE), (1, 3, 99, 121), (1, 3, 160, 88), (2, 3, 81, 240)):
        image = torch.randint(0, 256, size, dtype=torch.uint8)
        torch.testing.assert_close(program(image), Deployed(network, protocol)(image), rtol=0, atol=1e-5)


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    program = type("Program", (), {"module": lambda self: lambda image: torch.zeros(1)})()
    monkeypatch.setattr("torch.export.export", lambda *args, **kwargs: program)
    with pytest.raises(UserError, match="not the trained one"):
        export_network(Toy().eval(), default_metainfo(3), tmp_path / "toy.pt2")
    assert not (tmp_path / "toy.pt2").exists()


def test_the_function_predicts_what_the_command_does(run, images, tmp_path):
    predictor = load_predictor(run, device="cpu")
    assert predictor.classes == METAINFO.classes and predictor.protocol == METAINFO.protocol
    pictures = [Image.open(images / f"{name}.png") for name in SIZES]
    for as_given in (lambda picture: picture, lambda picture: np.asarray(picture)):  # also the gray one
        found = predictor([as_given(picture) for picture in pictures])
        for (name, size), (label, confidence) in zip(SIZES.items(), found, strict=True):
            want = expected(run, images / f"{name}.png")
            assert label.dtype == np.uint8 and confidence.dtype == np.float32 and label.shape == size
            assert np.array_equal(label, want.argmax(0).numpy())
            np.testing.assert_allclose(confidence, want.max(0).values.numpy(), atol=1e-5)
    label, confidence = predictor(pictures[0].convert("RGBA"))
    assert np.array_equal(label, found[0][0]) and np.allclose(confidence, found[0][1])
    assert predictor([]) == []


def test_the_function_takes_a_checkpoint_and_a_protocol(run, images):
    protocol = Protocol((32, 32), flip=True)
    checkpoint = load_predictor(str(run / "checkpoints" / "step_00000004"), device="cpu", protocol=protocol)
    label, _ = checkpoint(Image.open(images / "a.png"))
    assert np.array_equal(label, expected(run, images / "a.png", protocol).argmax(0).numpy())
    assert not np.array_equal(label, load_predictor(run, "2", "cpu")(Image.open(images / "a.png"))[0])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), r"image 1 is an array float32 \[4, 4, 3\]; give 8-bit PIL images, or arrays"),
        (np.zeros((3, 4, 4), np.uint8), r"an array uint8 \[3, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"an array uint8 \[0, 4, 3\]"),
        (Image.new("I;16", (4, 4)), "a picture of mode I;16"),
        ("a.png", "image 1 is str"),
    ],
)
def test_the_function_refuses_other_pictures(run, image, words):
    with pytest.raises(UserError, match=words):
        load_predictor(run, device="cpu")([Image.new("RGB", (9, 9)), image])


def test_a_device_that_does_not_exist_is_an_error(run):
    with pytest.raises(UserError, match="device cuda:99 does not exist"):
        load_predictor(run, device="cuda:99")
