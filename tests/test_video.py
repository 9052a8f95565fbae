"""Vision-BDH on clips: the model, reading clips, and the clips of a moving camera that tools/make_clips.py makes."""

import itertools
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from training import ClassificationConfig, Experiment, RunOptions, UserError, VideoConfig, fit
from models.rotary import axial_sizes, rope_frequencies
from models.video_bdh import FrameMixing, VideoBDHConfig, v4_video_config
from models.vision_bdh import v4_config
from tests.clip_data import write_clips
from tests.reference import assert_close, randomised
from tools.make_clips import MOTIONS, Options, boxes, clip
from tools.make_clips import main as make_clips
from training.data import load_dataset
from training.data.clips import read_frames
from training.runs import load_model
from training.start import take_encoder

SMALL = dict(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, img_size=8, patch_size=4, num_classes=3)
SMALL |= dict(n_frames=3, in_channels=9, dropout=0.0)
SIZE, FRAMES = 16, 4
BUILD = pytest.mark.parametrize("build", [VideoBDHConfig, v4_video_config])


def clips(n=2):
    return torch.randn(n, 9, 8, 8, dtype=torch.float64)


# ---------------------------------------------------------------------------- the model


@BUILD
@pytest.mark.parametrize("pool", ["mean", "cls", "seq"])
def test_the_fast_path_equals_the_plain_one(build, pool):
    model, images = randomised(build(**SMALL, pool=pool).build()), clips()
    fast = model(images)
    model.use_fast_path = False
    assert_close(fast, model(images), 1e-10)


@BUILD
@pytest.mark.parametrize("tubelet", [1, 2])
def test_tokens_are_those_of_each_frame_in_turn(build, tubelet):
    """Each frame, or group of frames, is cut into patches as an image is; learned positions of both are added."""
    model = randomised(build(**SMALL | dict(n_frames=3 * tubelet, in_channels=9 * tubelet), tubelet=tubelet).build())
    images = torch.randn(2, 9 * tubelet, 8, 8, dtype=torch.float64)
    tokens, grid = model.embed(images)
    assert grid == (3, 2, 2) and tokens.shape == (2, 12, 8)
    for frame in range(3):
        channels = slice(3 * tubelet * frame, 3 * tubelet * (frame + 1))
        expected = model.patch_embed(images[:, channels]).flatten(2).mT
        if model.config.pos_embed:
            expected = expected + model.pos_embed + model.pos_frame[:, frame]
        assert_close(tokens[:, 4 * frame : 4 * frame + 4], expected, 1e-12)


@pytest.mark.parametrize("choices", [{}, dict(rotary="axial", pos_embed=False), dict(rotary="none", pos_embed=False)])
def test_the_order_of_frames_matters_only_through_positions_and_mixing(choices):
    model, images = randomised(VideoBDHConfig(**SMALL, **choices).build()), clips()
    reversed_clip = images.unflatten(1, (3, 3)).flip(1).flatten(1, 2)
    change = (model(images) - model(reversed_clip)).norm() / model(images).norm()
    if choices.get("rotary") == "none":
        assert change < 1e-10
    else:
        assert change > 1e-4


@pytest.mark.parametrize("n_neurons", [8, 12, 16, 20, 256])
def test_each_axis_rotates_pairs_of_its_own(n_neurons):
    """Angles of a token at (frame, row, column), each computed by itself."""
    model = VideoBDHConfig(
        **SMALL | dict(n_embd=4, n_head=1, mlp_internal_dim_multiplier=n_neurons // 4), rotary="axial"
    )
    angles = model.build().attn.angles(2 * 3 * 4, (2, 3, 4))
    sizes = axial_sizes(n_neurons, 3)
    assert sum(sizes) == n_neurons and all(size % 2 == 0 for size in sizes) and max(sizes) - min(sizes) <= 4
    for token, place in enumerate(itertools.product(range(2), range(3), range(4))):
        expected = torch.cat([at * rope_frequencies(size) for at, size in zip(place, sizes, strict=True)]).frac()
        assert_close(angles[token], 2 * math.pi * expected, 1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_mixing_convolves_frames_apart_then_over_time(pool):
    model = randomised(v4_video_config(**SMALL, pool=pool).build())
    x, first = torch.randn(2, 12 + (pool == "cls"), 8, dtype=torch.float64), int(pool == "cls")
    mixed = model.mixed(x, 1, (3, 2, 2))
    space, time = model.mixing[1], model.frame_mixing[1]
    planes = x[:, first:].unflatten(1, (3, 2, 2)).permute(0, 4, 1, 2, 3)  # (B, D, F, rows, columns)
    kernel = space.weight[:, :, None]  # (D, 1, 1, 3, 3)
    planes = planes + F.conv3d(planes, kernel, space.bias, padding=(0, 1, 1), groups=8)
    planes = planes + F.conv3d(planes, time.weight[..., None, None], time.bias, padding=(1, 0, 0), groups=8)
    assert_close(mixed[:, first:], planes.flatten(2).mT, 1e-10)
    assert torch.equal(mixed[:, :first], x[:, :first])
    assert torch.equal(FrameMixing(8)(x[:, first:].float().unflatten(1, (3, 4))).flatten(1, 2), x[:, first:].float())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(n_frames=0), "not three times"),
        (dict(n_frames=5), "set in_channels to 15"),
        (dict(n_frames=1), "set in_channels to 3"),
        (dict(in_channels=3), "set in_channels to 9"),
        (dict(tubelet=2), "not a multiple of tubelet = 2"),
        (dict(rotary="axial", n_embd=4, mlp_internal_dim_multiplier=2), "6 neurons"),
    ],
)
def test_impossible_clips_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VideoBDHConfig(**SMALL | fields)


