"""The networks: shapes, sizes, start of training, and the three kinds of names."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.config import load_config
from disttrain.errors import UsageError
from disttrain.models import CATALOG, build_model, check_model_name, parameter_count
from disttrain.models.speednet import Whitening
from kit import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def build(
    name: str, shape: tuple[int, int, int] = (3, 32, 32), num_classes: int = 10, **args: Any
) -> nn.Module:
    channels, height, width = shape
    return build_model(
        name, num_classes=num_classes, in_channels=channels, image_size=(height, width), args=args
    )


# --- The catalog ------------------------------------------------------------------------------------


def conv(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2 + outputs


def linear(*widths: int) -> int:
    return sum(a * b + b for a, b in pairwise(widths))


def conv_bn(inputs: int, outputs: int, kernel: int) -> int:
    return inputs * outputs * kernel**2 + 2 * outputs


def vgg(widths: list[int]) -> int:
    return sum(conv_bn(a, b, 3) for a, b in pairwise([3, *widths])) + linear(512, 10)


def inception(inputs: int, direct: int, reduced: int, three: int, five: int, pooled: int) -> int:
    reductions = 2 * conv_bn(inputs, reduced, 1)
    larger = conv_bn(reduced, three, 3) + conv_bn(reduced, five, 5)
    return conv_bn(inputs, direct, 1) + reductions + larger + conv_bn(inputs, pooled, 1)


PARAMETERS = {
    "cnn_mnist": conv(1, 8, 3) + conv(8, 16, 3) + linear(784, 10),
    "lenet5": 61_706,  # the figure usually given for LeNet-5 with a full C3
    "lenet_bn": conv(3, 6, 5) + conv(6, 16, 5) + 2 * 16 + linear(400, 120, 84, 10),
    "speednet": 1_972_792,  # Jordan 2024 gives 1.97 million for airbench94
    "traffic_cnn": conv(3, 4, 5) + conv(4, 10, 5) + linear(10 * 5 * 5, 10),
    "convnet4": 89_578,  # that of Caffe's cifar10_full, a port of the same network
    "alexnet_cifar": conv(3, 64, 4)
    + conv(64, 192, 4)
    + conv(192, 384, 3)
    + conv(384, 256, 3)
    + conv(256, 256, 3)
    + linear(1024, 512, 256, 10),
    "vgg16": vgg([64] * 2 + [128] * 2 + [256] * 3 + [512] * 6),
    "vgg19": vgg([64] * 2 + [128] * 2 + [256] * 4 + [512] * 8),
    "resnet18": 11_173_962,  # with a CIFAR stem, as published with many CIFAR-10 results
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "inception_small": conv_bn(3, 64, 3)
    + conv_bn(64, 192, 3)
    + inception(192, 64, 64, 128, 32, 32)
    + inception(256, 128, 64, 192, 96, 64)
    + inception(480, 192, 96, 208, 48, 64)
    + inception(512, 256, 128, 320, 128, 128)
    + inception(832, 256, 128, 320, 128, 128)
    + inception(832, 384, 128, 384, 128, 128)
    + linear(1024, 10),
}


@pytest.mark.parametrize("name", CATALOG)
def test_parameter_count_at_the_native_size(name: str) -> None:
    assert parameter_count(build(name, CATALOG[name].input_shape)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
)
def test_large_images_get_the_published_imagenet_network(name: str, count: int) -> None:
    assert parameter_count(build(name, (3, 224, 224), num_classes=1000)) == count


@pytest.mark.integration
@pytest.mark.parametrize("name", CATALOG)
def test_training_starts_at_chance_and_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    shape, num_classes = CATALOG[name].input_shape, 10
    model = build(name, shape, num_classes)
    batch = 8 if parameter_count(model) < 1e6 else 2
    # The mean over all labels: the loss that is expected of labels drawn at random.
    loss = -torch.log_softmax(model(torch.randn(batch, *shape)), dim=1).mean()
    assert loss.item() == pytest.approx(math.log(num_classes), rel=0.1)
    labels = torch.arange(batch) % num_classes
    nn.functional.cross_entropy(model(torch.randn(batch, *shape)), labels).backward()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    unreached = [key for key, value in trained.items() if value.grad is None or not value.grad.any().item()]
    assert unreached == []


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("cnn_mnist", (1, 8, 8)),
        ("cnn_mnist", (3, 32, 32)),
        ("cnn_mnist", (3, 21, 40)),
        ("lenet5", (3, 32, 32)),
        ("lenet_bn", (1, 28, 28)),
        ("lenet_bn", (3, 48, 20)),
        ("traffic_cnn", (3, 64, 64)),
        ("convnet4", (1, 8, 8)),
        ("alexnet_cifar", (3, 64, 48)),
        ("vgg16", (3, 64, 33)),
        ("vgg19", (1, 32, 32)),
        ("resnet18", (1, 8, 8)),
        ("resnet34", (3, 65, 40)),
        ("resnet50", (1, 28, 28)),
        ("inception_small", (1, 28, 28)),
    ],
)
def test_other_image_sizes(name: str, shape: tuple[int, int, int]) -> None:
    model = build(name, shape, num_classes=7)
    assert model(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "smallest"),
    [
        ("cnn_mnist", 4),
        ("lenet5", 12),
        ("lenet_bn", 16),
        ("traffic_cnn", 16),
        ("alexnet_cifar", 18),
        ("vgg16", 32),
        ("vgg19", 32),
        ("inception_small", 5),
    ],
)
def test_too_small_images_are_refused_with_the_smallest_size(name: str, smallest: int) -> None:
    build(name, (3, smallest, smallest))
    with pytest.raises(UsageError, match=f"{name}: .* the smallest are {smallest}x{smallest}$"):
        build(name, (3, smallest + 9, smallest - 1))


@pytest.mark.parametrize(
    ("activation", "expected"), [("relu", nn.ReLU), ("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid)]
)
def test_convnet4_activation(activation: str, expected: type[nn.Module]) -> None:
    model = build("convnet4", activation=activation)
    activations = [
        type(layer) for layer in model.modules() if isinstance(layer, (nn.ReLU, nn.Tanh, nn.Sigmoid))
    ]
    assert activations == [expected] * 3


def test_same_seed_same_weights_and_the_check_draws_nothing() -> None:
    torch.manual_seed(3)
    first, after_first = build("alexnet_cifar"), torch.rand(1)
    torch.manual_seed(3)
    second, after_second = build("alexnet_cifar"), torch.rand(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(after_first, after_second)


def test_a_new_network_is_in_training_mode_with_untouched_statistics() -> None:
    model = build("resnet18")
    assert all(module.training for module in model.modules())
    assert all(int(value) == 0 for key, value in model.named_buffers() if key.endswith("num_batches_tracked"))


# --- Names and arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CATALOG, "torchvision:resnet50", "torchvision:nonesuch", "a.b:Net"])
def test_well_formed_names(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", r"unknown model 'resnet81'; did you mean resnet18\?.*`disttrain models`"),
        ("xyz", "unknown model 'xyz'; choose one of `disttrain models`"),
        ("my_models.Net", "package.module:Class"),
        ("", "unknown model ''"),
        ("torchvision:", "torchvision:NAME"),
        ("torchvision:resnet 50", "torchvision:NAME"),
        (":Net", "package.module:Class"),
        ("a..b:Net", "package.module:Class"),
        ("a-b:Net", "package.module:Class"),
        ("a:b:Net", "package.module:Class"),
    ],
)
def test_malformed_and_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_model_name(name)
    with pytest.raises(UsageError, match=message):
        build(name)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        (
            "convnet4",
            {"activatoin": "tanh"},
            r"model\.args\.activatoin: .*mean activation\?; accepted: activation$",
        ),
        (
            "resnet18",
            {"dropout": 0.1},
            r"resnet18: model\.args\.dropout: unknown argument; this model takes no arguments",
        ),
        ("convnet4", {"activation": "gelu"}, r"model\.args\.activation: .*relu, tanh, sigmoid, got 'gelu'"),
        ("vgg16", {"dropout": 2.0}, "vgg16: cannot be built: .*dropout probability"),
        ("vgg16", {"num_classes": 5}, r"model\.args\.num_classes: set model\.num_classes"),
        ("vgg16", {"in_channels": 5}, r"model\.args\.in_channels: comes from the data set"),
    ],
)
def test_wrong_arguments(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(name, num_classes=10, in_channels=3, image_size=(32, 32), args=args)


def test_checking_names_imports_no_torch() -> None:
    code = """if True:
        import sys
        from disttrain.models import check_model_name
        for name in ("resnet18", "torchvision:resnet50", "my_models:Net"):
            check_model_name(name)
        assert not {"torch", "torchvision"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- torchvision ------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "shape", "args"),
    [
        ("resnet18", (3, 32, 32), {"zero_init_residual": True}),
        ("mobilenet_v3_small", (3, 32, 32), {}),
        ("googlenet", (3, 32, 32), {}),
        ("inception_v3", (3, 75, 75), {}),
        ("vit_b_32", (3, 64, 64), {"dropout": 0.1}),
    ],
)
def test_torchvision_networks(name: str, shape: tuple[int, int, int], args: dict[str, Any]) -> None:
    model = build(f"torchvision:{name}", shape, num_classes=5, **args)
    assert model.training
    assert model(torch.rand(2, *shape)).shape == (2, 5)  # one tensor, in training mode too


