"""Metrics of other people's networks: run for real, on random weights where the real ones lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from generation.comparison import perceptual
from generation.comparison.metrics import Metric, Shown

pytest.importorskip("torchmetrics")


def shown(offset: float) -> Shown:
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 8, 8) * 0.5 + offset
    return Shown((0,), ("a cat", "a dog", "a"), lambda _: images.split(2))


def judge(title: str) -> Metric:
    found, _ = perceptual.perceptual_metrics()
    return next(metric for metric in found if metric.title == title)


@pytest.fixture
def clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CLIP with random weights."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = {name: index for index, name in enumerate("<pad> <s> </s> a cat dog <unk> Good Bad photo .".split())}
    split = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, model_max_length=77, **names)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": 11, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "clip")
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(perceptual, "CLIP", str(tmp_path / "clip"))
    return tmp_path / "clip"


@pytest.mark.usefixtures("clip")
@pytest.mark.parametrize("title", ["CLIP score", "CLIP-IQA"])
def test_clip_judges_each_image_by_itself(title: str) -> None:
    metric = judge(title)
    scores = metric.scores(shown(0.0), shown(0.0))
    assert scores.values.shape == (1, 3)
    assert len(set(scores.values[0].tolist())) == 3
    assert metric.absolute
    assert 0 <= scores.values.min() <= scores.values.max() <= (100 if title == "CLIP score" else 1)


def test_clip_sees_the_images_in_their_full_range(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    features = perceptual._Clip.get_image_features
    keep = lambda self, pixels: seen.append(pixels) or features(self, pixels)  # noqa: E731
    monkeypatch.setattr(perceptual._Clip, "get_image_features", keep)
    black_and_white = torch.zeros(1, 3, 32, 32)
    black_and_white[..., 16:] = 1
    of = Shown((0,), ("a cat",), lambda _: [black_and_white])
    for title in ("CLIP score", "CLIP-IQA"):
        judge(title).scores(of, of)
    for pixels in seen:  # normalized by CLIP's own means and deviations
        assert [pixels.min().item(), pixels.max().item()] == pytest.approx([-0.48145466 / 0.26862954, 2.146], abs=1e-3)
    assert len(seen) == 2


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where torch keeps downloaded weights, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_lpips_is_a_distance(hub: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    assert "alexnet-owt-7be5be79.pth" in perceptual.perceptual_metrics()[1]["LPIPS"]
    torch.save(models.alexnet().state_dict(), hub / "alexnet-owt-7be5be79.pth")
    metric = judge("LPIPS")
    of = shown(0.0)
    assert metric.scores(of, of).values.tolist() == [[0, 0, 0]]
    assert (metric.scores(shown(0.4), of).values > 0).all()


def test_the_frechet_distance_takes_the_features_of_inception(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    title = "Frechet distance (Inception)"
    weights = hub / "weights-inception-2015-12-05-6726825d.pth"
    assert weights.name in perceptual.perceptual_metrics()[1][title]
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        network = inception.FeatureExtractorInceptionV3("any", ["2048"], str(weights))
    torch.save(network.state_dict(), weights)
    metric = judge("Frechet distance")
    assert metric.key == "frechet_inception"
    assert metric.scores(shown(0.0), shown(0.0)).figures == pytest.approx([0], abs=1e-3)
    assert metric.scores(shown(0.4), shown(0.0)).figures[0] > 0


def test_a_network_that_cannot_be_built_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build(_: Path) -> Metric:
        raise RuntimeError("operator torchvision::nms does not exist")  # as where it is built for another torch

    monkeypatch.setattr(perceptual, "_JUDGES", (perceptual._Judge("LPIPS", {}, lambda: tmp_path, build),))
    reason = "it cannot be loaded here: operator torchvision::nms does not exist"
    assert perceptual.perceptual_metrics() == ([], {"LPIPS": reason})
