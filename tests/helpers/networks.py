"""The architectures that the tests trace, and the seeds that they print."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastmatch.studies.networks import Block, ChannelLayerNorm


def fresh_seed() -> int:
    """A seed nobody chose; printed, so that a failure can be repeated."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return seed


def mlp(width: int = 24) -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Dropout(), nn.Linear(width, 5)
    )


class VGG(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (6, 10):
            layers += [nn.Conv2d(channels, out, 3, padding=1)]
            layers += [nn.BatchNorm2d(out)] if norm else []
            layers += [nn.ReLU(inplace=True), nn.MaxPool2d(2)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(nn.Linear(10 * 49, 14), nn.ReLU(True), nn.Dropout(), nn.Linear(14, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class ResNet(nn.Module):
    def __init__(
        self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, width: int = 8, inputs: int = 3
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.norm = norm(width)
        self.stage1 = nn.Sequential(Block(width, width, 1, norm), Block(width, width, 1, norm))
        self.stage2 = nn.Sequential(Block(width, 2 * width, 2, norm), Block(2 * width, 2 * width, 1, norm))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage2(self.stage1(F.relu(self.norm(self.stem(x)))))
        return self.head(x.mean(dim=(2, 3)))


class Depthwise(nn.Module):
    """Depthwise-separable convolutions with ReLU6 and a hard-swish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.expand = nn.Conv2d(12, 24, 3, padding=1, groups=12)  # two filters per channel
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.depth(F.relu(self.stem(x))))
        x = F.hardswish(self.expand(F.relu(self.norm(self.point(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(6 + 4 * k), nn.ReLU(), nn.Conv2d(6 + 4 * k, 4, 3, padding=1))
            for k in range(3)
        )
        self.transition = nn.Conv2d(18, 9, 1)
        self.head = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.head(F.relu(self.transition(x)).mean((2, 3)))


class Inception(nn.Module):
    """Parallel branches, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 1)
        self.three = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(3, 7, 1))
        self.norm = nn.BatchNorm2d(17)
        self.out = nn.Conv2d(17, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.one(x), self.three(x), self.pool(x)], 1)
        return self.head(F.relu(self.out(F.relu(self.norm(x)))).amax((2, 3)))


class Grouped(nn.Module):
    """Grouped convolutions: whole groups move, and channels alike inside every group."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.norm = nn.GroupNorm(3, 18)
        self.head = nn.Linear(18, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.grouped(F.relu(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Functional(nn.Module):
    """No modules for what happens between layers: views, in-place writes, chunk, softmax, prelu."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 12) / 4)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.gated = nn.Linear(16, 20)
        self.slope = nn.Parameter(torch.full((10,), 0.2))
        self.last = nn.Linear(10, 8)
        self.mix = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x @ self.first.T
        x *= self.scale
        x.relu_()
        x[:, :6].add_(1.0)
        up, gate = self.gated(x).chunk(2, dim=-1)
        x = F.prelu(up * torch.sigmoid(gate), self.slope)
        x = torch.softmax(self.last(x), dim=-1)
        return self.mix(x.view(-1, 2, 4).flatten(1))


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)
        self.down.weight = nn.Parameter(torch.randn(12, 20) / 5)
        self.again = nn.Linear(20, 12, bias=False)
        self.again.weight = self.down.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x))) + self.again(torch.tanh(self.up(x)))


class Unruly(nn.Module):
    """An operation without a rule (a Fourier transform) is between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = nn.Linear(16, 16)
        self.third = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fft.fft(F.relu(self.first(x)), dim=-1).abs()
        return self.third(F.relu(self.second(x)))


class Encoder(nn.Module):
    """Transformer encoder layers over a sequence, as torch ships them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 16)
        self.body = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)[:, None].repeat(1, 3, 1)).mean(1))


IMAGE, VECTOR = (2, 3, 16, 16), (2, 12)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    # name -> (builder, input shape, groups expected with their sizes)
    "mlp": (mlp, VECTOR, {"0": 24, "2": 24}),
    "vgg": (VGG, IMAGE, {"features.0": 6, "features.4": 10, "classifier.0": 14}),
    "vgg without norm": (lambda: VGG(norm=False), IMAGE, {"features.0": 6, "features.3": 10, "classifier.0": 14}),
    "resnet": (
        ResNet,
        IMAGE,
        {"stem": 8, "stage1.0.conv1": 8, "stage1.1.conv1": 8, "stage2.0.conv1": 16, "stage2.0.conv2": 16,
         "stage2.1.conv1": 16},
    ),
    "resnet with layer norm": (
        lambda: ResNet(ChannelLayerNorm),
        IMAGE,
        {"stem": 8, "stage1.0.conv1": 8, "stage1.1.conv1": 8, "stage2.0.conv1": 16, "stage2.0.conv2": 16,
         "stage2.1.conv1": 16},
    ),
    "depthwise separable": (Depthwise, IMAGE, {"stem": 8, "point": 12, **{f"expand[{k}]": 2 for k in range(12)}}),
    "dense": (Dense, IMAGE, {"stem": 6, "layers.0.2": 4, "layers.1.2": 4, "layers.2.2": 4, "transition": 9}),
    "inception": (Inception, IMAGE, {"one": 4, "three.0": 5, "three.2": 6, "pool.1": 7, "out": 8}),
    "grouped": (Grouped, IMAGE, {"stem": 3, **{f"stem.2[{k}]": 4 for k in range(3)}, **{f"grouped[{k}]": 6 for k in range(3)}}),
    "functional": (
        Functional, VECTOR, {"first": 6, "first.2": 10, "gated": 10, "last": 2, "last.2[0]": 4, "last.2[1]": 4}
    ),
    "tied": (Tied, VECTOR, {"up": 20}),
    "unruly": (Unruly, VECTOR, {"second": 16}),
    "encoder": (
        Encoder,
        VECTOR,
        {"embed": 16, **{
            name: size
            for layer in ("body.layers.0", "body.layers.1")
            for name, size in {
                f"{layer}.self_attn": 4, **{f"{layer}.self_attn.{n}[{k}]": 4 for n in (2, 3) for k in range(4)},
                f"{layer}.linear1": 24,
            }.items()
        }},
    ),
}  # fmt: skip


def build(name: str, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """(network in eval mode with running statistics of its own, example input), from a seed."""
    make, shape, _ = NETWORKS[name]
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
                for parameter in module.parameters():
                    parameter.uniform_(0.5, 1.5)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model, torch.randn(*shape)