@pytest.mark.parametrize(
    ("name", "shape", "args", "message"),
    [
        ("resnt18", (3, 32, 32), {}, r"resnt18: torchvision has no classifier .*did you mean resnet18\?"),
        ("fcn_resnet50", (3, 32, 32), {}, "torchvision has no classifier"),
        ("resnet18", (1, 28, 28), {}, "take 3 channels, but the images have 1"),
        (
            "resnet18",
            (3, 32, 32),
            {"grups": 2},
            r"model\.args\.grups: .*mean groups\?; accepted: zero_init_residual",
        ),
        ("resnet18", (3, 32, 32), {"num_classes": 2}, r"model\.args\.num_classes: set model\.num_classes"),
        ("resnet18", (3, 32, 32), {"weights": "DEFAULT"}, r"model\.args\.weights: .*random weights"),
        ("alexnet", (3, 32, 32), {}, "alexnet: fails on an image of 3x32x32: RuntimeError: .*too small"),
    ],
)
def test_torchvision_mistakes(
    name: str, shape: tuple[int, int, int], args: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(
            f"torchvision:{name}", num_classes=10, in_channels=shape[0], image_size=shape[1:], args=args
        )


# --- Networks of the user ---------------------------------------------------------------------------

OwnModule = Callable[[str], None]


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OwnModule:
    """Returns a function that writes `own_networks.py` into a new current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setitem(sys.modules, "own_networks", None)  # type: ignore[arg-type]  removed again afterwards
    monkeypatch.delitem(sys.modules, "own_networks")

    def write(code: str) -> None:
        (tmp_path / "own_networks.py").write_text(f"import torch\nfrom torch import nn\n{code}")

    return write


@pytest.mark.parametrize(
    ("signature", "received"),
    [
        (
            "num_classes, in_channels, image_size, width=4",
            {"num_classes": 6, "in_channels": 1, "image_size": (8, 9), "width": 5},
        ),
        ("*, num_classes, width", {"num_classes": 6, "width": 5}),
        ("**kwargs", {"kwargs": {"num_classes": 6, "width": 5}}),
        (
            "width, image_size=None, **kwargs",
            {"kwargs": {"num_classes": 6}, "image_size": (8, 9), "width": 5},
        ),
    ],
)
@pytest.mark.parametrize("target", ["Net", "make"])
def test_own_network_gets_what_its_signature_names(
    own_module: OwnModule, target: str, signature: str, received: dict[str, Any]
) -> None:
    own_module(f"""
class Net(nn.Sequential):
    def __init__(self, {signature}):
        received = {{key: value for key, value in locals().items() if key not in ("self", "__class__")}}
        super().__init__(nn.Flatten(), nn.Linear(8 * 9, 6))
        self.received = received
def make({signature}):
    received = locals()
    net = nn.Sequential(nn.Flatten(), nn.Linear(8 * 9, 6))
    net.received = received
    return net
""")
    model = build(f"own_networks:{target}", (1, 8, 9), num_classes=6, width=5)
    assert model.received == received


def test_checking_an_own_network_leaves_no_trace(own_module: OwnModule) -> None:
    own_module("""
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.linear, self.frozen = nn.Linear(3, num_classes), nn.Dropout()
        self.frozen.eval()
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, images):
        self.calls.add_(1)
        return self.linear(images.mean((2, 3)) + torch.rand(3))
