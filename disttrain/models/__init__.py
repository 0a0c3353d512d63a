"""Networks by name: our catalog, the classifiers of torchvision and timm, and the user's classes.

This module owns the names, and builds and checks a network. The networks of the catalog are in the other
modules of this package. Importing this module does not import torch, because the launcher checks the model's
name before any process starts.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from disttrain.errors import UsageError, error_text
from disttrain.models.weights import tagged_name
from disttrain.user_code import UserCodeError, did_you_mean, import_target, is_target

if TYPE_CHECKING:
    from torch import Tensor, nn

    from disttrain.config import ModelConfig
    from disttrain.shards.index import Index


class Entry(NamedTuple):
    """A network of the catalog."""

    target: str
    """`package.module:Class`, or a factory function."""
    source: str
    """The publication, or a description of the network."""
    input_shape: tuple[int, int, int] = (3, 32, 32)
    """Channels, height and width of the images that it was designed for."""


CATALOG: dict[str, Entry] = {
    "cnn_mnist": Entry("disttrain.models.small:CnnMnist", "two convolutions for MNIST", (1, 28, 28)),
    "lenet5": Entry("disttrain.models.small:LeNet5", "LeCun et al. 1998", (1, 28, 28)),
    "lenet_bn": Entry("disttrain.models.small:LeNetBN", "LeCun et al. 1998, with ReLU and batch norm"),
    "traffic_cnn": Entry("disttrain.models.small:TrafficCNN", "two small convolutions, one linear layer"),
    "convnet4": Entry("disttrain.models.small:ConvNet4", "Krizhevsky et al. 2012, figure 1"),
    "alexnet_cifar": Entry("disttrain.models.alexnet:AlexNetCifar", "Krizhevsky et al. 2012, for 32x32"),
    "vgg16": Entry("disttrain.models.vgg:vgg16", "Simonyan & Zisserman 2014, configuration D"),
    "vgg19": Entry("disttrain.models.vgg:vgg19", "Simonyan & Zisserman 2014, configuration E"),
    "resnet18": Entry("disttrain.models.resnet:resnet18", "He et al. 2015"),
    "resnet34": Entry("disttrain.models.resnet:resnet34", "He et al. 2015"),
    "resnet50": Entry("disttrain.models.resnet:resnet50", "He et al. 2015"),
    "speednet": Entry("disttrain.models.speednet:SpeedNet", "airbench94, Jordan 2024"),
    "inception_small": Entry("disttrain.models.inception:InceptionSmall", "Szegedy et al. 2014, for 32x32"),
}


def check_model_name(name: str) -> None:
    """Checks a name without importing torch, torchvision or the user's module.

    Raises:
        UsageError: the name is not in the catalog, and not of the form `torchvision:NAME`, `timm:NAME` or
            `package.module:Class`; or timm is not installed.
    """
    if name in CATALOG:
        return
    if re.fullmatch(r"timm:\w+(\.\w+)?", name):
        found = importlib.util.find_spec("timm")
        if found is None or not found.has_location:  # a folder ./timm is not the package
            raise UsageError(f'model.name: {name} needs timm; run pip install "disttrain[timm]"')
        return
    if ":" not in name:
        raise UsageError(
            f"model.name: unknown model {name!r}{did_you_mean(name, CATALOG)}; choose one of "
            "`disttrain models`, torchvision:NAME, timm:NAME or package.module:Class"
        )
    if not is_target(name):
        raise UsageError(
            f"model.name: {name!r} is neither torchvision:NAME (such as torchvision:resnet50) nor timm:NAME "
            "nor package.module:Class (such as my_models:Net)"
        )


def is_of_a_library(name: str) -> bool:
    """Returns whether a network is of torchvision or timm."""
    return name.startswith(("torchvision:", "timm:"))


def build_for(model: ModelConfig, index: Index, *, pretrained: bool = False) -> nn.Module:
    """Builds the network of a config for the images and classes of a data set; see `build_model`."""
    return build_model(
        tagged_name(model),
        num_classes=len(index.classes),
        in_channels=index.channels,
        image_size=(index.height, index.width),
        args=model.args,
        pretrained=pretrained,
    )


def build_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    args: Mapping[str, Any],
    pretrained: bool = False,
) -> nn.Module:
    """Builds a network on the CPU, with the current random state, and checks its output for one image.

    Args:
        name: a name of the catalog, `torchvision:NAME`, `timm:NAME` or `package.module:Class`. A user's class
            or factory gets the arguments num_classes, in_channels and image_size if its signature has them,
            num_classes also if it has `**kwargs`, and always `args`.
        num_classes: number of outputs.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        args: more keyword arguments, from `model.args`.
        pretrained: the network is of timm, and gets its weights, which timm downloads.

    Raises:
        UsageError: the name or an argument is wrong, the image size is unsuitable, or the user's code fails.
    """
    from torch import nn

    check_model_name(name)
    given = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    try:
        if name.startswith("torchvision:"):
            model = _build_torchvision(name.partition(":")[2], given, args)
        elif name.startswith("timm:"):
            model = _build_timm(name.partition(":")[2], given, args, pretrained=pretrained)
        else:
            target = CATALOG[name].target if name in CATALOG else name
            model = _build_target(import_target(target), given, args)
    except UserCodeError as error:
        raise UserCodeError(f"model {name}: {error}", error.module) from error.__cause__
    except UsageError as error:
        raise UsageError(f"model {name}: {error}") from error.__cause__
    except Exception as error:
        raise UsageError(f"model {name}: cannot be built: {error_text(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name}: returns a {type(model).__name__}, expected a torch.nn.Module")
    _check_output(model, name, num_classes, (in_channels, *image_size))
    return model


def parameter_count(model: nn.Module) -> int:
    """Returns the number of parameters, including frozen ones, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())


