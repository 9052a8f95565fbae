"""The speed benchmarks at a tiny size: what they count, their ratios, their files; never how fast anything is."""

from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import measure, recipe_cost, same_losses, scaling, step_time, train_speed
from benchmarks.training_steps import IMPLEMENTATIONS, StackedReference, made_up_batches, training_step
from models.vision_bdh import v2_config
from tests.trials import read_table

CPU = torch.device("cpu")
TINY = dict(patch_size=8, n_layer=2, n_embd=24, n_head=2, mlp_internal_dim_multiplier=4)


def test_sides_train_alike():
    """Thirty steps from the same weights on the same images: losses of all implementations agree, and weights move."""
    losses, moved = {}, []
    for build in IMPLEMENTATIONS.values():
        torch.manual_seed(3)
        model = build(v2_config(**TINY, dropout=0.0)).double()
        batches = made_up_batches(8, img_size=32, n_classes=10, device=CPU)
        batches = ((images.double(), labels) for images, labels in batches)
        step = training_step(model, batches, "float32", CPU)
        before = model.encoder.detach().clone()
        losses[build] = np.array([float(step()) for _ in range(30)])
        moved.append(model.encoder.detach() - before)
    assert moved[0].abs().mean() > 2e-4  # 30 steps of 1e-4, whose signs change with the images
    for each, difference in zip(losses.values(), moved, strict=True):
        np.testing.assert_allclose(each, losses[StackedReference], rtol=1e-6)  # losses are taken in float32
        torch.testing.assert_close(difference, moved[0], rtol=1e-6, atol=1e-7)


def test_memory_of_a_step_does_not_depend_on_earlier_profiles():
    """PyTorch remembers addresses of one profile, and takes blocks that come to lie there later for the old ones."""
    seen = measure._held_on_cpu(lambda: [torch.ones(16_384) for _ in range(40)])[1]
    addresses = {each.data_ptr() for each in seen}
    del seen
    waiting = [each for each in (torch.ones(16_384) for _ in range(100)) if each.data_ptr() in addresses]

    def step():
        waiting.clear()
        return torch.ones(20_000)

    held = measure._held_on_cpu(step)[0]
    assert held.min() == 0 and held.max() == held[-1] == 80_000


def test_made_up_batches_are_full_and_augmented():
    batches = made_up_batches(6, img_size=8, n_classes=3, device=CPU)
    seen = [next(batches) for _ in range(40)]  # over more than two epochs
    assert {images.shape for images, _ in seen} == {(6, 3, 8, 8)}
    assert {int(label) for _, labels in seen for label in labels} == {0, 1, 2}
    assert not any(torch.equal(seen[k][0], seen[k + 16][0]) for k in range(16))
    assert min(images.min() for images, _ in seen) >= -1 and max(images.max() for images, _ in seen) <= 1


def test_operations_are_those_of_the_equations():
    """Of v2: three products with weights and two of attention a level, twice as many backward, and the ends."""
    config = v2_config(**TINY)
    B, T, D, N = 1, 16, 24, config.n_neurons
    H, L, patch = 2, 2, 3 * 8 * 8
    level = 3 * T * D * H * N + T * T * H * N + T * T * H * D
    ends = T * patch * D + D * 10
    forward = 2 * B * (L * level + ends)
    # the patches need no gradient of their own input
    expected = 3 * forward - 2 * T * patch * D
    assert train_speed.flop_per_image(StackedReference(config), img_size=32) == expected


def test_full_size_v2_needs_what_the_documents_say():
    assert train_speed.flop_per_image(StackedReference(v2_config()), img_size=32) == pytest.approx(9.2e9, rel=0.01)


