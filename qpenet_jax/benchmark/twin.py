"""QPENet in PyTorch: the tests and the benchmark compare the Flax network with it.

Written from the paper and independent of the Flax modules; where the paper is silent,
the authors' released system decides here too. It needs the `[parity]` extra, and only
tests and benchmark import it. Everything is NCHW, as PyTorch likes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from flax.traverse_util import unflatten_dict
from jaxtyping import Bool, Float, Int, PyTree, UInt8
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from qpenet_jax.core.errors import InputError
from qpenet_jax.core.types import IGNORE, Episode

# --- the frozen backbones ---------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE_MEAN, LITE_STD = (127 / 255,) * 3, (128 / 255,) * 3  # TensorFlow's for Lite0


class ResNetFeatures(nn.Module):
    """torchvision's ResNet-50 or 101 at stride 8: layer3 and layer2, 1536 channels."""

    channels = 1536
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, depth: int):
        super().__init__()
        build = {50: models.resnet50, 101: models.resnet101}[depth]
        net = build(weights=None, replace_stride_with_dilation=[False, True, True])
        for conv in net.layer3.modules():
            # torchvision leaves the first block undilated; the field's ResNets don't
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (2, 2)
        self.net = create_feature_extractor(net, ["layer2", "layer3"])

    def forward(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 1536 h w"]:
        """Concatenates layer3 and layer2 of normalised images."""
        stages = self.net(x)
        return torch.cat([stages["layer3"], stages["layer2"]], 1)


class EfficientNetLiteFeatures(nn.Module):
    """EfficientNet-Lite0 at stride 8: blocks 4, 10 and 14 (40 + 112 + 192 channels)."""

    channels = 344
    mean, std = LITE_MEAN, LITE_STD

    def __init__(self):
        super().__init__()
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        stride = dilation = 1
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                stride *= conv.stride[0]
                held, dilation = dilation, max(stride // 8, 1)
                if dilation > held:  # this stride would pass 8
                    conv.stride = (1, 1)
                conv.dilation = (held, held)
                conv.padding = (held * (conv.kernel_size[0] // 2),) * 2
                conv.static_padding = nn.Identity()  # it depends on the image's size

    def forward(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 344 h w"]:
        """Concatenates the three blocks of normalised images."""
        net, taken = self.net, []
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks[:15]):
            x = block(x)
            if i in (4, 10, 14):
                taken.append(x)
        return torch.cat(taken, 1)


Backbone = ResNetFeatures | EfficientNetLiteFeatures


def backbone(name: str) -> Backbone:
    """Builds "resnet50", "resnet101" or "efficientnet_lite0", frozen, random weights.

    Its `.net` has PyTorch's original names. Another name raises InputError.
    """
    builders = {
        "resnet50": lambda: ResNetFeatures(50),
        "resnet101": lambda: ResNetFeatures(101),
        "efficientnet_lite0": EfficientNetLiteFeatures,
    }
    if name not in builders:
        raise InputError(f"the twin has no backbone {name!r}: {', '.join(builders)}")
    return builders[name]().eval().requires_grad_(False)


@torch.no_grad()
def features(
    net: Backbone, images: UInt8[Tensor, "*b H W 3"]
) -> Float[Tensor, "*b c h w"]:
    """Returns a backbone's features of RGB images in 0..255, any leading axes."""
    x = images.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
    mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (net.mean, net.std))
    return net((x - mean) / std).unflatten(0, images.shape[:-3])


# --- the network ------------------------------------------------------------------


def masked_average_pooling(
    features: Float[Tensor, "*b c h w"], mask: Bool[Tensor, "*b h w"]
) -> Float[Tensor, "*b c"]:
    """Averages the features under a mask; zeros where it is empty. MAP of eq 1."""
    weights = mask.unsqueeze(-3).to(features.dtype)
    return (features * weights).sum((-2, -1)) / (weights.sum((-2, -1)) + 5e-4)


def broadcast_concat(
    features: Float[Tensor, "*b c h w"], prototype: Float[Tensor, "*b c"]
) -> Float[Tensor, "*b 2*c h w"]:
    """Puts the prototype beside every position: Concat(F, BC(P)) of eq 2."""
    p = prototype[..., None, None].expand(*prototype.shape, *features.shape[-2:])
    return torch.cat([features, p], -3)


def over_supports(
    layer: Callable[[Tensor], Tensor], x: Float[Tensor, "b k c h w"]
) -> Float[Tensor, "b k d h w"]:
    """Applies a layer to the supports of all episodes as to one batch of images."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def resize(
    logits: Float[Tensor, "b 2 h w"], labels: Int[Tensor, "*b H W"]
) -> Float[Tensor, "b 2 H W"]:
    """Brings logits to the size of the labels."""
    size = labels.shape[-2], labels.shape[-1]
    return F.interpolate(logits, size, mode="bilinear", align_corners=True)


class TorchResidual(nn.Module):
    """x + ReLU(3x3(ReLU(3x3(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x):
        """Keeps the shape."""
        return x + F.relu(self.conv2(F.relu(self.conv1(x))))


def reduce(inputs: int, width: int, dropout: float = 0.0) -> nn.Sequential:
    """1x1 convolution, ReLU, dropout of channels."""
    conv = nn.Conv2d(inputs, width, 1, bias=False)
    return nn.Sequential(conv, nn.ReLU(), nn.Dropout2d(dropout))


def head(width: int) -> nn.Sequential:
    """Returns layers that give two logits for each position."""
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(width, width, 3, padding=1, bias=False),
        relu=nn.ReLU(),
        dropout=nn.Dropout2d(0.1),
        classifier=nn.Conv2d(width, 2, 1),
    )
    return nn.Sequential(layers)


class TorchConvs(nn.Sequential):
    """Segments features by a prototype: Convs(Concat(F, BC(P))) of eqs 2, 4, 9, 10."""

    def __init__(self, width: int):
        layers = OrderedDict[str, nn.Module](
            merge=reduce(2 * width, width, 0.5),
            residual=TorchResidual(width),
            head=head(width),
        )
        super().__init__(layers)


class Cross(nn.Module):
    """Cross attention of query positions to the supports' foreground. Eq 16."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float = 0.1):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.ffn1 = nn.Linear(width, ffn, bias=False)
        self.ffn2 = nn.Linear(ffn, width, bias=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n c/heads"]:
        """Splits the channels into heads."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        context: Float[Tensor, "b m c"],
        mask: Bool[Tensor, "b m"],
    ) -> Float[Tensor, "b n c"]:
        """Attends to the positions of `context` in the mask, to all if it is empty."""
        allowed = (mask | ~mask.any(1, keepdim=True))[:, None, None]
        q, k, v = (
            self.split(layer(t))
            for layer, t in (
                (self.query, x),
                (self.key, context),
                (self.value, context),
            )
        )
        found = F.scaled_dot_product_attention(q, k, v, allowed)
        x = self.norm1(x + self.dropout(self.out(found.transpose(1, 2).flatten(2))))
        inside = self.dropout(F.relu(self.ffn1(x)))
        return self.norm2(x + self.dropout(self.ffn2(inside)))


class TorchQPENet(nn.Module):
    """Query-guided Prototype Evolution Network (Cong et al., TMM 2024), full version.

    `channels` are the backbone's, `width` is the paper's c, `heads` and `ffn` are the
    attention's; with `shared_reducer` one 1x1 convolution serves query and support.
    """

    def __init__(
        self,
        channels: int,
        width: int = 256,
        heads: int = 8,
        ffn: int = 768,
        shared_reducer: bool = False,
    ):
        super().__init__()
        self.reduce_support = reduce(channels, width, 0.5)
        self.reduce_query = None if shared_reducer else reduce(channels, width, 0.5)
        self.segment_foreground = TorchConvs(width)
        self.segment_background = TorchConvs(width)
        self.p_global = nn.Parameter(torch.randn(width))
        gate = OrderedDict[str, nn.Module](
            fc1=nn.Linear(width, width),
            relu=nn.ReLU(),
            fc2=nn.Linear(width, width),
            dropout=nn.Dropout(0.5),
            sigmoid=nn.Sigmoid(),
        )
        self.gate = nn.Sequential(gate)
        self.suppress = reduce(2 * width, width)
        self.activate = reduce(2 * width + 2, width)
        self.activate_residual = TorchResidual(width)
        self.auxiliary_head = head(width)
        self.cross1, self.cross2 = (Cross(width, heads, ffn) for _ in range(2))
        self.reduce, self.reduce_residual = reduce(width, width), TorchResidual(width)
        self.final_head = head(width)

    def forward(
        self,
        support_features: Float[Tensor, "b k C h w"],
        support_masks: Int[Tensor, "b k H W"],
        query_features: Float[Tensor, "b C h w"],
    ) -> tuple[Float[Tensor, "b 2 H W"], dict[str, Tensor]]:
        """Returns the query's logits at image size and every named intermediate.

        `out` holds F_q [b, c, h, w], F_s [b, k, c, h, w]; P_* [b, c]; the logits y_*
        [b, 2, h, w] (y_rev, y_bg_s with an axis for the supports), A_* [b, h, w] and
        M_s [b, k, h, w]. y_bg_s and y_aux only in training. Sides must be 8 n + 1
        pixels; in masks 1 is foreground. Eq 1-16.
        """
        reduce_query = self.reduce_query or self.reduce_support
        f_q = reduce_query(query_features)
        f_s = over_supports(self.reduce_support, support_features)
        m_s = support_masks[..., ::8, ::8] == 1  # a cell stands on every 8th pixel
        out = {"F_s": f_s, "F_q": f_q, "M_s": m_s}
        out |= self.evolve_foreground(f_q, f_s, m_s)
        out |= self.evolve_background(f_q, f_s)
        out |= self.decode(f_q, f_s, out)
        return resize(out["y_final"], support_masks), out

    def evolve_foreground(self, f_q, f_s, m_s) -> dict[str, Tensor]:
        """Returns the maps of PPG and DPE: support -> query -> support (eqs 1 to 8)."""
        p_pre = masked_average_pooling(f_s, m_s).mean(1)
        y_pre = self.segment_foreground(broadcast_concat(f_q, p_pre))
        p_psd = masked_average_pooling(f_q, y_pre.argmax(1) == 1)

        asked = p_psd[:, None].expand(-1, f_s.shape[1], -1)
        y_rev = over_supports(self.segment_foreground, broadcast_concat(f_s, asked))
        found = y_rev.argmax(2) == 1
        return {
            "P_pre": p_pre,
            "y_pre": y_pre,
            "P_psd": p_psd,
            "y_rev": y_rev,
            "P_main": masked_average_pooling(f_s, m_s & found).mean(1),
            "P_aux": masked_average_pooling(f_s, m_s & ~found).mean(1),
        }

    def evolve_background(self, f_q, f_s) -> dict[str, Tensor]:
        """Returns the maps of GBC, with the cleansed prototype (eqs 9 to 11)."""
        out = {}
        everywhere = self.p_global.expand(*f_s.shape[:2], -1)
        y_bg_q = self.segment_background(broadcast_concat(f_q, everywhere[:, 0]))
        if self.training:
            with_prototype = broadcast_concat(f_s, everywhere)
            out["y_bg_s"] = over_supports(self.segment_background, with_prototype)
        background = f_q * y_bg_q.argmax(1, keepdim=True)
        gate = self.gate(background.mean((2, 3)))  # over all cells, as GAP is
        return {"y_bg_q": y_bg_q, "P_bg": self.p_global * gate, **out}

    def decode(self, f_q, f_s, prototypes) -> dict[str, Tensor]:
        """Returns the maps of FFA, which decodes (eqs 12 to 16)."""
        a_main, a_aux = (
            F.cosine_similarity(f_q, prototypes[name][..., None, None], dim=1)
            for name in ("P_main", "P_aux")
        )
        f_dot = self.suppress(broadcast_concat(f_q, prototypes["P_bg"]))
        x = broadcast_concat(f_dot, prototypes["P_pre"])
        x = self.activate(torch.cat([x, a_main[:, None], a_aux[:, None]], 1))
        x = self.activate_residual(x)
        out = {"A_main": a_main, "A_aux": a_aux}
        if self.training:
            out["y_aux"] = self.auxiliary_head(x)

        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        context = f_s.flatten(3).transpose(2, 3).flatten(1, 2)
        for cross in (self.cross1, self.cross2):
            x = cross(x, context, prototypes["M_s"].flatten(1))
        x = self.reduce_residual(self.reduce(x.transpose(1, 2).unflatten(2, grid)))
        return {**out, "y_final": self.final_head(x)}


# --- training ---------------------------------------------------------------------


def cross_entropy(
    logits: Float[Tensor, "*b 2 h w"], target: Int[Tensor, "*b H W"]
) -> Float[Tensor, ""]:
    """Returns the cross entropy over the valid pixels of a batch, 0 without any."""
    target = target.flatten(0, -3).long()
    logits = resize(logits.flatten(0, -4), target)
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def background_mining(
    logits: Float[Tensor, "*b 2 h w"], target: Int[Tensor, "*b H W"]
) -> Float[Tensor, ""]:
    """Returns L_bm of eq 18; class 1 is background."""
    target = target.flatten(0, -3)
    logits = resize(logits.flatten(0, -4), target)
    not_background, background = F.log_softmax(logits, 1).neg().unbind(1)

    def mean(values, mask):
        return (values * mask).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)

    foreground = mean(not_background, target == 1)
    return (foreground + 0.5 * mean(background, target != IGNORE)).mean()


def total_loss(
    out: dict[str, Tensor],
    query_mask: Int[Tensor, "b H W"],
    support_masks: Int[Tensor, "b k H W"],
    alpha: float = 1.0,
    beta: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Returns L of eq 19 and its terms; the auxiliary head counts 0.6 in L_fg."""
    terms = {
        "loss_pre": cross_entropy(out["y_pre"], query_mask),
        "loss_rev": cross_entropy(out["y_rev"], support_masks),
        "loss_final": cross_entropy(out["y_final"], query_mask),
        "loss_aux": cross_entropy(out["y_aux"], query_mask),
        "loss_bg_q": background_mining(out["y_bg_q"], query_mask),
        "loss_bg_s": background_mining(out["y_bg_s"], support_masks),
    }
    segmentation = terms["loss_pre"] + terms["loss_rev"] + terms["loss_final"]
    foreground = segmentation + 0.6 * terms["loss_aux"]
    return alpha * foreground + beta * (terms["loss_bg_q"] + terms["loss_bg_s"]), terms


def build_optimizer(
    parameters: Iterable[nn.Parameter], steps: int, lr: float = 0.0025
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """Returns the paper's SGD and its poly decay (1 - t / steps)^0.9, both per step."""
    sgd = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.LambdaLR(sgd, lambda t: (1 - t / steps) ** 0.9)
    return sgd, decay


def train_step(
    model: TorchQPENet,
    net: Backbone,
    optimizer: tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR],
    batch: Episode,
) -> dict[str, Float[Tensor, ""]]:
    """Does one step of training on a batch of numpy episodes; returns the losses."""
    device = model.p_global.device
    query, truth, supports, masks = (torch.as_tensor(x).to(device) for x in batch[:4])
    _, out = model(features(net, supports), masks, features(net, query))
    loss, terms = total_loss(out, truth, masks)
    sgd, decay = optimizer
    sgd.zero_grad()
    loss.backward()
    sgd.step()
    decay.step()
    return {"loss": loss.detach(), **{k: v.detach() for k, v in terms.items()}}


def without_dropout(model: TorchQPENet) -> TorchQPENet:
    """Returns the model, from which nothing is dropped any more in training."""
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return model


# --- weights of the twin -> parameters of the Flax network ------------------------

PLACES = {
    "segment_foreground": "convs",
    "segment_background": "gbc/convs",
    "p_global": "gbc/P_global",
    "gate": "gbc",
    "suppress": "ffa/filter",
    "final_head": "ffa/head",
} | {
    name: f"ffa/{name}"
    for name in (
        *("activate", "activate_residual", "auxiliary_head"),
        *("cross1", "cross2", "reduce", "reduce_residual"),
    )
}
"""Where the Flax network has parts of the twin; below them all is called the same."""


def to_flax(state_dict: Mapping[str, Tensor]) -> PyTree[Float[np.ndarray, "..."]]:
    """Turns the twin's state_dict into the parameters of the Flax QPENet."""
    flat = {}
    for name, tensor in state_dict.items():
        part, *layers = (word for word in name.split(".") if not word.isdigit())
        array = tensor.detach().cpu().numpy()
        if layers and layers[-1] == "weight":
            layers[-1] = "kernel" if array.ndim > 1 else "scale"
        if array.ndim > 1:  # [o, i, (k, k)] -> [(k, k), i, o], without 1 x 1 windows
            array = array.transpose(*range(2, array.ndim), 1, 0)
            array = array.squeeze((0, 1)) if array.shape[:-2] == (1, 1) else array
        if part == "activate":  # Flax has the prototype of eq 15's inputs at the end
            width = array.shape[-1]
            maps = [2 * width, 2 * width + 1]
            array = array[[*range(width), *maps, *range(width, 2 * width)]]
        path = "/".join([PLACES.get(part, part), *layers])
        flat[path] = np.ascontiguousarray(array)
    return unflatten_dict(flat, sep="/")
