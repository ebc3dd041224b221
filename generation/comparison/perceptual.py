"""Metrics of other people's networks, where package and weights are on this machine; nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from generation.comparison.metrics import UNUSABLE, Metric, frechet, lacking, per_image

__all__ = ["CLIP", "perceptual_metrics"]

CLIP: Final = "openai/clip-vit-large-patch14"
"""The network of the CLIP score and of CLIP-IQA: a name in the hub's cache, or a folder."""

_ALEXNET: Final = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
_INCEPTION: Final = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
_IMAGE_REWARD: Final = "ImageReward.pt"
_IMAGE_REWARD_CONFIG: Final = "med_config.json"


@dataclass(frozen=True)
class _Judge:
    """A metric that needs packages and weights.

    Attributes:
        title: for people.
        packages: modules to import, and how to install each.
        weights: returns where they are; a string says what is missing.
        build: returns the metric, once both are there.
    """

    title: str
    packages: dict[str, str]
    weights: Callable[[], Path | str]
    build: Callable[[Path], Metric]


def perceptual_metrics() -> tuple[list[Metric], dict[str, str]]:
    """Return the metrics that can be had here, and of the others the title and, in one line, what is missing."""
    found, missing = [], {}
    for judge in _JUDGES:
        absent = [how for module, how in judge.packages.items() if importlib.util.find_spec(module) is None]
        if absent:
            missing[judge.title] = f"a package is not installed: {', '.join(absent)}"
            continue
        weights = judge.weights()
        if isinstance(weights, str):
            missing[judge.title] = weights
            continue
        try:
            found.append(judge.build(weights))
        except UNUSABLE as error:  # a package that one of these imports itself, or weights that it asks for beside
            missing[judge.title] = lacking(error)
    return found, missing


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _in_colour(images: torch.Tensor) -> torch.Tensor:
    return images.unsqueeze(1).expand(-1, 3, -1, -1) if images.ndim == 3 else images


def _bytes(images: torch.Tensor) -> torch.Tensor:
    """Return images in colour as a picture file has them, uint8 [N, 3, H, W]."""
    return (_in_colour(images) * 255).round().to(torch.uint8)


def _one_by_one(measure: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """Return what a network says of each image [3, H, W], a batch of one at a time, to bound the memory."""
    with torch.inference_mode():
        return torch.stack([measure(image[None].to(_device())).reshape(()).cpu() for image in images])


def _hub_file(url: str) -> Callable[[], Path | str]:
    def find() -> Path | str:
        path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        return path if path.is_file() else _absent(f"{path.name} in {path.parent}", f"download {url}")

    return find


def _absent(weights: str, remedy: str) -> str:
    return f"its weights are not on disk: {weights}; {remedy}"


def _clip_folder() -> Path | str:
    """Return the folder of a CLIP model in the hub's cache."""
    if Path(CLIP).is_dir():
        return Path(CLIP)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "model.safetensors"]
    try:
        folder = Path(snapshot_download(CLIP, local_files_only=True, allow_patterns=patterns))
    except LocalEntryNotFoundError:
        folder = None
    if folder is None or not (folder / "model.safetensors").is_file():
        return _absent(f"{CLIP} in the hub's cache", f"run: hf download {CLIP}")
    return folder