def test_ratios_are_within_a_model_and_a_precision():
    rows = [
        dict(model=model, precision=precision, seconds=seconds, step_memory_mb=memory)
        for model, precision, seconds, memory in (
            ("v2", "float32", 8.0, 100.0),
            ("v2", "float32", 2.0, 25.0),
            ("v2", "bf16", 3.0, None),
            ("v2", "bf16", 1.0, 5.0),
            ("vit_tiny", "bf16", 9.0, 1.0),
        )
    ]
    ratios = train_speed.with_ratios(rows)
    assert [row["times_faster"] for row in ratios] == [1, 4, 1, 3, 1]
    assert [row["memory_share"] for row in ratios] == [1, 0.25, None, None, 1]


def test_what_a_recipe_costs_is_a_ratio_to_the_published_protocol(monkeypatch):
    seconds = {recipe_cost.BASE: 2.0, "ema=0.999": 3.0, recipe_cost.EVERYTHING: 8.0}
    fields = {name: recipe_cost.FIELDS[name] for name in list(seconds)[:2]}
    monkeypatch.setattr(recipe_cost, "FIELDS", fields)
    monkeypatch.setattr(recipe_cost, "MODELS", {"v2": lambda **fields: v2_config(**TINY, **fields)})
    monkeypatch.setattr(recipe_cost, "training_step", mock.Mock())
    measured = {name: {"seconds": each} for name, each in seconds.items()}
    monkeypatch.setattr(recipe_cost, "measure_steps", lambda sides, *rest: {name: measured[name] for name in sides})
    table = recipe_cost.measure(recipe_cost.Options(batch_size=2, device="cpu"), torch.device("cpu"))
    assert table.set_index("setting").ratio.tolist() == [1, 1.5, 4]


@pytest.fixture
def tiny_models(monkeypatch):
    monkeypatch.setattr(train_speed, "v2_config", lambda: v2_config(**TINY))
    monkeypatch.setattr(train_speed, "dense_tflops", lambda precision, device: 2.0)


