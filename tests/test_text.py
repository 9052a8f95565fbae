"""Text: its parts and pieces, bits per byte, and the language model's script."""

import dataclasses
import json
import math
import os
import pydoc_data.topics
import sys
from collections import Counter

import pytest
import torch

from training import Experiment, RunOptions, TextConfig, UserError, fit, loop
from analysis.analyze import analyze
from models.language import BDHConfig
from tests.trials import interrupt, read_rows, resumed, same_weights, snapshot, weights
from training.command_line import experiment_of
from training.data.text import Text, TextBatches, load_text
from training.runs import load_model
from training.stored import load_checkpoint

SCRIPT = "train_bdh_text.py"
CPU = torch.device("cpu")
TINY_MODEL = dict(n_layer=1, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)  # N = 32
TINY_TRAIN = dict(context=16, epochs=2, batch_size=8, learning_rate=1e-2, weight_decay=0.1, val_fraction=0.1)
SONG = b"".join(b"%d green bottles hanging on the wall, and if one should fall, " % (i % 10) for i in range(80))


@pytest.fixture
def song(tmp_path):
    """A repetitive text of 4,960 bytes, the test's own to damage."""
    path = tmp_path / "song.txt"
    path.write_bytes(SONG)
    return path


@pytest.fixture
def text_trial(tmp_path, song):
    """Makes a tiny experiment on the song; keywords are fields of its training."""

    def make(name="trial", model=None, options=None, **train):
        return Experiment(
            name,
            BDHConfig(**(TINY_MODEL | (model or {}))),
            TextConfig(**(TINY_TRAIN | {"text": song} | train)),
            RunOptions(**({"runs_dir": tmp_path / "runs", "device": "cpu"} | (options or {}))),
        )

    return make


def batches_of(text, eval_batch_size=7, **train):
    return TextBatches(Text("a text", text), TextConfig(**(TINY_TRAIN | train)), eval_batch_size, CPU)


def join(batches):
    """All (inputs, targets) of an iterator as two tensors (pieces, T)."""
    return (torch.cat(each) for each in zip(*batches, strict=True))


# ---------------------------------------------------------------------------- parts and pieces


@pytest.mark.parametrize("n, val, test, sizes", [(1000, 0.1, 0.1, (800, 100, 100)), (999, 0.2, 0.05, (749, 200, 50))])
def test_the_parts_follow_each_other_and_cover_the_text(n, val, test, sizes):
    text = os.urandom(n)
    batches = batches_of(text, val_fraction=val, test_fraction=test)
    parts = [batches.parts[name] for name in ("train", "val", "test")]
    assert tuple(map(len, parts)) == sizes
    assert bytes(torch.cat(parts).tolist()) == text
    assert batches.split is None


def test_targets_are_the_next_byte():
    text = os.urandom(1000)
    batches = batches_of(text)
    for pairs in (batches.train_batches(3), batches.eval_batches("val"), batches.eval_batches("test")):
        for inputs, targets in pairs:
            assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape
            for piece, following in zip(inputs.tolist(), targets.tolist(), strict=True):
                assert piece[1:] == following[:-1]
                assert text.count(bytes([*piece, following[-1]])) == 1  # they stand in the text as they are


@pytest.mark.parametrize("n", [800, 817, 834])
def test_evaluation_reads_a_part_in_order(n):
    """From its first byte; but for the last few, each byte but the first is a target once."""
    text = os.urandom(n)
    batches = batches_of(text)
    for part in ("val", "test"):
        inputs, targets = join(batches.eval_batches(part))
        whole = batches.parts[part].long()
        assert len(inputs) == batches.size(part) == (len(whole) - 1) // 16
        assert torch.equal(inputs.flatten(), whole[: inputs.numel()])
        assert torch.equal(targets.flatten(), whole[1 : 1 + inputs.numel()])
        assert len(whole) - 1 - targets.numel() < 16


@pytest.mark.parametrize("n", [1000, 1009, 1024])
def test_every_training_piece_comes_once_an_epoch(n):
    """Whatever the offset, fewer than two pieces' worth of bytes are left out."""
    batches = batches_of((bytes(range(256)) * 4)[:n])  # so that a piece says where it begins, up to 256
    assert len(batches.parts["train"]) - 16 * batches.size("train") <= 2 * 16
    offsets = set()
    for epoch in range(5):
        sizes = [len(inputs) for inputs, _ in batches.train_batches(epoch)]
        assert sum(sizes) == batches.size("train") and set(sizes[:-1]) == {8}
        inputs, _ = join(batches.train_batches(epoch))
        starts = inputs[:, 0]
        assert len(set((starts % 16).tolist())) == 1, "pieces overlap"
        expected = (torch.arange(batches.size("train")) * 16 + starts[0] % 16) % 256
        assert sorted(starts.tolist()) == sorted(expected.tolist())
        assert starts.tolist() != sorted(starts.tolist())
        offsets.add(int(starts[0] % 16))
    assert len(offsets) > 1


