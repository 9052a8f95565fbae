"""Benchmarks of reading images and of model sizes."""

import pandas as pd
import pytest
import torch
from torch import nn

from benchmarks import data_loading, model_sizes
from models.flops import flop_per_image
from models.vision_bdh import v2_config
from tests.camvid_data import write_camvid
from training.config import UserError


def test_loading_is_measured_for_each_number_of_workers(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(data_loading, "SIDE", 24)
    (tmp_path / "data_cifar10").symlink_to(data_dir / "data_cifar10")
    write_camvid(tmp_path / "data_camvid")
    places = dict(images_dir=tmp_path / "jpegs", data_dir=tmp_path, output_dir=tmp_path / "out")
    sizes = dict(images=60, workers=(1,), batch_size=8, img_size=16, repeats=1, memory_images=30, device="cpu")
    data_loading.main(data_loading.Options(**places, **sizes))
    jpegs = sorted((tmp_path / "jpegs" / "train").glob("*/*.jpg"))
    assert len(jpegs) == 60 and len([path for path in jpegs if path.parent.name == "street"]) == 30
    (path,) = [path for path in (tmp_path / "out").glob("*.csv") if not path.stem.endswith("_memory")]
    rates, memory = (pd.read_csv(each) for each in (path, path.with_name(f"{path.stem}_memory.csv")))
    assert rates["workers"].tolist() == [1] and rates["images"].tolist() == [59]
    assert (rates["images_per_sec"] > 0).all() and (rates["cpu_ms_per_image"] > 0).all()
    assert memory["epoch"].tolist() == list(range(1, 11)) and (memory["memory_mb"] > 100).all()


def test_no_jpeg_of_the_user_is_replaced(data_dir, tmp_path, monkeypatch):
    (tmp_path / "data_cifar10").symlink_to(data_dir / "data_cifar10")
    write_camvid(tmp_path / "data_camvid")
    options = data_loading.Options(images_dir=tmp_path / "mine", data_dir=tmp_path, images=2)
    mine = tmp_path / "mine" / "train" / "street" / "0.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"mine holds other files, .* name a new folder"):
        data_loading.make_jpegs(options)
    assert mine.read_bytes() == b"mine" and len(list(mine.parent.iterdir())) == 1
    monkeypatch.setattr(data_loading, "SIDE", 24)
    for _ in range(2):  # the second call makes them in the folder of the first
        data_loading.make_jpegs(data_loading.Options(images_dir=tmp_path / "new", data_dir=tmp_path, images=2))
    monkeypatch.undo()
    with pytest.raises(UserError, match="is smaller than 256 pixels: give the original CamVid"):
        data_loading.make_jpegs(data_loading.Options(images_dir=tmp_path / "small", data_dir=tmp_path, images=2))


@pytest.mark.parametrize(
    ("name", "millions", "gmac"), [("v2 small", 22.0, 4.6), ("v2 base", 86.4, 17.6), ("ViT-Small", 22.1, 4.6)]
)
def test_sizes_are_those_of_the_vits(name, millions, gmac):
    config = model_sizes.configs()[name]
    found = model_sizes.cost(config)
    assert found["parameters"] / 1e6 == pytest.approx(millions, abs=0.1)
    assert found["forward_gmac"] == pytest.approx(gmac, rel=0.17)
    assert found["training_gflop"] == pytest.approx(6 * found["forward_gmac"], rel=0.02)
    if name.startswith("v2"):
        T, D, m = 196, config.n_embd, config.mlp_internal_dim_multiplier
        level = 3 * m * D**2 + T * D * (m + config.n_head)  # the products, and attention by its scores
        expected = config.n_layer * T * level + T * 768 * D + 1000 * D
        assert found["forward_gmac"] * 1e9 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_operations_of_a_convolution_are_counted_by_its_groups(kind, groups):
    """The first convolution needs no gradient for the images, the second one two gradients as costly as itself."""
    second = kind(6, 9, kernel_size=3, stride=2, padding=1, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 6, kernel_size=1), second)
    places = 16 * 16 if kind is nn.ConvTranspose2d else 8 * 8  # at each of which a filter is applied
    expected = 2 * (2 * 6 * 3 * 16 * 16) + 3 * (2 * 6 * 9 * 3 * 3 // groups * places)
    assert flop_per_image(model, 16) == expected


def test_recomputing_keeps_less():
    config = v2_config(n_layer=3, n_embd=16, n_head=2, mlp_internal_dim_multiplier=8)
    options, device = model_sizes.Options(precision="float32"), torch.device("cpu")
    kept, again = (model_sizes.kept_mb(config, options, device, recompute) for recompute in (False, True))
    assert 0 < again < 0.5 * kept