def test_train_speed_script(tiny_models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "has_fast_bf16", lambda device: True)
    options = dict(batch_size=4, repeats=2, output_dir=tmp_path, device="cpu")
    train_speed.main(train_speed.Options(models=("v2", "resnet20"), **options))
    (table,) = tmp_path.glob("train_speed_cpu_1threads_models=v2,resnet20_batch_size=4.csv")
    rows = read_table(table)
    sides = ["reference", "fast", "fast, --recompute"]
    assert [(row["precision"], row["side"]) for row in rows] == [
        (precision, side) for precision in ("float32", "bf16") for side in [*sides, "eager"]
    ]
    for row in rows:
        rate = float(row["images_per_sec"])
        assert rate == pytest.approx(4 / float(row["seconds"]))
        assert float(row["seconds_per_epoch"]) == pytest.approx(40_000 / rate)
        assert float(row["tflops"]) == pytest.approx(rate * float(row["gflop_per_image"]) / 1e3)
        assert float(row["fastest"]) <= float(row["seconds"]) <= float(row["slowest"])
    memory = {row["side"]: float(row["step_memory_mb"]) for row in rows if row["precision"] == "float32"}
    assert memory["fast, --recompute"] < memory["fast"] < memory["reference"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png", ".svg"}
    assert "images/s" in capsys.readouterr().out


def test_step_time_script(tmp_path, monkeypatch, capsys):
    """Both allocations, here in one process; ratios to the reference beside each side and to the first row."""

    class Pool:
        __init__ = __exit__ = lambda *_: None
        __enter__ = apply = lambda self, function=None, args=(): function(*args) if function else self

    monkeypatch.setattr(step_time, "v2_config", lambda: v2_config(**TINY))
    monkeypatch.setattr(
        step_time, "get_context", lambda method: type("Context", (), {"Pool": lambda self, n: Pool()})()
    )
    monkeypatch.setattr(step_time, "tune_cpu_allocator", lambda: True)
    monkeypatch.setattr(step_time, "has_fast_bf16", lambda device: True)
    step_time.main(step_time.Options(batch_size=4, repeats=2, output_dir=tmp_path, device="cpu", profile=True))
    rows = read_table(tmp_path / "step_time_cpu_1threads_batch_size=4.csv")
    sides = ["reference", "fast", "fast, --recompute", "products alone"]
    assert [(row["allocation"], row["precision"], row["side"]) for row in rows] == [
        (allocation, precision, side)
        for allocation in ("default", "training")
        for precision in ("float32", "bf16")
        for side in sides
    ]
    for first in range(0, 16, 4):
        for row in rows[first : first + 4]:
            assert float(row["times_faster"]) == pytest.approx(float(rows[first]["seconds"]) / float(row["seconds"]))
            ratio = float(rows[0]["seconds"]) / float(row["seconds"])
            assert float(row["times_faster_than_first"]) == pytest.approx(ratio)
    assert "fast, bf16, allocation: training" in capsys.readouterr().out


def test_exponents_of_planted_powers():
    rng = np.random.default_rng()
    p, c, sizes = rng.uniform(0.5, 2.5), rng.uniform(0.1, 9), [3, 8, 21, 60]
    slope, error, factor = scaling.exponent(sizes, [c * size**p for size in sizes])
    assert (slope, factor) == (pytest.approx(p), pytest.approx(c)) and error < 1e-6
    noisy = [value * rng.uniform(0.8, 1.25) for value in (c * size**p for size in sizes)]
    slope, error, _ = scaling.exponent(sizes, noisy)
    assert error > 0.001 and abs(slope - p) < 0.6
    assert np.isnan(scaling.exponent([1, 2], [3, 6])[1])


def test_scaling_script(tmp_path):
    sizes = dict(n_embd=16, n_head=2, batch_sizes=(2, 4), img_sizes=(8, 16), multipliers=(4, 8), depths=(1,))
    options = dict(base=(2, 8, 4, 1), sides=("reference", "fast"), precision="float32", repeats=2, device="cpu")
    scaling.main(scaling.Options(**sizes, **options, output_dir=tmp_path))
    fits, table = sorted(tmp_path.glob("*.csv"), key=lambda path: len(path.name), reverse=True)
    assert fits.name == f"{table.stem}_exponents.csv" and table.name.startswith("scaling_cpu_1threads_")
    rows = read_table(table)
    points = {(row["varied"], int(row["size"])) for row in rows}
    sizes = {"batch_size": (2, 4), "tokens": (4, 16), "neurons": (64, 128), "n_layer": (1,)}
    assert points == {(varied, size) for varied, values in sizes.items() for size in values}
    assert len(rows) == 2 * 7
    assert {fit["varied"] for fit in read_table(fits)} == {"batch_size", "tokens", "neurons"}  # one depth has no slope
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png", ".svg"}


def test_sides_that_do_not_fit_are_left_out(monkeypatch, capsys):
    full = mock.Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory: tried to allocate 9 bytes"))
    monkeypatch.setitem(IMPLEMENTATIONS, "reference", full)
    sizes = dict(batch_sizes=(2,), img_sizes=(), multipliers=(), depths=(), base=(2, 8, 4, 1), n_embd=16, n_head=2)
    rows = scaling.measure(scaling.Options(**sizes, precision="float32", repeats=1), CPU)
    assert [row["side"] for row in rows] == ["fast", "fast, --recompute"]
    assert "reference at batch_size = 2 is left out" in capsys.readouterr().err


def test_losses_side_by_side(data_dir, tmp_path, capsys):
    """On made-up CIFAR, in both precisions; differences are taken from the plain step in float32."""
    sizes = dict(n_layer=2, n_embd=16, n_head=2, mlp_internal_dim_multiplier=4)
    same_losses.main(
        same_losses.Options(**sizes, steps=8, batch_size=8, data_dir=data_dir, device="cpu", output_dir=tmp_path)
    )
    (path,) = tmp_path.glob("same_losses_cpu_1threads_n_layer=2_n_embd=16_*_steps=8_batch_size=8.csv")
    rows = read_table(path)
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    losses = {side: np.array([float(row[side]) for row in rows]) for side in rows[0] if side != "step"}
    plain = losses.pop(same_losses.PLAIN)
    for side, values in losses.items():
        distance = np.abs(values - plain).max()
        assert distance <= 1e-4 if "float32" in side else 0 < distance < 2e-2, side
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".png", ".svg"}
    made = {same_losses.PLAIN: np.array([2.0, 1.0]), "fast": np.array([2.5, 1.1])}
    row = same_losses.summarise(made).set_index("side").loc["fast"]
    assert (row["mean_last"], row["largest"], row["last_loss"]) == pytest.approx((0.3, 0.5, 1.8))


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("train_speed", ["--repeats", 0], "repeats = 0 must be at least 1"),
        ("train_speed", ["--steps", 0], "steps = 0 must be at least 1"),
        ("step_time", ["--batch-size", 0], "batch_size = 0 must be at least 1"),
        ("same_losses", ["--steps", 0], "steps = 0 must be at least 1"),
        ("same_losses", ["--n-embd", 7], "is not a multiple of n_head"),
        ("same_losses", ["--seed", -1], "seed = -1 must be at least 0"),
        ("same_losses", ["--seed", 2**64], "must be below 2^63"),
        ("pruning_curve", ["--run", "nowhere", "--seed", 2**64], "below 2^63"),
        ("small_maps", ["--batch-size", 1], "batch_size = 1 must be at least 2"),
        ("attention_cost", ["--warm-up", "inf"], "warm_up = inf must be at least 0, and finite"),
        *((script, ["--repeats", 3], "--repeats") for script in ("same_losses", "model_sizes")),  # time nothing
        ("export_table", [], "name one or more runs"),
        ("export_table", ["nowhere", "--threads", 1, 1], "names a number twice"),
        ("export_table", ["nowhere", "--test-images", 0], "test_images = 0 must be at least 1"),
        ("scaling", ["--sides", "slow"], "slow is none of reference, fast"),
        ("scaling", ["--batch-sizes", 0], "batch_sizes = 0 must be at least 1"),
        ("scaling", ["--img-sizes", 33], "33"),
        ("attention_cost", ["--tokens"], "tokens is empty"),
        ("attention_cost", ["--tokens", 64, 0], "tokens = 0 must be at least 1"),
        ("attention_cost", ["--n-head", 3], "is not a multiple of n_head"),
        *((script, ["--device", "meta"], "no such device") for script in ("scaling", "step_time", "train_speed")),
        *((script, ["--device", "meta"], "no such device") for script in ("same_losses", "attention_cost")),
    ],
)
def test_bad_input_is_one_message(call_script, capsys, script, flags, said):
    assert call_script(f"benchmarks/{script}.py", *flags) in (1, 2)
    shown = capsys.readouterr()
    assert said in " ".join((shown.out + shown.err).replace("│", " ").split()) and "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("attention_cost", ["--tokens", 10**11]),
        ("small_maps", ["--batch-size", 10**12]),
        ("scaling", ["--base", 10**12, 32, 4, 1, "--n-embd", 8, "--n-head", 1]),
    ],
)
def test_sizes_beyond_all_memory_are_one_message(call_script, capsys, script, flags):
    assert call_script(f"benchmarks/{script}.py", *flags) == 1
    assert (
        capsys.readouterr().err == "error: out of memory: give smaller sizes, such as a smaller batch, image or model\n"
    )


@pytest.mark.parametrize("benchmark", [train_speed, step_time])
def test_a_precision_that_the_cpu_lacks_is_told_before_it_takes_hours(benchmark, monkeypatch, capsys):
    starts = "measure" if benchmark is train_speed else "measure_allocations"
    monkeypatch.setattr(benchmark, starts, mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        benchmark.main(benchmark.Options(precisions=("float32", "fp16"), device="cpu"))
    assert capsys.readouterr().out == "--precision fp16 is for GPUs: on a CPU it is many times slower than float32\n"
