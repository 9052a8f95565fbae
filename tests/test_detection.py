"""Object detection: the detector, DETR's matching and loss, COCO's metric, whole runs."""

import dataclasses
import itertools
import json
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from training import DetectionConfig, Experiment, RunOptions, fit, loop, processes
from models.bdh_detector import BDHDetectorConfig, Detections, sine_positions, v4_detector_config
from models.flops import flop_of
from tests.children import before, kill, launch_in_child, nth, run_together
from tests.inspecting import check_error
from tests.scenes import CLASS_NAMES, SIZE, TRAIN, annotated, as_pixels, corners, detection_trial, write_scenes
from tests.trials import read_rows, resumed, same_weights, weights, with_options
from tools.exporting.model_card import model_card
from training.data import box_batches
from training.detection import Detection, average_precision, match, predictions
from training.runs import load_model
from training.stored import load_checkpoint

EACH_STEP = dict(checkpoint_minutes=1e-9, log_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with data_coco: 7 and 3 images of 48 x 32 pixels, for reading only."""
    place = tmp_path_factory.mktemp("data")
    write_scenes(place / "data_coco", n_train=7)
    return place


@pytest.fixture
def trial(data, tmp_path):
    return partial(detection_trial, data, tmp_path / "runs")


def made_up(n_images=3, n_layers=2, n_queries=5, n_classes=4, most=3, rows=5, seed=0):
    """Outputs, and targets with 0, 1, ... boxes in turn and padding that looks like boxes."""
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_images, n_layers, n_queries, n_classes + 1, generator=draws) * 2
    boxes = torch.rand(n_images, n_layers, n_queries, 4, generator=draws) * 0.4 + 0.2
    targets = torch.rand(n_images, rows, 6, generator=draws) * 0.4 + 0.2
    targets[..., 0] = -1
    targets[..., 5] = 0
    for image, row in enumerate(targets):
        n = image % (most + 1)
        row[:n, 0] = torch.randint(n_classes, (n,), generator=draws)
    return Detections(logits, boxes), targets


def giou_and_iou(one, other):
    """In plain numbers: Rezatofighi et al. 2019 (arXiv 1902.09630), algorithm 1."""
    a, b = corners(one), corners(other)
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = one[2] * one[3] + other[2] * other[3] - overlap
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return float(overlap / union - (hull - union) / hull), float(overlap / union)


def l1(one, other):
    return float(sum(abs(a - b) for a, b in zip(one, other, strict=True)))


def best_assignment(logits, said, truth):
    """The cheapest of all: queries for the boxes in order. logits: (Q, n + 1), said: (Q, 4), truth: (n, 6)."""
    p = logits.double().softmax(-1)

    def cost(queries):
        pairs = zip(queries, truth, strict=True)
        return sum(
            -float(p[q, int(t[0])]) + 5 * l1(said[q], t[1:5]) - 2 * giou_and_iou(said[q], t[1:5])[0] for q, t in pairs
        )

    return min(itertools.permutations(range(len(said)), len(truth)), key=cost)


# ---------------------------------------------------------------------------- matching and loss


@pytest.mark.parametrize("seed", range(3))
def test_the_matching_is_the_cheapest_of_all(seed):
    outputs, targets = made_up(n_images=4, seed=seed)
    matches = match(*outputs, targets, targets[..., 0] >= 0)
    found = {(i, layer, box): q for i, layer, q, box in torch.stack(matches, 1).tolist()}
    for (i, truth), layer in itertools.product(enumerate(targets), range(2)):
        truth = truth[truth[:, 0] >= 0]
        expected = best_assignment(outputs.logits[i, layer], outputs.boxes[i, layer], truth)
        assert tuple(found.pop((i, layer, box)) for box in range(len(truth))) == expected
    assert not found


def expected_loss(outputs, targets):
    """In float64, layer by layer and query by query."""
    _, L, Q, n_logits = outputs.logits.shape
    truths = [each[(each[:, 0] >= 0) & (each[:, 5] == 0)] for each in targets]
    n_boxes, total = max(1, sum(map(len, truths))), 0.0
    for layer in range(L):
        entropy = weight = distance = giou = 0.0
        for i, truth in enumerate(truths):
            logits, said = outputs.logits[i, layer], outputs.boxes[i, layer]
            answers = dict(zip(best_assignment(logits, said, truth), truth, strict=True))
            for q in range(Q):
                label = int(answers[q][0]) if q in answers else n_logits - 1
                each = 1.0 if q in answers else 0.1
                weight += each
                entropy -= each * float(logits[q].double().log_softmax(-1)[label])
                if q in answers:
                    distance += l1(said[q], answers[q][1:5])
                    giou += 1 - giou_and_iou(said[q], answers[q][1:5])[0]
        total += entropy / weight + (5 * distance + 2 * giou) / n_boxes
    return total


def test_the_loss_is_that_of_the_paper_for_every_layer():
    task = Detection(DetectionConfig(**TRAIN))
    for outputs, targets in (made_up(n_images=4), made_up(n_images=1)):  # the second has no box
        assert task.loss(outputs, targets).item() == pytest.approx(expected_loss(outputs, targets), rel=1e-5)


def test_padding_and_crowds_do_not_count_in_the_loss():
    task, (outputs, targets) = Detection(DetectionConfig(**TRAIN)), made_up(n_images=4)
    expected = task.loss(outputs, targets)
    longer = torch.cat((torch.full((4, 2, 6), -1.0), targets, torch.full((4, 3, 6), 0.5)), dim=1)
    longer[:, -3:, 0], longer[:, -3:, 5] = 1, 1  # crowds
    assert torch.allclose(task.loss(outputs, longer), expected, rtol=1e-6)


def test_answers_that_are_not_finite_give_a_loss_that_is_not():
    """The loop then stops with its message; scipy would raise an error of its own."""
    outputs, targets = made_up()
    outputs.boxes[1] = torch.nan
    assert Detection(DetectionConfig(**TRAIN)).loss(outputs, targets).isnan()


def test_more_boxes_than_queries():
    outputs, targets = made_up(n_images=4, n_queries=2)
    matches = match(*outputs, targets, targets[..., 0] >= 0)
    assert sorted(torch.bincount(matches.image, minlength=4).tolist()) == [0, 2, 4, 4]  # of two layers
    assert Detection(DetectionConfig(**TRAIN)).loss(outputs, targets).isfinite()


# ---------------------------------------------------------------------------- the metric


def expected_ap(predicted, truth, threshold):
    """The mean over classes of the precision at recalls 0, 0.01, ..., 1 (Everingham et al. 2010, as COCO has it)."""
    precisions = []
    for label in sorted({int(t[0]) for rows in truth for t in rows if t[0] >= 0}):
        wanted = [[t for t in rows if t[0] == label] for rows in truth]
        said = [(p[1].item(), i, p[2:]) for i, rows in enumerate(predicted) for p in rows if p[0] == label]
        taken, hits = set(), []
        for _, i, box in sorted(said, key=lambda each: -each[0]):
            free = [(giou_and_iou(box, t[1:5])[1], k) for k, t in enumerate(wanted[i]) if (i, k) not in taken]
            iou, k = max(free, default=(0.0, 0))
            hits.append(iou >= threshold)
            taken |= {(i, k)} if hits[-1] else set()
        recall = np.cumsum(hits) / sum(map(len, wanted))
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        for r in np.linspace(0, 1, 101):
            reached = precision[recall >= r - 1e-12]
            precisions.append(reached.max() if len(reached) else 0.0)
    return np.mean(precisions)


def near_truth(truth, spread, seed=0):
    """Predictions (N, M + 2, 6): the boxes moved by random amounts, some of a wrong class, and two strangers."""
    draws = torch.Generator().manual_seed(seed)
    N, M = truth.shape[:2]
    predicted = torch.rand(N, M + 2, 6, generator=draws) * 0.5 + 0.2
    predicted[..., 0] = torch.randint(3, (N, M + 2), generator=draws)
    predicted[:, :M, 2:] = truth[..., 1:5] + spread * torch.randn(N, M, 4, generator=draws)
    right = torch.rand(N, M, generator=draws) < 0.7
    predicted[:, :M, 0] = torch.where(right, truth[..., 0].clamp(min=0), predicted[:, :M, 0])
    return predicted


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_as_defined(seed):
    _, truth = made_up(n_images=8, n_classes=3, seed=seed)
    predicted = near_truth(truth, 0.03, seed)
    ratios = average_precision(predicted, truth)
    assert ratios["ap50"] == pytest.approx(expected_ap(predicted, truth, 0.5), abs=1e-9)
    every = [expected_ap(predicted, truth, threshold) for threshold in np.arange(50, 100, 5) / 100]
    assert ratios["map"] == pytest.approx(np.mean(every), abs=1e-9) and 0.1 < ratios["map"] < ratios["ap50"] < 0.95


def test_what_is_said_is_the_last_layers_and_nothing_takes_its_share():
    """Of each query the surest class, its probability with "no object" among the classes, and its box."""
    outputs, _ = made_up()
    found, sure = predictions(Detections(*outputs)), outputs[0][:, -1].softmax(-1)[..., :-1]
    assert torch.equal(found[..., 0], sure.argmax(-1).float()) and torch.allclose(found[..., 1], sure.amax(-1))
    assert torch.equal(found[..., 2:], outputs[1][:, -1])


def test_perfect_empty_and_crowded():
    _, truth = made_up(n_images=8, n_classes=3)
    perfect = torch.cat((truth[..., :1].clamp(min=0), (truth[..., :1] >= 0).float(), truth[..., 1:5]), dim=-1)
    assert average_precision(perfect, truth) == {"map": 1.0, "ap50": 1.0}
    elsewhere = perfect.clone()
    elsewhere[..., 2:] = torch.tensor([0.05, 0.05, 0.1, 0.1])
    assert average_precision(elsewhere, truth) == {"map": 0.0, "ap50": 0.0}
    assert average_precision(perfect[:0], truth[:0]) == average_precision(perfect[:1], truth[:1])
    assert average_precision(perfect[:1], truth[:1]) == {"map": None, "ap50": None}  # the first image has no box
    stranger = torch.tensor([[[1.0, 1.0, 0.8, 0.8, 0.1, 0.1]]]).expand(len(truth), -1, -1)  # surer than all others
    crowd = torch.tensor([[[1.0, 0.8, 0.8, 0.2, 0.2, 1.0]]]).expand(len(truth), -1, -1)
    said = torch.cat((perfect, stranger), dim=1)
    assert average_precision(said, truth)["ap50"] < 1
    assert average_precision(said, torch.cat((truth, crowd), dim=1))["ap50"] == 1


# ---------------------------------------------------------------------------- the model


def test_outputs_and_sizes():
    model = v4_detector_config(**SIZE, img_size=(32, 48), num_classes=3, n_queries=7).build()
    for size in ((32, 48), (64, 40)):
        outputs = model(torch.randn(2, 3, *size))
        assert outputs.logits.shape == (2, 2, 7, 4) and outputs.boxes.shape == (2, 2, 7, 4)
        assert outputs.boxes.dtype == torch.float32 and ((outputs.boxes > 0) & (outputs.boxes < 1)).all()
    assert outputs.logits.softmax(-1)[..., -1].mean() > 0.7  # it starts with nothing found
    assert flop_of(model.config) > flop_of(dataclasses.replace(model.config, decoder_layers=1)) > 1e6


def test_a_layer_of_the_decoder_normalises_before_each_part():
    torch.manual_seed(0)
    model = v4_detector_config(**SIZE | dict(decoder_layers=1), img_size=32, n_queries=3).build().eval()
    layer, tokens = model.layers[0], torch.randn(2, 16, SIZE["n_embd"])
    x = queries = model.query_tokens.expand(2, -1, -1)
    one = layer.norm1(x)
    x = x + layer.self_attn(one, one, one)[0]
    x = x + layer.multihead_attn(layer.norm2(x), tokens, tokens)[0]
    x = x + layer.linear2(layer.linear1(layer.norm3(x)).relu())
    assert torch.allclose(layer(queries, tokens), x, atol=1e-5)


def test_positions():
    """Each by the paper's formula; the first half of the width is the row's."""
    positions = sine_positions((2, 3), 8).view(2, 3, 8).double()
    for row, column in itertools.product(range(2), range(3)):
        angles = [2 * np.pi * (k + 0.5) / n for k, n in ((row, 2), (column, 3))]
        expected = [f(angle / 10_000 ** (i / 2)) for angle in angles for f in (np.sin, np.cos) for i in range(2)]
        assert positions[row, column].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_answer_depends_on_where_things_are():
    """A picture turned upside down is another one, also without positions in the encoder."""
    model = BDHDetectorConfig(**SIZE, img_size=32, rotary="none", pos_embed=False).build().eval()
    images = torch.randn(1, 3, 32, 32)
    shuffled = images.unflatten(2, (4, 8)).flip(2).flatten(2, 3)  # rows of patches
    assert not torch.allclose(model(images).boxes, model(shuffled).boxes, atol=1e-5)


def test_every_parameter_learns_and_an_empty_share_gives_zeros():
    task, model = Detection(DetectionConfig(**TRAIN)), v4_detector_config(**SIZE, img_size=32).build().train()
    _, targets = made_up(n_images=4)
    task.loss(model(torch.randn(4, 3, 32, 32)), targets).backward()
    assert all(each.grad.abs().sum() > 0 for each in model.parameters())
    model.zero_grad()
    task.loss(model(torch.randn(0, 3, 32, 32)), targets[:0]).backward()
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in model.parameters())


@pytest.mark.parametrize(
    ("field", "word"),
    [
        (dict(n_queries=0), "n_queries = 0"),
        (dict(n_embd=18, stem="patch"), "multiple of 4"),
        (dict(decoder_heads=3), "decoder_heads"),
    ],
)
def test_impossible_values_are_refused(field, word):
    with pytest.raises(ValueError, match=word):
        v4_detector_config(**(SIZE | field))


# ---------------------------------------------------------------------------- whole runs


def test_images_read_in_every_epoch_make_the_same_run(trial, monkeypatch, capsys):
    """By worker processes, instead of being kept in memory; and a limit draws images by the seed."""
    fit(trial("memory", train_limit=5))
    monkeypatch.setattr(box_batches, "fit_in_memory", lambda parts, device: False)
    fit(trial("files", train_limit=5, options=dict(num_workers=2)))
    folders = [trial(name).folder for name in ("memory", "files")]
    assert same_weights(*map(weights, folders))
    assert read_rows(folders[0], measured=False) == read_rows(folders[1], measured=False)
    assert "5 images to train, 3 to validate" in capsys.readouterr().out


def killed_in_step(step):
    before(loop, "optimizer_step", nth(step, lambda session: kill()))


def test_killed_inside_an_epoch_and_resumed_ends_the_same(trial):
    whole, cut = trial("whole", optimizer="muon"), trial("cut", optimizer="muon", options=EACH_STEP)
    fit(whole)
    code, _ = launch_in_child(cut, partial(killed_in_step, 7), "--checkpoint-minutes=1e-9", "--log-every=1")
    assert code == -signal.SIGKILL and load_checkpoint(cut.folder / "last.pt")["inside"]["steps"] == 2
    fit(resumed(with_options(cut, checkpoint_minutes=None)))
    assert same_weights(weights(whole.folder), weights(cut.folder))
    assert read_rows(whole.folder, measured=False) == read_rows(cut.folder, measured=False)


def train_together(run):
    with processes.joined():
        fit(run)


def test_two_processes_make_the_run_of_one(trial):
    """The last batch has one image, so one process has none."""
    sgd = dict(optimizer="sgd", learning_rate=0.01, momentum=0.9)
    by_one, by_two = (trial(name, model=dict(dropout=0.0), **sgd) for name in ("one", "two"))
    fit(by_one)
    results = run_together(2, train_together, by_two)
    assert [code for code, *_ in results] == [0, 0], results
    for one, two in zip(read_rows(by_one.folder), read_rows(by_two.folder), strict=True):
        for key in ("train_loss", "val_loss", "val_map", "val_ap50"):
            assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-4, abs=1e-6), key


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with data_coco, three images of which are learned by heart and validate, and the run's folder."""
    place = tmp_path_factory.mktemp("learned")
    folder = write_scenes(place / "data_coco", n_train=3, side=16, seed=1)
    for path in (folder / "train").iterdir():
        (folder / "val" / path.name).write_bytes(path.read_bytes())
    annotated(folder, "val").write_bytes(annotated(folder).read_bytes())
    size = SIZE | dict(n_embd=32, n_queries=5, dropout=0.0, img_size=(32, 48), decoder_mlp_dim=32)
    train = DetectionConfig(epochs=100, batch_size=3, learning_rate=1e-2, weight_decay=0.0, optimizer="muon")
    options = RunOptions(data_dir=place, runs_dir=place / "runs", device="cpu", num_workers=0)
    run = Experiment("learned", v4_detector_config(**size), train, options)
    fit(run)
    return place, run.folder


def test_three_images_are_learned_by_heart(learned):
    """The whole way from files to the metric, which nothing but the right boxes and classes can raise."""
    rows = read_rows(learned[1])
    assert float(rows[0]["val_ap50"]) < 0.5 and float(rows[-1]["val_ap50"]) > 0.95 and float(rows[-1]["val_map"]) > 0.5
    assert rows[-1]["train_map"] == "" and json.loads((learned[1] / "summary.json").read_text())["test"] is None


def test_what_was_found_is_drawn(learned, call_script, tmp_path, capsys):
    place, run = learned
    alone = tmp_path / "alone.png"
    alone.write_bytes((place / "data_coco" / "val" / "000000.png").read_bytes())
    out = ["--data-dir", place, "--output-dir", tmp_path / "out"]
    paths = [place / "data_coco" / "val", alone]
    assert call_script("interpretability/predict.py", *paths, "--run", run, *out) == 0
    assert "4 pictures, 3 with ground truth" in capsys.readouterr().out
    assert len([*(tmp_path / "out" / "learned_seed0").iterdir()]) == 4


def test_boxes_in_the_picture_are_the_models(learned):
    from interpretability.common.boxes import detect, draw_boxes, find_boxes

    place, run = learned
    model, config = load_model(run)
    truth = find_boxes("coco", place, CLASS_NAMES)
    for path in (place / "data_coco" / "val").iterdir():
        image, wanted = np.asarray(Image.open(path)), truth[path.resolve()]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            answers = predictions(model.eval()(pixels))[0]
        found = detect(model, image, (32, 48), torch.device("cpu"), 0.2)
        assert 0 < len(found) == (answers[:, 1] >= 0.2).sum() and (np.diff(found[:, 1]) <= 0).all()
        assert all(np.abs(answers.numpy() - row).max(1).min() < 1e-5 for row in found)
        figure = draw_boxes(image, found, wanted, config["data"]["class_names"], "a title")
        drawn, there = ([patch.get_bbox().extents + 0.5 for patch in ax.patches] for ax in figure.axes)
        assert np.allclose(there, as_pixels(wanted, (48, 32)), atol=1e-4)
        assert np.allclose(drawn, [np.array(corners(row[2:])) * (48, 32, 48, 32) for row in found], atol=1e-4)
        assert figure.axes[0].texts[0].get_text() == f"{CLASS_NAMES[int(found[0, 0])]} {found[0, 1]:.0%}"


def test_truth_of_other_classes_is_not_drawn(learned, call_script, tmp_path, capsys):
    place, run = learned
    shutil.copytree(place / "data_coco", tmp_path / "data_coco")
    for file in (tmp_path / "data_coco" / "annotations").iterdir():
        about = json.loads(file.read_text())
        about["categories"][0]["name"] = "something else"
        file.write_text(json.dumps(about))
    images = tmp_path / "data_coco" / "val"
    out = ["--data-dir", tmp_path, "--output-dir", tmp_path / "out"]
    assert call_script("interpretability/predict.py", images, "--run", run, *out) == 0
    said = capsys.readouterr()
    assert "3 pictures, 0 with ground truth" in said.out and "has other classes than the run" in said.err


def test_a_detection_run_is_named_as_one_by_exports_and_refused_by_scripts_for_other_tasks(
    learned, call_script, capsys, tmp_path
):
    place, run = learned
    assert "pipeline_tag: object-detection" in model_card(run) and "mAP" in model_card(run)
    capsys.readouterr()
    assert call_script("tools/export.py", run, "--to", "onnx", "--output", tmp_path / "out") == 1
    check_error(capsys, "is a BDHDetector, which does not classify images")
    image = place / "data_coco" / "val" / "000000.png"
    assert call_script("interpretability/classify.py", image, "--run", run) == 1
    check_error(capsys, "classif")
    assert call_script("interpretability/sparsity.py", "--run", run) == 1
    check_error(capsys, "cannot be inspected")


def test_a_trained_encoder_is_taken(trial, learned, capsys):
    size = dict(n_embd=32, decoder_mlp_dim=32)
    run = trial("warm", model=size | dict(encoder=learned[1] / "best.pt"), epochs=1)
    fit(run)
    said = capsys.readouterr().out
    assert "patch_embed" in said and "drawn: the rest of the model" in said
    assert "encoder.encoder" not in json.loads((run.folder / "config.json").read_text())["origin"]["drawn"]