def test_order_and_offset_follow_the_seed_and_the_epoch():
    text = os.urandom(2000)

    def epoch(seed, number):
        torch.rand(1)  # the global generator has no part in it
        return torch.cat([inputs for inputs, _ in batches_of(text, seed=seed).train_batches(number)])

    first = epoch(0, 0)
    assert torch.equal(first, epoch(0, 0))
    later = torch.cat([inputs for inputs, _ in batches_of(text).train_batches(0, 2)])  # from the third batch on
    assert torch.equal(first[16:], later)
    others = [epoch(0, 1), epoch(0, 2), epoch(1, 0)]
    assert not any(torch.equal(first, other) for other in others)


# ---------------------------------------------------------------------------- the default text


def test_the_default_text_is_english():
    text = load_text(None).content
    assert load_text(None).name == "python topics" and 200_000 < len(text) < 1_000_000
    words = Counter(text.decode().split())
    assert words["the"] > 2000 and "the" in dict(words.most_common(3))
    assert sum(byte < 128 for byte in text) > 0.99 * len(text)


def test_the_default_texts_test_part_is_held_out():
    """The topics repeat each other; what they repeat must not be learned by heart and then tested."""
    text = load_text(None).content
    train, test = text[: len(text) * 8 // 10], text[len(text) * 9 // 10 :]
    known = sum(test[i : i + 64] in train for i in range(0, len(test) - 64, 64))
    assert known <= 0.02 * len(test) / 64


def test_the_default_text_does_not_depend_on_the_order_of_topics(monkeypatch):
    text = load_text(None)
    backwards = dict(reversed(pydoc_data.topics.topics.items()))
    monkeypatch.setattr(pydoc_data.topics, "topics", backwards)
    assert load_text(None) == text


# ---------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that learned the song: its experiment, and what fit() returned. For reading only."""
    folder = tmp_path_factory.mktemp("learned")
    (folder / "song.txt").write_bytes(SONG)
    trial = Experiment(
        "learned",
        BDHConfig(**TINY_MODEL),
        TextConfig(**(TINY_TRAIN | {"text": folder / "song.txt", "epochs": 6})),
        RunOptions(runs_dir=folder / "runs", device="cpu", eval_batch_size=9),
    )
    return trial, fit(trial)


def test_bits_per_byte_are_those_of_the_whole_test_part(learned):
    """Counted again one piece at a time, from log-probabilities to base 2."""
    trial, summary = learned
    model, _ = load_model(trial.folder)
    part = SONG[-round(0.1 * len(SONG)) :]
    bits = []
    for first in range(0, len(part) - 16, 16):
        piece = torch.tensor([list(part[first : first + 17])])
        with torch.no_grad():
            probabilities = model(piece[:, :-1])[0].softmax(-1)[0]
        bits += (-probabilities.gather(1, piece[0, 1:, None]).log2()).flatten().tolist()
    assert len(bits) == 16 * summary["images"]["test"] == 480  # of 496, whose last byte has none after it
    assert summary["test"]["bits_per_byte"] == pytest.approx(sum(bits) / len(bits), rel=1e-4)
    assert summary["test"]["loss"] == pytest.approx(summary["test"]["bits_per_byte"] * math.log(2))


def test_a_text_run_learns_more_than_how_frequent_bytes_are(learned, tmp_path):
    trial, summary = learned
    entropy = -sum(n / len(SONG) * math.log2(n / len(SONG)) for n in Counter(SONG).values())
    assert entropy > 3.5
    assert max(summary["test"]["bits_per_byte"], summary["best"]["val_bits_per_byte"]) < 0.75 * entropy
    assert not (trial.folder / "split.npz").exists()
    assert [float(row["val_bits_per_byte"]) < 8 for row in read_rows(trial.folder)] == [True] * 6
    description = json.loads((trial.folder / "config.json").read_text())["data"]
    assert description["name"] == "song.txt" and description["bytes"] == len(SONG)
    analyze([trial.folder], tmp_path / "plots")


def test_fewer_bits_are_better(text_trial, monkeypatch):
    """The best epoch is the one of the lowest bits per byte, not the highest."""
    real, waiting = loop.evaluate, iter([3.0, 2.0, 2.5])

    def evaluate(session, part):
        if part == "test":
            return real(session, part)
        bits = next(waiting)
        return {"loss": bits * math.log(2), "bits_per_byte": bits}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    trial = text_trial(epochs=3)
    summary = fit(trial)
    assert summary["best"]["epoch"] == 2 and summary["best"]["val_bits_per_byte"] == 2.0
    assert load_checkpoint(trial.folder / "best.pt")["epoch"] == 2


def test_interrupted_and_resumed_with_the_text_elsewhere_ends_the_same(text_trial, song, tmp_path):
    whole, trial = text_trial("whole", epochs=3), text_trial(epochs=3)
    expected = fit(whole)
    interrupt(trial, 2)
    assert json.loads((trial.folder / "config.json").read_text())["config"]["train"]["text"] == "song.txt"
    (tmp_path / "elsewhere").mkdir()
    moved = song.rename(tmp_path / "elsewhere" / song.name)
    trial = dataclasses.replace(trial, train=dataclasses.replace(trial.train, text=moved))
    assert fit(resumed(trial)) == expected
    for name in ("last.pt", "best.pt"):
        assert same_weights(*(weights(each.folder, name) for each in (whole, trial)))


@pytest.mark.parametrize("change", ["changed", "longer", "too short"])
def test_resuming_on_a_changed_text_is_refused(change, text_trial, song):
    trial = text_trial()
    interrupt(trial, 2)
    before = snapshot(trial.folder)
    song.write_bytes({"changed": b"#" + SONG[1:], "longer": SONG + b"#", "too short": b"#"}[change])
    with pytest.raises(UserError, match=r"other data.*sha256: "):
        fit(resumed(trial))
    assert snapshot(trial.folder) == before


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("missing", ["missing.txt", "--text"]),
        ("a folder", ["Is a directory", "--text"]),
        ("empty", ["0 bytes", "--text"]),
        ("short", ["150 bytes", "--text", "--context"]),
        ("vocabulary", ["--vocab-size 256"]),
    ],
)
def test_a_mistake_is_one_message_and_nothing_written(mistake, words, text_trial, tmp_path):
    text = tmp_path / f"{mistake}.txt"
    if mistake == "a folder":
        text.mkdir()
    elif mistake != "missing":
        text.write_bytes({"empty": b"", "short": SONG[:150]}.get(mistake, SONG))
    trial = text_trial(text=text, model={"vocab_size": 128} if mistake == "vocabulary" else {})
    with pytest.raises(UserError) as refused:
        fit(trial)
    message = str(refused.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not trial.folder.exists()


def test_a_python_without_its_topics_is_told_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # what makes `import` fail
    with pytest.raises(UserError, match="--text"):
        load_text(None)


@pytest.mark.parametrize("n, enough", [(1, False), (165, False), (166, True), (200, True)])
def test_the_shortest_text(n, enough):
    """A tenth has to hold one piece of 16 bytes and the byte after it, the rest two."""
    if not enough:
        with pytest.raises(UserError, match=f"{n} bytes"):
            batches_of(bytes(n))
        return
    batches = batches_of(bytes(n))
    assert all(len(list(batches.eval_batches(part))) == 1 for part in ("val", "test"))
    assert sum(len(inputs) for inputs, _ in batches.train_batches(0)) == batches.size("train") >= 1


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--context 1", "context"),
        ("--test-fraction 0", "test_fraction"),
        ("--test-fraction 0.9", "leave no text"),
        ("--dataset cifar10", "dataset"),
        ("--rotary axial", "rotary"),
        ("--no-attend-self", "attend_self"),
    ],
)
def test_a_wrong_flag_is_refused(flags, word, capsys):
    with pytest.raises(SystemExit) as ended:
        experiment_of(SCRIPT, flags)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert word in " ".join((captured.out + captured.err).replace("│", " ").split())


# ---------------------------------------------------------------------------- the script


def test_the_script_prints_bits_per_byte_and_a_sample(call_script, song, tmp_path, capsys):
    """Of the text, the folder's name has the file's name only."""
    sizes = "--n-layer 1 --n-embd 16 --n-head 2 --mlp-internal-dim-multiplier 4 --context 16 --epochs 1".split()
    where = ["--text", song, "--runs-dir", tmp_path / "runs", "--device", "cpu"]
    assert call_script(SCRIPT, *sizes, *where) == 0
    (folder,) = (tmp_path / "runs").glob("bdh_text+*+text=song.txt/seed0")
    test = json.loads((folder / "summary.json").read_text())["test"]
    said = capsys.readouterr().out
    assert "test bits per byte" in said and f"{test['bits_per_byte']:.4f}" in said
    assert said.rpartition("Samples")[2].count("> The ") == 3
    assert call_script("tools/export.py", folder) == 0
    card = (folder / "README.md").read_text()
    assert "reads bytes as integers (B, T)" in card and "image" not in card