# ---------------------------------------------------------------------------- reading clips


def numbered(count):
    """Grey frames: number k has the value 20 + 15 k."""
    return [Image.new("RGB", (24, 20), (20 + 15 * k,) * 3) for k in range(count)]


def write_folder(path, frames):
    path.mkdir(parents=True)
    for k, frame in enumerate(frames):
        frame.save(path / f"{k:03d}.png")
    (path / ".DS_Store").write_bytes(b"x")
    (path / "notes.txt").write_text("not a frame")


def write_picture(path, frames):
    frames[0].save(
        path, save_all=True, append_images=frames[1:], **({"lossless": True} if path.suffix == ".webp" else {})
    )


def write_video(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, frames[0].size)
    for frame in frames:
        writer.write(np.asarray(frame)[..., ::-1].copy())
    writer.release()


KINDS = {"clip": write_folder, "clip.gif": write_picture, "clip.webp": write_picture, "clip.png": write_picture}
KINDS |= {"clip.AVI": write_video}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("count", "expected"), [(10, [1, 3, 6, 8]), (4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (9, [1, 3, 5, 7])]
)
def test_frames_are_the_middle_ones_of_equal_parts(name, count, expected, tmp_path):
    KINDS[name](tmp_path / name, numbered(count))
    frames = read_frames(tmp_path / name, FRAMES)
    assert [round((np.asarray(frame).mean() - 20) / 15) for frame in frames] == expected
    assert all(frame.mode == "RGB" and frame.size == (24, 20) for frame in frames)


def test_numbers_in_names_of_frames_count_by_value(tmp_path):
    (tmp_path / "clip").mkdir()
    for k, frame in enumerate(numbered(12)):
        frame.save(tmp_path / "clip" / f"frame{k}.png")
    frames = read_frames(tmp_path / "clip", 12)
    assert [round((np.asarray(frame).mean() - 20) / 15) for frame in frames] == list(range(12))


@pytest.mark.parametrize("name", ["clip", "clip.gif", "clip.webp", "clip.png"])
def test_transparent_pixels_are_white_in_every_frame(name, tmp_path):
    half = [Image.new("RGBA", (8, 8), (200, 0, 0, 0)) for _ in range(3)]
    for k, frame in enumerate(half):
        frame.paste((0, 0, 50 * k, 255), (0, 0, 8, 4))  # frames differ, or GIF keeps one only
    KINDS[name](tmp_path / name, half)
    for frame in map(np.asarray, read_frames(tmp_path / name, 3)):
        assert (frame[5:] == 255).all() and (frame[:3, :, :2] < 20).all()


def test_colours_of_a_video_are_red_green_blue(tmp_path):
    write_video(tmp_path / "red.avi", [Image.new("RGB", (32, 32), (250, 40, 10))] * 3)
    red, green, blue = np.asarray(read_frames(tmp_path / "red.avi", 1)[0]).mean((0, 1))
    assert red > 230 and 20 < green < 60 and blue < 40


@pytest.fixture
def folder(tmp_path):
    """Clips of every kind in two classes and two parts; one lies a folder deeper."""
    for part, name in itertools.product(("train", "test"), ("a", "b")):
        (tmp_path / part / name / "group").mkdir(parents=True)
        for i, (kind, write) in enumerate(KINDS.items()):
            place = tmp_path / part / name / ("group" if write in (write_folder, write_video) else "")
            write(place / f"{i}{kind}", numbered(5 + i))
    return tmp_path


