"""Export of every kind of network for images of any size; 15 seconds per network."""

from dataclasses import replace

import pytest
import torch

from common.config.sections import ModelConfig
from common.evaluation.export import MIN_SIDE, Deployed, export_network
from common.evaluation.inference import Protocol
from common.evaluation.metainfo import default_metainfo
from common.models import build_network

NETWORKS = [
    ({"head": "v3plus"}, Protocol()),
    ({"head": "v3plus", "stem": "deep", "output_stride": 8}, Protocol(flip=True)),
    ({"head": "v3plus_cac"}, Protocol(multiple=8)),
    ({"head": "v3plus_cps", "stem": "deep"}, Protocol()),
    ({"head": "v3plus_memory_bank", "input_mean": (127.5, 127.5, 127.5), "bgr": True}, Protocol()),
    ({"head": "v2", "output_stride": 8}, Protocol(reduce=2)),
    ({"head": "v2_coco", "output_stride": 8}, Protocol()),
]


@pytest.mark.parametrize(("model", "protocol"), NETWORKS, ids=lambda value: getattr(value, "get", str)("head"))
def test_export(tmp_path, model, protocol):
    network = build_network(ModelConfig(5, "resnet18", channels=8, pretrained=False, **model)).eval()
    export_network(network, replace(default_metainfo(5), protocol=protocol), tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2").module()
    for size in ((1, 3, MIN_SIDE, MIN_SIDE), (2, 3, 81, 95), (1, 3, 160, 88), (1, 3, 101, 240)):
        image = torch.randint(0, 256, size, dtype=torch.uint8)
        torch.testing.assert_close(program(image), Deployed(network, protocol)(image), rtol=0, atol=1e-4)
