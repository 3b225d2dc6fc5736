"""draw.html: a page to write digits on, with a network's weights in it that reads them. See docs/page.md.

The parts lie beside this file; build_page() puts them together. The page needs nothing else.
"""

import base64
import copy
import hashlib
import json
from pathlib import Path
from string import Template

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMIT = 200_000  # bytes of a page
BYTES_OF_MISREAD = 1100  # 784 pixels as base64, and its label and reading
SCRIPTS = "forward.js", "strokes.js", "digits.js", "samples.js", "display.js", "lists.js", "controls.js"
# The convolutions of Net.forward, each with the batch normalisation that follows it, if one does.
CONVS = "conv1", "conv2", "conv3", "conv4", "conv5", "conv6", "conv7"
NORMS = "norm1", "norm2", None, "norm4", "norm5", "norm6", None


def fold(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of each convolution with its batch normalisation folded in, computed in float64."""
    layers = {}
    for name, norm_name in zip(CONVS, NORMS, strict=True):
        conv = getattr(net, name)
        weight, bias = conv.weight.detach().double(), conv.bias.detach().double()
        if norm_name:
            norm = getattr(net, norm_name)
            factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * factor[:, None, None, None]
            bias = (bias - norm.running_mean.double()) * factor + norm.bias.detach().double()
        layers[name] = weight.float().contiguous(), bias.float()
    return layers


def forward(layers: dict[str, tuple[Tensor, Tensor]], activation: str, x: Tensor) -> Tensor:
    """What page/forward.js computes, in PyTorch: normalised images (B, 1, 28, 28) -> log-probabilities (B, 10)."""
    act = {"hardswish": F.hardswish, "relu": F.relu}[activation]

    def conv(x: Tensor, name: str) -> Tensor:
        weight, bias = layers[name]
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)

    x = act(conv(x, "conv1"))
    x = act(F.max_pool2d(conv(x, "conv2"), 2))
    x = act(conv(conv(x, "conv3"), "conv4"))
    x = act(F.max_pool2d(conv(x, "conv5"), 2))
    x = act(conv(x, "conv6"))
    return conv(x, "conv7").mean((2, 3)).log_softmax(1)


@torch.no_grad()
def check(net: nn.Module, layers: dict[str, tuple[Tensor, Tensor]], activation: str) -> None:
    """Raise ValueError unless forward() computes what the network does, on 100 random images."""
    x = torch.randn(100, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    if not torch.allclose(forward(layers, activation, x), copy.deepcopy(net).eval()(x), rtol=1e-3, atol=1e-3):
        raise ValueError("the outputs differ")


def read_parts(*names: str) -> str:
    """The text of the files beside this one."""
    return "\n".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in names)


def hash_of(text: str) -> str:
    """The hash by which Content-Security-Policy recognises an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def base64_of(values: Tensor) -> str:
    """The bytes of a tensor's values, as text."""
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode()


def build_page(net: nn.Module, loader, predicted: Tensor) -> str:
    """The page with the weights of a script.Net on the CPU, as HTML of at most 200 KB.

    loader: the script.Loader of the N images that it was scored on; predicted: its digits (N,). The images that it
    misclassifies are in the page, as many as there is room for. Raises ValueError where forward.js does not compute
    this network.
    """
    try:
        activation, layers = net.get_extra_state(), fold(net)
        check(net, layers, activation)
    except Exception as error:  # a layer or an activation that is missing, or of another shape
        raise ValueError("this Net is another one than page/forward.js computes") from error
    shapes = {name: weight.shape for name, (weight, _) in layers.items()}
    weights = torch.cat([part.flatten() for layer in layers.values() for part in layer])
    images, labels = loader.images.cpu(), loader.labels.cpu()
    misread = (predicted != labels).nonzero().flatten()
    data = {
        "activation": activation,
        "mean": loader.mean,
        "std": loader.std,
        "layers": [{"name": name, "outputs": s[0], "inputs": s[1], "kernel": s[2]} for name, s in shapes.items()],
        "weights": base64_of(weights),
        "scored": len(labels),
        "misreadCount": len(misread),
    }
    style, javascript, template = read_parts("style.css"), read_parts(*SCRIPTS), Template(read_parts("page.html"))
    policy = f"default-src 'none'; img-src data:; style-src '{hash_of(style)}'; script-src '{hash_of(javascript)}'"
    parameters = f"{sum(parameter.numel() for parameter in net.parameters()):,}"

    def html_with(count: int) -> str:
        chosen = misread[:count]
        pairs = zip(labels[chosen].tolist(), predicted[chosen].tolist(), strict=True)
        shown = {"misread": [{"label": label, "reading": reading} for label, reading in pairs]}
        text = json.dumps(data | shown | {"images": base64_of(images[chosen])})
        return template.substitute(style=style, script=javascript, policy=policy, parameters=parameters, data=text)

    room = LIMIT - len(html_with(0).encode())
    if room < 0:
        raise ValueError(f"with these weights it would be larger than {LIMIT // 1000} KB")
    return html_with(room // BYTES_OF_MISREAD)


def draw(_history, net: nn.Module, score, _train_loader, test_loader) -> dict[str, bytes]:
    """A run's page, by its name, from a script.Score and the script.Loader that was scored. Raises ValueError."""
    return {"draw.html": build_page(net, test_loader, score.predicted).encode()}