def test_clips_of_all_kinds_are_found_and_read(folder):
    data = load_dataset("clips", folder, SIZE, 3 * FRAMES)
    assert data.name == f"clips {folder.name}" and data.class_names == ("a", "b")
    assert np.bincount(data.train_labels).tolist() == [5, 5] == np.bincount(data.test_labels).tolist()
    assert data.train_images.shape == (10, 12, SIZE, SIZE)
    assert sorted({Path(path).name for path in data.train_images.paths}) == [
        f"{i}{kind}" for i, kind in enumerate(KINDS)
    ]
    for i in range(10):
        frames = data.train_images[i].reshape(FRAMES, 3, SIZE, SIZE).astype(int)
        assert (np.diff(frames.mean((1, 2, 3))) > 10).all(), data.train_images.paths[i]  # in order of time
    crop = data.train_images.random_crop(0, 0.3, seed=1)
    assert crop.shape == (12, SIZE, SIZE) and np.array_equal(crop, data.train_images.random_crop(0, 0.3, seed=1))


def test_a_folder_of_animated_pictures_is_several_clips(tmp_path):
    for name, kind in itertools.product("ab", ("gif", "webp")):
        (tmp_path / name / f"person {kind}").mkdir(parents=True)
        for i in range(3):
            write_picture(tmp_path / name / f"person {kind}" / f"{i}.{kind}", numbered(4 + i))
    data = load_dataset("clips", tmp_path, SIZE, 3 * FRAMES)
    assert np.bincount(data.train_labels).tolist() == [6, 6]


def test_frames_that_a_camera_stores_with_a_second_picture_are_frames(tmp_path):
    for name in "ab":
        (tmp_path / name / "clip").mkdir(parents=True)
        for i, frame in enumerate(numbered(4)):
            frame.save(tmp_path / name / "clip" / f"{i}.jpg", format="MPO", save_all=True, append_images=[frame])
    assert len(load_dataset("clips", tmp_path, SIZE, 3 * FRAMES).train_images) == 2


