"""The Inception network of FID, as a graph whose parameters have torchvision's names.

It is the network of 2015-12-05 that Szegedy et al. (arXiv 1512.00567) describe, as TensorFlow released it. From
torchvision's `inception_v3` it differs in four ways: average pooling does not count the padding, the last block pools
by the maximum, there are 1,008 classes, and there is no auxiliary classifier.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..protocols import Protocol
from .network import NetworkExtractor, downloaded, load_weights

SIDE = 299  # pixels of the input
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of sFID
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class ConvUnit(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        return F.relu(self.bn(self.conv(x)))


class Unit(NamedTuple):
    """A `ConvUnit` of a block: its name, channels and kernel (height, width); with stride 2 it is not padded."""

    name: str
    outputs: int
    kernel: int | tuple[int, int]
    stride: int = 1


Step = Unit | tuple[Unit, ...] | str  # a tuple is of units with the same input, whose outputs are concatenated
Path = tuple[Step, ...]

POOLING = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halving": lambda x: F.max_pool2d(x, 3, stride=2),
}


class MixedBlock(nn.Module):
    """Paths with the same input, each a chain of units and pooling; their outputs are concatenated in this order."""

    def __init__(self, inputs: int, *paths: Path):
        super().__init__()
        self.paths = paths
        self.outputs = 0
        for path in paths:
            channels = inputs
            for step in path:
                if isinstance(step, str):
                    continue
                units = (step,) if isinstance(step, Unit) else step
                for unit in units:
                    padded = unit.stride == 1
                    module = ConvUnit(channels, unit.outputs, unit.kernel, unit.stride, padded)
                    self.add_module(unit.name, module)
                channels = sum(unit.outputs for unit in units)
            self.outputs += channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, `outputs`, H', W']."""
        return torch.cat([self.follow(path, x) for path in self.paths], dim=1)

    def follow(self, path: Path, x: torch.Tensor) -> torch.Tensor:
        """The output of one path."""
        for step in path:
            if isinstance(step, str):
                x = POOLING[step](x)
            elif isinstance(step, Unit):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(unit.name)(x) for unit in step], dim=1)
        return x


def block_35(inputs: int, pooled: int) -> MixedBlock:
    """A block on 35×35 positions (figure 5 of the paper)."""
    return MixedBlock(
        inputs,
        (Unit("branch1x1", 64, 1),),
        (Unit("branch5x5_1", 48, 1), Unit("branch5x5_2", 64, 5)),
        (Unit("branch3x3dbl_1", 64, 1), Unit("branch3x3dbl_2", 96, 3), Unit("branch3x3dbl_3", 96, 3)),
        ("average", Unit("branch_pool", pooled, 1)),
    )


def block_35_to_17(inputs: int) -> MixedBlock:
    """From 35×35 to 17×17 positions (figure 10)."""
    return MixedBlock(
        inputs,
        (Unit("branch3x3", 384, 3, 2),),
        (Unit("branch3x3dbl_1", 64, 1), Unit("branch3x3dbl_2", 96, 3), Unit("branch3x3dbl_3", 96, 3, 2)),
        ("halving",),
    )


def block_17(inputs: int, width: int) -> MixedBlock:
    """A block on 17×17 positions (figure 6, n = 7)."""
    row, column = (1, 7), (7, 1)
    return MixedBlock(
        inputs,
        (Unit("branch1x1", 192, 1),),
        (Unit("branch7x7_1", width, 1), Unit("branch7x7_2", width, row), Unit("branch7x7_3", 192, column)),
        (
            Unit("branch7x7dbl_1", width, 1),
            Unit("branch7x7dbl_2", width, column),
            Unit("branch7x7dbl_3", width, row),
            Unit("branch7x7dbl_4", width, column),
            Unit("branch7x7dbl_5", 192, row),
        ),
        ("average", Unit("branch_pool", 192, 1)),
    )


