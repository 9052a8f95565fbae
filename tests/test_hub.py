"""Models saved for the Hugging Face Hub and opened again, without a network."""

import json

import pytest
import torch
from huggingface_hub import ModelCard

from models.baselines import ResNet20Config
from models.bdh_detector import v4_detector_config
from models.bdh_unet import bdh_unet_config
from models.hub import HubBDH, HubBDHDetector, HubBDHUNet, HubVideoBDH, HubVisionBDH, on_hub
from models.language import BDHConfig
from models.video_bdh import v4_video_config
from models.vision_bdh import v3_config
from tests.inspecting import with_large_weights

TINY = dict(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
IMAGES = torch.randn(2, 3, 32, 32)
MODELS = {
    HubVisionBDH: (v3_config(**TINY, rotary="axial", pool="cls"), lambda model: model(IMAGES)),
    HubVideoBDH: (
        v4_video_config(**TINY, n_frames=4, in_channels=12),
        lambda model: model(IMAGES.repeat(1, 4, 1, 1)),
    ),
    HubBDHUNet: (
        bdh_unet_config(**TINY, img_size=(40, 48), decoder="upernet", upernet_levels=(1, 1, 2, 2)),
        lambda model: model(IMAGES),
    ),
    HubBDHDetector: (v4_detector_config(**TINY, img_size=32), lambda model: model(IMAGES).boxes),
    HubBDH: (BDHConfig(**TINY, dropout=0.0), lambda model: model(torch.arange(10)[None])[0]),
}


@pytest.mark.parametrize("hub_class", MODELS)
def test_a_saved_model_is_the_same_when_it_is_opened(hub_class, tmp_path):
    config, run = MODELS[hub_class]
    model = with_large_weights(config.build())
    on_hub(model).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    opened = hub_class.from_pretrained(tmp_path)
    assert type(opened) is hub_class and isinstance(opened, type(model)) and not opened.training
    assert opened.config == config and torch.equal(run(opened), run(model))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "vision-bdh"
    assert f"{hub_class.__name__}.from_pretrained" in card.text and "arxiv.org/abs/2509.26507" in card.text


def test_fields_of_a_later_version_are_passed_over_and_missing_ones_take_their_defaults(tmp_path):
    model = with_large_weights(MODELS[HubVisionBDH][0].build())
    on_hub(model).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["of_a_later_version"] = fields.pop("attention")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert torch.equal(HubVisionBDH.from_pretrained(tmp_path)(IMAGES), model(IMAGES))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="ResNet20 has no class for the Hub, only VisionBDH, VideoBDH, BDHUNet, "):
        on_hub(ResNet20Config().build())