def test_a_crop_is_the_same_in_all_frames(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(240, dtype=np.uint8)[None, :, None], (60, 1, 3)))
    for name in "ab":
        write_folder(tmp_path / name / "clip", [ramp] * 3)
    first, *rest = load_dataset("clips", tmp_path, SIZE, 9).train_images.random_crop(0, 0.2, seed=3).reshape(3, 3, -1)
    assert all(np.array_equal(first, each) for each in rest)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.mp4", b"no video", "no frames"),
        ("bad.gif", b"GIF89a", "cannot be read as a clip"),
        ("one.png", None, "single"),
    ],
)
def test_a_clip_that_cannot_be_read_is_named(name, content, message, folder):
    path = folder / "train" / "a" / name
    path.write_bytes(content) if content else numbered(1)[0].save(path)
    with pytest.raises(UserError, match=message) as error:
        trial = Experiment("v", v4_video_config(**SMALL | dict(num_classes=2)), video_config(), options(folder))
        fit(trial)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("data_dir", "channels", "message"), [(None, 9, "--data-dir"), ("there", 8, "--in-channels"), ("x", 9, "no such")]
)
def test_what_is_missing_is_said(data_dir, channels, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_dataset("clips", data_dir and tmp_path / data_dir, SIZE, channels)


# ---------------------------------------------------------------------------- training


SHORT = dict(epochs=1, batch_size=5, learning_rate=3e-3, weight_decay=0.05)


def video_config(**fields):
    return VideoConfig(**(SHORT | fields))


def options(folder, **fields):
    return RunOptions(data_dir=folder, runs_dir=folder.parent / "runs", device="cpu", num_workers=0, **fields)


def test_it_learns_the_way_that_things_move(tmp_path):
    """A single frame does not tell it: a model without any notion of time stays at chance."""
    data = write_clips(tmp_path / "clips" / "train", 80, frames=3, size=8).parent
    write_clips(data / "test", 15, frames=3, size=8, seed=1)
    train = video_config(epochs=10, batch_size=12, learning_rate=1e-2, warmup_steps=10)
    accuracy = {}
    for name, fields in {"time": {}, "none": dict(rotary="none", mixing="none")}.items():
        model = v4_video_config(**SMALL | dict(n_embd=16, patch_size=2) | fields)
        accuracy[name] = fit(Experiment(name, model, train, options(data)))["test"]["accuracy"]
    assert accuracy["time"] > 0.8 > accuracy["none"]
    assert load_model(data.parent / "runs" / "time" / "seed0")[0].config.n_frames == 3


def test_the_encoder_of_an_image_model_is_taken(data_dir, tmp_path, capsys):
    images = {key: SMALL[key] for key in ("n_layer", "n_embd", "n_head", "mlp_internal_dim_multiplier", "dropout")}
    train = ClassificationConfig(**SHORT, dataset="cifar10", train_limit=40)
    place = RunOptions(data_dir=data_dir, runs_dir=tmp_path / "runs", device="cpu", num_workers=0)
    image = Experiment("image", v4_config(patch_size=8, pos_embed=True, **images), train, place)
    fit(image)
    model = randomised(v4_video_config(**SMALL, pos_embed=True).build()).float()
    before = {name: value.clone() for name, value in model.named_parameters()}
    origin = take_encoder(model, image.folder / "best.pt")
    weights = load_model(image.folder)[0].state_dict()
    for name in ("encoder", "decoder", "mixing.1.weight", "level_gain.0"):
        assert torch.equal(model.get_parameter(name), weights[name]) and name in origin["taken"]
    for name in ("pos_frame", "frame_mixing.0.weight", "head.weight", "patch_embed.first.weight"):
        assert torch.equal(model.get_parameter(name), before[name]) and name in origin["drawn"]
    assert model.pos_embed.shape == (1, 4, 8) and "interpolated from 4 x 4" in capsys.readouterr().out


# ---------------------------------------------------------------------------- tools/make_clips.py


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_camera_moves_as_the_class_says(motion):
    """On a photograph whose red grows to the right and whose green grows downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, 320), np.linspace(0, 255, 240))
    photo = Image.fromarray(np.stack((red, green, 0 * red), axis=2).astype(np.uint8))
    options, rng = Options(images=Path("-"), output=Path("-")), np.random.default_rng(0)
    for _ in range(20):
        frames = np.stack([np.asarray(frame, dtype=float) for frame in clip(photo, motion, options, rng)])
        right, down = (frames[:, :, :, channel].mean((1, 2)) for channel in (0, 1))
        growth = frames[..., 0].std((1, 2))
        moved = [each[-1] - each[0] for each in (right, down, growth)]
        for change, wanted in zip(moved, MOTIONS[motion], strict=True):
            assert abs(change) < 1 if wanted == 0 else change * wanted > 1


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_window_stays_in_the_photograph(motion):
    rng = np.random.default_rng(1)
    for width, height in [(480, 360), (100, 300)] * 50:
        left, top, right, bottom = boxes(motion, width, height, 8, rng).T
        assert min(left.min(), top.min()) > -1e-6 and right.max() < width + 1e-6 and bottom.max() < height + 1e-6
        assert np.allclose(right - left, bottom - top) and (right - left > 10).all()


def test_photographs_of_the_test_clips_are_others(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.new("RGB", (60, 40), (20 * i,) * 3).save(tmp_path / "photos" / f"{i}.png")
    make_clips(Options(images=tmp_path / "photos", output=tmp_path / "clips", train=28, test=14, frames=3, size=8))
    data = load_dataset("clips", tmp_path / "clips", 8, 9)
    assert data.class_names == tuple(sorted(MOTIONS)) and np.bincount(data.test_labels).tolist() == [2] * 7
    greys = [
        {round(images[i].mean() / 20) for i in range(len(images))} for images in (data.train_images, data.test_images)
    ]
    assert len(greys[0]) == 10 and len(greys[1]) == 2 and not greys[0] & greys[1]
    with pytest.raises(UserError, match="exists"):
        make_clips(Options(images=tmp_path / "photos", output=tmp_path / "clips"))
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad.png cannot be read"):
        make_clips(Options(images=tmp_path / "photos", output=tmp_path / "half", train=28, test=14))
    assert not (tmp_path / "half").exists()


def test_the_middle_of_a_clip_and_its_photograph_do_not_tell_the_class(tmp_path):
    middles = [boxes(motion, 480, 360, 9, np.random.default_rng(3))[4] for motion in MOTIONS]
    assert all(np.allclose(middle, middles[0]) for middle in middles)
    (tmp_path / "photos").mkdir()
    for i in range(8):  # 7 for training, as many as motions: each photograph is to meet them all
        Image.new("RGB", (60, 40), (28 * i,) * 3).save(tmp_path / "photos" / f"{i}.png")
    make_clips(Options(images=tmp_path / "photos", output=tmp_path / "clips", train=98, test=14, frames=2, size=8))
    data = load_dataset("clips", tmp_path / "clips", 8, 6)
    seen = {(round(data.train_images[i].mean() / 28), data.train_labels[i]) for i in range(98)}
    assert len(seen) == 7 * 7