def block_17_to_8(inputs: int) -> MixedBlock:
    """From 17×17 to 8×8 positions."""
    return MixedBlock(
        inputs,
        (Unit("branch3x3_1", 192, 1), Unit("branch3x3_2", 320, 3, 2)),
        (
            Unit("branch7x7x3_1", 192, 1),
            Unit("branch7x7x3_2", 192, (1, 7)),
            Unit("branch7x7x3_3", 192, (7, 1)),
            Unit("branch7x7x3_4", 192, 3, 2),
        ),
        ("halving",),
    )


def block_8(inputs: int, pooling: str) -> MixedBlock:
    """A block on 8×8 positions (figure 7)."""
    row, column = (1, 3), (3, 1)
    return MixedBlock(
        inputs,
        (Unit("branch1x1", 320, 1),),
        (Unit("branch3x3_1", 384, 1), (Unit("branch3x3_2a", 384, row), Unit("branch3x3_2b", 384, column))),
        (
            Unit("branch3x3dbl_1", 448, 1),
            Unit("branch3x3dbl_2", 384, 3),
            (Unit("branch3x3dbl_3a", 384, row), Unit("branch3x3dbl_3b", 384, column)),
        ),
        (pooling, Unit("branch_pool", 192, 1)),
    )


class InceptionOutput(NamedTuple):
    """What FID's tools read off the network for N images."""

    pool: torch.Tensor  # [N, 2048], the last features, averaged over positions
    spatial: torch.Tensor  # [N, 2023], sFID's: 17×17 positions of 7 channels, the channels last
    logits: torch.Tensor  # [N, 1008], without the bias


class InceptionNetwork(nn.Module):
    """The network, from images that are resized and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3, padded=False)
        self.Mixed_5b = block_35(192, 32)
        self.Mixed_5c = block_35(256, 64)
        self.Mixed_5d = block_35(288, 64)
        self.Mixed_6a = block_35_to_17(288)
        self.Mixed_6b = block_17(768, 128)
        self.Mixed_6c = block_17(768, 160)
        self.Mixed_6d = block_17(768, 160)
        self.Mixed_6e = block_17(768, 192)
        self.Mixed_7a = block_17_to_8(768)
        self.Mixed_7b = block_8(1280, "average")
        self.Mixed_7c = block_8(2048, "maximum")
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: torch.Tensor) -> InceptionOutput:
        """Images [N, 3, 299, 299] in about [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # [N, 192, 71, 71]
        x = F.max_pool2d(x, 3, stride=2)  # [N, 192, 35, 35]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # [N, 288, 35, 35]
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # [N, 768, 17, 17]
        # sFID reads Mixed_6d.branch1x1, whose channels come first; its published moments have the channels last
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # [N, 17·17·7]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # [N, 2048, 8, 8]
        pool = x.mean(dim=(2, 3))  # [N, 2048]
        return InceptionOutput(pool, spatial, F.linear(pool, self.fc.weight))


def load(
    argument: None, *, protocol: Protocol, device: torch.device | str, weights: str | None, trust_remote_code: bool
) -> NetworkExtractor:
    """The network with its weights: from a file, or downloaded once."""
    network = InceptionNetwork()
    path = weights or downloaded(URL, SHA256, also=("weights-inception-2015-12-05-6726825d.pth",))
    load_weights(network, path, "FID's Inception network")
    return extractor(network, protocol, device)


def extractor(network: InceptionNetwork, protocol: Protocol, device: torch.device | str = "cpu") -> NetworkExtractor:
    """The network's features of images prepared as a protocol says."""

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        output = network(x)
        logits = output.logits + network.fc.bias if protocol.logits_bias else output.logits
        return {"pool": output.pool, "spatial": output.spatial, "logits": logits}

    return NetworkExtractor(
        "inception",
        forward,
        network,
        provides=("pool", "spatial", "logits"),
        size=(SIDE, SIDE),
        resize=protocol.inception_resize,
        mean=protocol.inception_centre,
        deviation=protocol.inception_centre,
        device=device,
        settings=[protocol.logits_bias],
    )