""")
    torch.manual_seed(0)
    expected = nn.Linear(3, 10).weight, torch.rand(1)
    torch.manual_seed(0)
    model = build("own_networks:Net")
    assert torch.equal(model.linear.weight, expected[0])
    assert torch.equal(torch.rand(1), expected[1])
    assert model.calls.item() == 0
    assert (model.training, model.linear.training, model.frozen.training) == (True, True, False)


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("Nett", {}, r"module own_networks has no Nett; did you mean Net\?"),
        ("SIZE", {}, "SIZE is of type int, not a class or function"),
        ("text", {}, r"returns a str, expected a torch\.nn\.Module"),
        ("Net", {}, r"model\.args\.width is missing"),
        (
            "Net",
            {"width": 1, "widht": 2},
            r"model\.args\.widht: unknown argument; did you mean width\?; accepted: width",
        ),
        ("Net", {"width": -1}, "own_networks:Net: cannot be built: .*width must be positive"),
        ("Net", {"width": 11}, r"returns \[1, 11\] for one image of 3x32x32, expected scores \[1, 10\]"),
        (
            "two_outputs",
            {},
            r"returns a value of type tuple for one image of 3x32x32, expected scores \[1, 10\]",
        ),
        ("misfit", {}, "fails on an image of 3x32x32: RuntimeError: .*shapes cannot be multiplied"),
    ],
)
def test_own_network_mistakes(own_module: OwnModule, target: str, args: dict[str, Any], message: str) -> None:
    own_module("""