class _Clip(nn.Module):
    """CLIP with features as plain tensors, which torchmetrics expects and transformers wraps since its version 5."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoProcessor, CLIPModel

        load: Any = CLIPModel.from_pretrained
        processor: Any = AutoProcessor
        self.model = load(folder, local_files_only=True).eval()
        self.config = self.model.config
        self.processor = processor.from_pretrained(folder, local_files_only=True)

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_image_features(pixels))

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_text_features(ids, mask))


def _tensor(features: Any) -> torch.Tensor:
    return features if isinstance(features, torch.Tensor) else features.pooler_output


def _clip_score(folder: Path) -> Metric:
    from torchmetrics.functional.multimodal import clip_score

    likeness: Any = clip_score
    clip = _Clip(folder)

    def score(images: torch.Tensor, _: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        asked = iter(prompts)

        def likeness_of(image: torch.Tensor) -> torch.Tensor:
            return likeness(image, [next(asked)], lambda: (clip, clip.processor))

        return _one_by_one(likeness_of, _bytes(images))

    meaning = "100 times the cosine between CLIP's features of image and prompt (Hessel et al. 2021; torchmetrics)."
    return Metric("clip_score", "CLIP score", ".2f", "", True, meaning, per_image(score), absolute=True)


def _clip_iqa(folder: Path) -> Metric:
    from torchmetrics.functional.multimodal import clip_image_quality_assessment

    quality: Any = clip_image_quality_assessment
    clip = _Clip(folder)

    def good(images: torch.Tensor, _: torch.Tensor, __: tuple[str, ...]) -> torch.Tensor:
        return _one_by_one(lambda image: quality(image, lambda: (clip, clip.processor)), _bytes(images))

    meaning = "How much nearer to 'Good photo.' than to 'Bad photo.' CLIP finds it (Wang et al. 2023; torchmetrics)."
    return Metric("clip_iqa", "CLIP-IQA", ".4f", "", True, meaning, per_image(good), absolute=True)


def _lpips(_: Path) -> Metric:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(_device())

    def distance(images: torch.Tensor, references: torch.Tensor, _: tuple[str, ...]) -> torch.Tensor:
        wanted = iter(_in_colour(references))
        return _one_by_one(lambda image: network(image, next(wanted)[None].to(_device())), _in_colour(images))

    meaning = "Learned perceptual distance to the reference's image (Zhang et al. 2018, AlexNet; torchmetrics)."
    return Metric("lpips", "LPIPS", ".4f", "", False, meaning, per_image(distance))


def _inception(weights: Path) -> Metric:
    from torchmetrics.image.fid import FrechetInceptionDistance

    distance: Any = FrechetInceptionDistance(feature_extractor_weights_path=str(weights))
    network = distance.inception.to(_device())

    def features(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat([network(image[None].to(_device())).cpu() for image in _bytes(images)])

    return frechet("frechet_inception", "Frechet distance", features, "Inception-v3; wants thousands of images")


def _image_reward(weights: Path) -> Metric:
    from PIL import Image

    described = str(weights.parent / _IMAGE_REWARD_CONFIG)
    model = importlib.import_module("ImageReward").load(str(weights), device=_device(), med_config=described)

    def reward(images: torch.Tensor, _: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        pictures = [Image.fromarray(picture.numpy()) for picture in _bytes(images).movedim(1, -1)]
        return torch.tensor([model.score(prompt, one) for prompt, one in zip(prompts, pictures, strict=True)])

    meaning = "What a model of human preference thinks of image and prompt (Xu et al. 2023; its own package)."
    return Metric("image_reward", "ImageReward", ".4f", "", True, meaning, per_image(reward), absolute=True)


def _reward_file() -> Path | str:
    folder = Path.home() / ".cache" / "ImageReward"
    absent = [name for name in (_IMAGE_REWARD, _IMAGE_REWARD_CONFIG) if not (folder / name).is_file()]
    if absent:
        remedy = f"run: hf download THUDM/ImageReward {' '.join(absent)} --local-dir {folder}"
        return _absent(f"{' and '.join(absent)} in {folder}", remedy)
    return folder / _IMAGE_REWARD


_TORCHMETRICS: Final = {"torchmetrics": "pip install 'fp4trt[metrics]'"}
_TORCHVISION: Final = {"torchvision": "pip install 'fp4trt[metrics]'"}
_TRANSFORMERS: Final = {"transformers": "pip install 'fp4trt[metrics]'"}
_JUDGES: Final = (
    _Judge("LPIPS", {**_TORCHMETRICS, **_TORCHVISION}, _hub_file(_ALEXNET), _lpips),
    _Judge("ImageReward", {"ImageReward": "pip install image-reward"}, _reward_file, _image_reward),
    _Judge("CLIP-IQA", {**_TORCHMETRICS, **_TRANSFORMERS}, _clip_folder, _clip_iqa),
    _Judge("CLIP score", {**_TORCHMETRICS, **_TRANSFORMERS}, _clip_folder, _clip_score),
    _Judge(
        "Frechet distance (Inception)",
        {**_TORCHMETRICS, "torch_fidelity": "pip install torch-fidelity"},
        _hub_file(_INCEPTION),
        _inception,
    ),
)
