"""interpretability/visualize_attention.py: attention of a patch, drawn and animated."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from matplotlib.animation import FFMpegWriter
from PIL import Image

from training import fit
from analysis.plotting.style import DPI, PAGE
from interpretability.common.attention_figures import LARGEST_PANEL, animate, caption, draw
from interpretability.common.trained import TrainedRun
from interpretability.visualize_attention import Options, look, same_place, visualize
from models.baselines import ViTConfig
from models.vision_bdh import v2_config
from tests.inspecting import check_error, train_masked
from tests.pictures import check_picture
from training.config import ROOT
from training.data import load_dataset

SCRIPT = "interpretability/visualize_attention.py"
PATCH, QUERY = (1, 3), 7  # on a grid of 4 x 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory, experiment_in):
    """Folders of tiny runs on the made-up CIFAR-10, each trained for an epoch: v2, coarse with 2 x 2 patches, vit."""
    folder = tmp_path_factory.mktemp("work") / "runs"
    sizes = dict(patch_size=8, n_layer=3, n_embd=8, n_head=2)
    models = {
        "v2+n_embd=8": v2_config(mlp_internal_dim_multiplier=4, **sizes),
        "coarse": v2_config(mlp_internal_dim_multiplier=4, **(sizes | dict(patch_size=16, n_layer=8))),
        "vit": ViTConfig(mlp_dim=16, **sizes),
    }
    for name, model in models.items():
        fit(dataclasses.replace(experiment_in(folder, name, epochs=1), model=model))
    return {name.partition("+")[0]: folder / name / "seed0" for name in models}


@pytest.fixture
def view(runs, data_dir):
    """What one of the runs attends to in test images 4 and 9; keywords are flags of the script."""

    def make(run, name="", patch=PATCH, levels=(0, 1, 2), numbers=(4, 9), **options):
        return look(TrainedRun(runs[run], data_dir, "cpu"), name, patch, levels, numbers, Options(**options))

    return make


@pytest.fixture
def call(call_script, runs, data_dir, tmp_path):
    """Runs the script on a run; returns its exit code and the files of its output by suffix."""

    def go(run, *flags):
        out = tmp_path / "out"
        where = ["--data-dir", data_dir, "--output-dir", out, "--device", "cpu"]
        code = call_script(SCRIPT, "--run", runs[run], *where, *flags)
        return code, {path.suffix: path for path in out.glob("*/*")}

    return go


# ---------------------------------------------------------------------------- what is drawn


def panels_of(figure, shape):
    """Axes of pictures of this shape, as they were drawn."""
    return [ax for ax in figure.axes if ax.images and ax.images[0].get_array().shape[:2] == shape]


def texts_of(figure):
    return [text.get_text() for text in figure.texts]


@pytest.mark.parametrize("name", ["v2", "vit"])
@pytest.mark.parametrize("show", ["scores", "shares", "rollout"])
def test_panels(view, data_dir, name, show):
    """What matplotlib is given: which images and maps in which order, and on which scale."""
    drawn = view(name, show=show)
    figure = draw([drawn])
    photos, maps = panels_of(figure, (32, 32)), panels_of(figure, (4, 4))
    data = load_dataset("cifar10", data_dir)
    assert len(photos) == 2 and len(maps) == 6
    for ax, index in zip(photos, (4, 9), strict=True):
        assert np.array_equal(ax.images[0].get_array(), data.test_images[index].transpose(1, 2, 0))
        corner, frame = np.array(ax.patches[0].get_xy()), ax.patches[0].get_width()
        assert 0 < 23.5 - corner[0] < 1 and 0 < 7.5 - corner[1] < 1 and 8 < frame < 10  # just around the patch
    for ax, (image, level) in zip(maps, [(image, level) for image in range(2) for level in range(3)], strict=True):
        values = drawn.looks[image].maps[level][0].numpy()
        assert np.array_equal(ax.images[0].get_array(), values)
        others = np.delete(values, QUERY)
        limit = others.max() if show == "rollout" else abs(values).max()
        signed = name == "v2" and show == "scores"
        assert ax.images[0].get_clim() == pytest.approx((-limit if signed else 0, limit))
        scale = ax.get_title().split("\n")[-2 if show == "rollout" else -1]
        said = float(scale.removeprefix("±").removeprefix("0 to ").removesuffix(" %"))
        assert said == pytest.approx(limit * (1 if signed else 100), rel=0.06)
        if show == "rollout":
            assert float(ax.get_title().split("itself ")[1][:-2]) == pytest.approx(100 * values[PATCH], rel=0.06)
    levels = ["up to level 1", "up to level 3"] if show == "rollout" else ["level 1 of 3", "level 3 of 3"]
    assert [ax.get_title().split("\n")[0] for ax in (maps[0], maps[2])] == levels
    text = " ".join(texts_of(figure))
    kind = {"scores": "raw scores" if name == "v2" else "softmax weights"}.get(show, "mean over 2 heads")
    assert kind in text and "row 1, column 3" in text and f"true: {drawn.looks[1].truth}" in text and "image 9" in text


def test_heads_one_by_one(view):
    """Here with the largest score below 0, which the scale has to reach, too."""
    drawn = view("v2", levels=(0, 2), per_head=True)
    looks = [dataclasses.replace(each, maps={at: -maps for at, maps in each.maps.items()}) for each in drawn.looks]
    maps = panels_of(draw([dataclasses.replace(drawn, looks=looks)]), (4, 4))
    order = [(image, level, head) for image in range(2) for level in (0, 2) for head in range(2)]
    for ax, (image, level, head) in zip(maps, order, strict=True):
        values = -drawn.looks[image].maps[level][head].numpy()
        limit = abs(values).max()
        assert np.array_equal(ax.images[0].get_array(), values)
        assert ax.images[0].get_clim() == pytest.approx((-limit, limit))
        assert ax.get_ylabel() == ("" if head else f"level {level + 1}")
    assert [ax.get_title().split("\n")[0] for ax in maps[:2]] == ["head 1", "head 2"]


def test_two_runs(view):
    """The same images in turn, each run with its own patch and levels."""
    views = [view("v2", "ours"), view("coarse", "theirs", patch=(0, 1), levels=(0, 4, 7))]
    figure = draw(views)
    rows = sorted({round(ax.get_position().y0, 6) for ax in panels_of(figure, (32, 32))}, reverse=True)
    assert len(rows) == 4
    for place, row in enumerate(rows):
        drawn, n_levels, side = views[place % 2], (3, 8)[place % 2], (8, 16)[place % 2]
        photo, *maps = [ax for ax in figure.axes if round(ax.get_position().y0, 6) == row]
        assert side < photo.patches[0].get_width() < side + 2
        for ax, level in zip(maps, drawn.levels, strict=True):
            assert np.array_equal(ax.images[0].get_array(), drawn.looks[place // 2].maps[level][0].numpy())
            assert f"level {level + 1} of {n_levels}" in ax.get_title()
    texts = texts_of(figure)
    assert texts.count("ours") == texts.count("theirs") == texts.count("test image 4") == 2


def made_up(seen, n_levels, n_heads, truth="aquarium_fish"):
    """A view with maps of another number of levels and heads, and classes with long names."""
    maps = {level: torch.randn(n_heads, 4, 4) * 10.0 ** (level - 4) for level in range(n_levels)}
    looks = [dataclasses.replace(each, maps=maps, truth=truth, predicted="lawn_mower") for each in seen.looks]
    return dataclasses.replace(seen, looks=looks, per_head=n_heads > 1)


def test_names_from_data_are_not_formulas(view):
    """matplotlib fails on many texts between two dollars, and drops the dollars of others."""
    figure = draw([made_up(view("v2"), 1, 1, truth=r"$\frac$")])
    figure.draw_without_rendering()
    assert figure.texts[3].get_text() == r"true: \$\frac\$" and not figure.texts[3]._preprocess_math(r"\$\frac\$")[1]


@pytest.mark.parametrize(
    "n_levels, n_heads, n_runs", [(1, 1, 1), (2, 1, 2), (3, 1, 2), (6, 1, 1), (12, 1, 2), (2, 7, 1)]
)
def test_nothing_overlaps_and_all_is_on_the_page(view, n_levels, n_heads, n_runs):
    torch.manual_seed(0)
    seen = made_up(view("v2", "vit_tiny_cifar10", numbers=(1, 2, 3, 4)), n_levels, n_heads)
    figure = draw([seen] * n_runs)
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] <= PAGE + 1e-6
    axes = [ax for ax in figure.axes if ax.images]
    boxes = [ax.get_position().transformed(figure.transFigure) for ax in axes]
    boxes += [text.get_window_extent() for text in (*figure.texts, *(ax.title for ax in axes if ax.get_title()))]
    boxes += [ax.yaxis.label.get_window_extent() for ax in axes if ax.get_ylabel()]
    page = figure.bbox
    for index, box in enumerate(boxes):
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1 and box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1
        for other in boxes[:index]:
            across, up = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, up) < 2  # pixels
    shapes = {tuple(np.round((box.width, box.height))) for box in boxes[: len(axes)]}
    assert len(shapes) == 1 and max(max(shapes)) <= LARGEST_PANEL * figure.dpi + 1


# ---------------------------------------------------------------------------- the script


def test_from_another_folder(runs, data_dir, run_script, tmp_path):
    where = ["--data-dir", data_dir, "--output-dir", "maps", "--device", "cpu"]
    done = run_script(ROOT / SCRIPT, "--run", runs["v2"], "--patch", 1, 3, "--indices", 5, 0, *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "maps" / "v2+n_embd=8_seed0"
    name = "attention_scores_patch1-3"
    assert {path.name for path in folder.iterdir()} == {f"{name}.png", f"{name}.svg"}
    assert all(path.name in done.stdout for path in folder.iterdir())
    check_picture(folder / f"{name}.png")


def test_defaults(runs, data_dir, monkeypatch, tmp_path):
    """Four images, of three levels; the picture of the quickstart."""
    monkeypatch.setenv("VISION_BDH_DATA", str(data_dir))
    drawn = []
    monkeypatch.setattr(
        "interpretability.visualize_attention.draw", lambda views, *_: drawn.append(views) or draw(views)
    )
    path = visualize(runs["coarse"], tmp_path / "pictures")
    assert path == tmp_path / "pictures" / "attention_scores_patch1-1.png"
    check_picture(path)
    ((seen,),) = drawn
    assert seen.levels == [0, 4, 7] and seen.patch == (1, 1) and list(seen.numbers) == [0, 10, 20, 30]


@pytest.mark.parametrize("versus", ["vit", "coarse"])
def test_side_by_side(call, runs, capsys, versus):
    """The animation has all levels, the picture the usual three."""
    animation = ["--animate", "gif", "--images", 1] if versus == "coarse" else ["--all-levels"]
    code, files = call("v2", "--versus", runs[versus], "--show", "rollout", "--patch", 1, 3, *animation)
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert files[".png"].name == f"attention_rollout_patch1-3_versus_{versus}_seed0.png"
    check_picture(files[".png"])
    assert str(runs["v2"]) in captured.out and str(runs[versus]) in captured.out
    if versus == "coarse":
        assert Image.open(files[".gif"]).n_frames == 8


def test_checkpoints_of_a_run_are_told_apart(data_dir, tmp_path, experiment, call_script):
    """In captions and in names of files, which must not replace each other."""
    trial = experiment(epochs=1, model=dict(n_layer=2), options={"keep_every": 1})
    fit(trial)
    runs = [TrainedRun(path, data_dir, "cpu") for path in (trial.folder, trial.folder / "epoch_000.pt")]
    views = [look(run, "", PATCH, (0, 1), (4,), Options()) for run in runs]
    assert caption(views[:1])[1] == "trial, seed 0" and caption(views[1:])[1] == "trial, seed 0, epoch_000"
    best, first = (["--run", run.checkpoint] for run in runs)
    where = ["--data-dir", data_dir, "--output-dir", tmp_path / "out", "--device", "cpu", "--images", 1]
    for flags in (best, first, [*best, "--versus", runs[1].checkpoint], [*first, "--versus", runs[0].checkpoint]):
        assert call_script(SCRIPT, *flags, *where) == 0
    assert len(list(tmp_path.glob("out/trial_seed0/*.png"))) == 4


def test_a_pretraining_run_is_refused(data_dir, tmp_path, experiment, call_script, capsys):
    run = train_masked(experiment)
    capsys.readouterr()
    assert call_script(SCRIPT, "--run", run, "--data-dir", data_dir, "--output-dir", tmp_path / "out") == 1
    check_error(capsys, "is a MaskedBDH, which has no logits: give a run that classifies images")


def test_the_patch_at_the_same_place():
    assert same_place((1, 3), (4, 4), (4, 4)) == (1, 3)
    assert [same_place((row, 0), (4, 4), (2, 2))[0] for row in range(4)] == [0, 0, 1, 1]
    assert same_place((0, 4), (2, 5), (4, 10)) == (1, 9)


def as_pixels(picture):
    return np.asarray(picture.convert("RGB")).astype(float)


def test_gif(view, tmp_path):
    """A frame a level; the run with fewer levels ends on its last."""
    torch.manual_seed(0)
    views = [made_up(view("v2", "ours"), 2, 1), made_up(view("vit", "theirs"), 4, 1)]
    animate(views, tmp_path / "new" / "levels.gif")
    with Image.open(tmp_path / "new" / "levels.gif") as animation:
        assert animation.n_frames == 4 and animation.info["duration"] == 1000
        frames = []
        for place in range(4):
            animation.seek(place)
            frames.append(as_pixels(animation))
    for place, levels in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        figure = draw([each.of([level]) for each, level in zip(views, levels, strict=True)])
        figure.savefig(tmp_path / "frame.png", dpi=DPI)
        away = [np.abs(frame - as_pixels(Image.open(tmp_path / "frame.png"))).mean() for frame in frames]
        assert away[place] < min(4, 0.7 * min(np.delete(away, place)))  # of 255; a palette has 256 colours


def test_mp4(call):
    """Where ffmpeg is missing, skipped, but not in CI, which has to install it."""
    if not FFMpegWriter.isAvailable():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no ffmpeg: apt-get install ffmpeg")
    code, files = call("v2", "--animate", "mp4", "--levels", 1, 3, "--show", "shares")
    assert code == 0
    assert files[".mp4"].read_bytes()[4:8] == b"ftyp" and files[".mp4"].stat().st_size > 5000


def test_ffmpeg_that_is_missing_or_fails(call, tmp_path, monkeypatch, capsys):
    """The first is told before anything is computed, the second leaves the picture."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    code, files = call("v2", "--animate", "mp4")
    assert code == 1 and not files
    check_error(capsys, "needs the program ffmpeg")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "bin" / "ffmpeg").chmod(0o755)
    code, files = call("v2", "--animate", "mp4")
    assert code == 1 and ".png" in files
    check_error(capsys, "ffmpeg failed .* --animate gif")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--patch", 4, 0], "outside the grid of 4 x 4"),
        (["--patch", 0, -1], "outside the grid of 4 x 4"),
        (["--levels", 0], "no level 0: the model has 3"),
        (["--levels", 2, 4], "no level 4: the model has 3"),
        (["--levels"], "no level chosen"),
        (["--levels", 1, "--all-levels"], "not both"),
        (["--show", "rollout", "--per-head"], "mean over heads"),
        (["--images", 0], "no images chosen"),
        (["--indices"], "no images chosen"),
        (["--indices", 3, 40], "no test image 40"),
        (["--versus", "digits"], "was trained on digits, not on cifar10: give another run"),
        (["--output-dir", "a-file"], "a-file"),
    ],
)
def test_bad_input_is_one_message(call, tmp_path, capsys, experiment_in, flags, said):
    (tmp_path / "a-file").touch()
    if "digits" in flags:
        other = experiment_in(tmp_path / "runs", epochs=1, dataset="digits", model=dict(img_size=8, in_channels=1))
        fit(other)
        flags = ["--versus", other.folder]
    capsys.readouterr()
    code, files = call("v2", *flags)
    assert code == 1 and not files
    check_error(capsys, said)


def test_wrong_flags(call):
    assert call("v2", "--pach", 1, 2)[0] == call("v2", "--show", "everything")[0] == 2