SIZE = 32
class Net(nn.Sequential):
    def __init__(self, *, num_classes, width):
        if width < 0:
            raise ValueError("width must be positive")
        super().__init__(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, width))
class Pair(nn.Module):
    def forward(self, images):
        return images, images
def two_outputs():
    return Pair()
def misfit():
    return nn.Linear(7, 7)
def text():
    return "net"
""")
    with pytest.raises(UsageError, match=message):
        build(f"own_networks:{target}", **args)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nonesuch", "cannot import own_networks: ModuleNotFoundError: No module named 'nonesuch'"),
        ("def (", "cannot import own_networks: SyntaxError"),
        ("1 / 0", "cannot import own_networks: ZeroDivisionError"),
    ],
)
def test_own_module_that_cannot_be_imported(own_module: OwnModule, code: str, message: str) -> None:
    own_module(code)
    with pytest.raises(UsageError, match=message):
        build("own_networks:Net")


def test_missing_module() -> None:
    with pytest.raises(UsageError, match=r"cannot import nonesuch\.networks: ModuleNotFoundError"):
        build("nonesuch.networks:Net")


# --- The configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_says_what_it_reproduces(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    check_model_name(config.model.name)
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_every_network_of_the_catalog_has_a_config() -> None:
    assert set(CATALOG) <= {load_config(path).model.name for path in CONFIGS}


SHAPES = {
    "digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224),
    "imagenette": (3, 128, 128),
}  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_builds_its_network_for_its_images(path: Path) -> None:
    config = load_config(path)
    shape = SHAPES[config.data.name]
    model = build(config.model.name, shape, **config.model.args).eval()
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


# --- speednet ---------------------------------------------------------------------------------------


def test_whitened_patches_are_uncorrelated_with_variance_one() -> None:
    generator = torch.Generator().manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.randn(300, 3, 14, 14, generator=generator), 3, 1)
    images = torch.stack([smooth[:, 0], smooth[:, 0] + 0.3 * smooth[:, 1], smooth[:, 2]], dim=1) * 3
    layer = Whitening(3, 2)
    layer.whiten(images, eps=0.0)
    found = layer(images).movedim(1, 0).flatten(1)
    half = len(found) // 2
    torch.testing.assert_close(found[half:], -found[:half])
    second_moments = found[:half] @ found[:half].T / found.shape[1]
    torch.testing.assert_close(second_moments, torch.eye(half), atol=1e-3, rtol=0)
    assert [name for name, value in layer.named_parameters() if value.requires_grad] == ["bias"]


def test_the_first_outputs_of_a_block_of_speednet_are_copies_of_its_input() -> None:
    model = build("speednet", (3, 32, 32))
    first = model.get_submodule("features.blocks.1.conv1")
    images = torch.randn(2, 64, 15, 15)
    torch.testing.assert_close(first(images)[:, :64], images)