def _build_target(factory: Callable[..., Any], given: Mapping[str, Any], args: Mapping[str, Any]) -> Any:
    parameters = inspect.signature(factory).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    options = [option for option in named if option not in given]
    for key in args:
        if key in given:
            raise _given_argument(key)
        if key not in named and not takes_any:
            raise _unknown_argument(key, options)
    keywords = {key: value for key, value in given.items() if key in named}
    if takes_any:
        keywords["num_classes"] = given["num_classes"]
    missing = [
        p.name for p in parameters if p.default is p.empty and p.name in options and p.name not in args
    ]
    if missing:
        raise UsageError(f"model.args.{missing[0]} is missing and has no default; add it")
    return factory(**keywords, **args)


def _build_torchvision(name: str, given: Mapping[str, Any], args: Mapping[str, Any]) -> Any:
    import torch

    models: Any = importlib.import_module("torchvision.models")  # untyped, and 1.7 s to import
    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(f"torchvision has no classifier of this name{did_you_mean(name, known)}")
    if given["in_channels"] != 3:
        raise UsageError(
            f"torchvision's networks take 3 channels, but the images have {given['in_channels']}; "
            "choose one of `disttrain models`"
        )
    if "num_classes" in args:
        raise _given_argument("num_classes")
    if "weights" in args:
        raise UsageError(
            "model.args.weights: training starts from random weights or those of model.weights; "
            "set that, such as to torchvision:DEFAULT"
        )
    defaults: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):  # auxiliary heads need larger images, and are for deep ones
        defaults = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        defaults = {"image_size": given["image_size"][0]}
    try:
        return models.get_model(name, weights=None, num_classes=given["num_classes"], **{**defaults, **args})
    except TypeError as error:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not unexpected or unexpected[1] not in args:
            raise
        with torch.device("meta"):  # the builders forward **kwargs; only the class has the option names
            parameters = inspect.signature(type(models.get_model(name, **defaults))).parameters.values()
        options = [p.name for p in parameters if p.default is not p.empty and p.name != "num_classes"]
        raise _unknown_argument(unexpected[1], options) from None


def _build_timm(name: str, given: Mapping[str, Any], args: Mapping[str, Any], *, pretrained: bool) -> Any:
    timm: Any = importlib.import_module("timm")  # untyped
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        raise UsageError(f"timm has no classifier of this name{did_you_mean(architecture, known)}")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        raise UsageError(f"timm has no weights of this name{did_you_mean(name, tagged)}")
    for key in ("num_classes", "in_chans"):
        if key in args:
            raise _given_argument(key)
    if "checkpoint_path" in args:
        raise UsageError("model.args.checkpoint_path: set model.weights instead")
    if not isinstance(args.get("pretrained", False), bool):
        raise UsageError(f"model.args.pretrained: expected true or false, got {args['pretrained']!r}")
    keywords = {"num_classes": given["num_classes"], "in_chans": given["in_channels"], **args}
    keywords["pretrained"] = pretrained
    facts = timm.get_pretrained_cfg(name)
    if facts is not None and facts.fixed_input_size and facts.input_size[1:] != given["image_size"]:
        keywords = {"img_size": given["image_size"], **keywords}
    try:
        return timm.create_model(name, **keywords)
    except Exception as error:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not unexpected or unexpected[1] not in args:
            if not keywords["pretrained"]:
                raise
            text = f"cannot be built with pretrained weights: {error_text(error)[:200]}"
            place = facts and ((facts.hf_hub_id and f"https://huggingface.co/{facts.hf_hub_id}") or facts.url)
            remedy = f"set model.weights to a file with weights instead, such as from {place}"
            raise UsageError(f"{text}; {remedy}") from error
        parameters = inspect.signature(type(timm.create_model(architecture))).parameters.values()
        options = [p.name for p in parameters if p.default is not p.empty]
        options = [option for option in options if option not in ("num_classes", "in_chans")]
        raise _unknown_argument(unexpected[1], options) from None


def try_out(model: nn.Module, images: Tensor) -> Any:
    """Returns a model's output in evaluation mode, and restores its modes and buffers and the random state.

    Args:
        model: should return scores [B, classes]; this is not checked. Its exceptions are passed on.
        images: float32 [B, C, H, W], on the model's device.
    """
    import torch

    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
            return torch.func.functional_call(model, buffers, (images,))
    finally:
        for module, mode in training.items():
            module.training = mode


def _check_output(model: nn.Module, name: str, num_classes: int, shape: tuple[int, int, int]) -> None:
    """Checks the output for one blank image of this shape."""
    import torch

    image = "x".join(str(length) for length in shape)
    try:
        with torch.no_grad():
            output = try_out(model, torch.zeros(1, *shape))
    except Exception as error:
        raise UsageError(f"model {name}: fails on an image of {image}: {error_text(error)}") from error
    got = (
        list(output.shape) if isinstance(output, torch.Tensor) else f"a value of type {type(output).__name__}"
    )
    if got != [1, num_classes]:
        raise UsageError(
            f"model {name}: returns {got} for one image of {image}, expected scores [1, {num_classes}] "
            "(batch, num_classes)" + "; return them alone" * (not isinstance(output, torch.Tensor))
        )


def _given_argument(key: str) -> UsageError:
    remedy = "set model.num_classes instead" if key == "num_classes" else "comes from the data set; remove it"
    return UsageError(f"model.args.{key}: {remedy}")


def _unknown_argument(key: str, options: list[str]) -> UsageError:
    accepted = f"accepted: {', '.join(options)}" if options else "this model takes no arguments"
    return UsageError(f"model.args.{key}: unknown argument{did_you_mean(key, options)}; {accepted}")
