"""Figures of accuracy against parameters and time, of speed, of the MLP multiplier: what matplotlib was given."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from training import UserError
from analysis.analyze import by_task, write_results
from analysis.plotting.costs import draw_multipliers, draw_parameters, draw_speed, draw_time, sweeps_of
from analysis.plotting.style import COLORS, choose_scale
from analysis.reading import find_runs, make_rows, read_runs
from tests.pictures import check_picture, share_of_color
from tests.trials import read_table

GPU_Y = {"device": "cuda", "name": "GPU Y", "memory_gb": 80.0}


@pytest.fixture
def cost_run(make_run):
    """make_run with a million parameters, and its MLP multiplier as given; returns the folder."""

    def make(*args, multiplier=32, **keywords):
        return make_run(*args, **{"parameters": 1_000_000, "mlp_internal_dim_multiplier": multiplier} | keywords)[0]

    return make


def tasks_in(tmp_path):
    return by_task(make_rows(read_runs(find_runs(tmp_path / "runs"))))


def points_of(ax):
    """{label: (x, y, ends of the bar along x, ends along y)}, None for no bar."""
    points = {}
    for container in ax.containers:
        marker, _, bars = container
        bars, ends = list(bars), []
        for axis, is_there in enumerate((container.has_xerr, container.has_yerr)):
            ends.append(bars.pop(0).get_segments()[0][:, axis] if is_there else None)
        points[container.get_label()] = (float(marker.get_xdata()[0]), float(marker.get_ydata()[0]), *ends)
    return points


# ---------------------------------------------------------------------------- parameters


def test_results_over_parameters(cost_run, tmp_path):
    tests = (0.75, 0.80, 0.76)
    for seed, test in enumerate(tests):
        cost_run("v2", seed, test=test, parameters=3_500_000)
    cost_run("vit", test=0.7, parameters=5_400_000)
    cost_run("unfinished", done=2, parameters=9_000_000)
    cost_run("alone", dataset="cifar100", parameters=1_000)
    (block,) = draw_parameters(tasks_in(tmp_path)).subfigs
    ax = block.axes[0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("parameters (millions)", "test accuracy (%)")
    assert block.legends[0].get_title().get_text() == "vertical bar: one standard deviation over seeds"
    points = points_of(ax)
    assert sorted(points) == ["v2", "vit"]
    x, y, across, up = points["v2"]
    mean, std = 100 * np.mean(tests), 100 * np.std(tests, ddof=1)
    assert (x, y) == pytest.approx((3.5, mean)) and across is None
    assert up == pytest.approx([mean - std, mean + std])
    assert points["vit"][:2] == pytest.approx((5.4, 70.0)) and points["vit"][3] is None
    assert ax.get_xscale() == "linear"


def test_parameters_that_span_much_have_a_logarithmic_axis_and_small_ones_their_unit(cost_run, tmp_path):
    for name, parameters in {"small": 30_000, "large": 900_000}.items():
        cost_run(name, parameters=parameters)
    ax = draw_parameters(tasks_in(tmp_path)).subfigs[0].axes[0]
    assert ax.get_xscale() == "log" and ax.get_xlabel() == "parameters (thousands)"
    assert sorted(x for x, *_ in points_of(ax).values()) == pytest.approx([30, 900])


def test_equal_numbers_of_parameters_are_no_figure(cost_run, tmp_path):
    cost_run("v1"), cost_run("v2"), cost_run("other", dataset="cifar100", parameters=7)
    cost_run("begun", done=1, parameters=5)
    assert draw_parameters(tasks_in(tmp_path)) is None


@pytest.mark.parametrize(("values", "scale"), [((1, 7.9), "linear"), ((1, 8), "log"), ((0.001, 1000), "log")])
def test_choice_of_the_scale(values, scale):
    ax = Figure().subplots()
    ax.plot(values, values)
    choose_scale(ax, "y", values)
    ax.figure.draw_without_rendering()
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", scale)
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert 2 <= len(shown) <= 16 and not any("10^" in text for text in shown)


def test_a_legend_names_every_point_and_fits(cost_run, tmp_path):
    """Fifteen experiments, some with names of three lines."""
    for index in range(15):
        longer = f"+mlp_internal_dim_multiplier=16+n_embd=48+text={'long' * 20}" if index % 2 else ""
        cost_run(
            f"experiment{index}+learning_rate=0.001{longer}", test=0.5 + index / 50, parameters=10**5 * (index + 1)
        )
    figure = draw_parameters(tasks_in(tmp_path))
    figure.draw_without_rendering()
    block, (ax,) = figure.subfigs[0], figure.subfigs[0].axes
    box, inner = block.legends[0].get_window_extent(), ax.get_tightbbox()
    assert len(block.legends[0].get_texts()) == len(points_of(ax)) == 15
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= inner.y0
    assert ax.get_window_extent().height > 100


# ---------------------------------------------------------------------------- time


def test_results_over_time_are_apart_by_hardware(cost_run, tmp_path):
    """Seeds of one experiment on two machines are two points; a time is the sum of all epochs, in the panel's unit."""
    seconds = {0: [50, 60, 55, 50, 45], 1: [100, 110, 90, 105, 95], 2: [70, 70, 70, 70, 80]}
    tests = {0: 0.75, 1: 0.80, 2: 0.7}
    for seed, values in seconds.items():
        cost_run("v2", seed, test=tests[seed], columns={"epoch_time_sec": values})
    cost_run("v2", 3, test=0.77, hardware=GPU_Y, columns={"epoch_time_sec": [5] * 5})
    cost_run("vit", test=0.72, columns={"epoch_time_sec": [20] * 5})
    cost_run("begun", done=2, hardware=GPU_Y)
    slow, fast = draw_time(tasks_in(tmp_path)).subfigs
    assert slow._suptitle.get_text() == "cifar10\non GPU X; not comparable with other hardware"
    assert fast._suptitle.get_text() == "cifar10\non GPU Y; not comparable with other hardware"
    points = points_of(slow.axes[0])
    x, y, across, up = points["v2"]
    minutes = np.array([sum(values) for values in seconds.values()]) / 60
    assert x == pytest.approx(np.median(minutes)) and across == pytest.approx([minutes.min(), minutes.max()])
    mean, std = 100 * np.mean(list(tests.values())), 100 * np.std(list(tests.values()), ddof=1)
    assert y == pytest.approx(mean) and up == pytest.approx([mean - std, mean + std])
    assert points["vit"][:2] == pytest.approx((100 / 60, 72)) and len(points) == 2
    assert "(min)" in slow.axes[0].get_xlabel()
    assert "fastest to slowest seed" in slow.legends[0].get_title().get_text()
    assert points_of(fast.axes[0])["v2"][:2] == pytest.approx((25, 77))
    assert "(s)" in fast.axes[0].get_xlabel() and len(points_of(fast.axes[0])) == 1


def test_experiments_on_different_hardware_are_no_figure_of_time(cost_run, tmp_path):
    cost_run("v1"), cost_run("v2", hardware=GPU_Y), cost_run("v3", done=2)
    cost_run("other", dataset="cifar100")
    assert draw_time(tasks_in(tmp_path)) is None


# ---------------------------------------------------------------------------- speed


def bars_of(ax):
    """{name: (length, colour)} from top to bottom, and the numbers beside."""
    names = [label.get_text() for label in ax.get_yticklabels()]
    lengths = [(bar.get_width(), bar.get_facecolor()) for bar in ax.patches]
    return dict(zip(names, lengths, strict=True))


def test_speed_is_relative_to_the_slowest_on_the_same_hardware(cost_run, tmp_path):
    speeds = {("v1", 0): [90, 100, 110, 400, 100], ("v1", 1): [200, 200, 200, 1, 200], ("v2", 0): [300] * 5}
    for (name, seed), values in speeds.items():
        cost_run(name, seed, columns={"images_per_sec": values})
    cost_run("begun", done=2, columns={"images_per_sec": [75, 75]})
    cost_run("v1", 2, hardware=GPU_Y, columns={"images_per_sec": [9000] * 5})
    (block,) = draw_speed(tasks_in(tmp_path), None).subfigs  # nothing to compare on GPU Y
    ax = block.axes[0]
    bars = bars_of(ax)
    assert list(bars) == ["v2", "v1", "begun"]
    assert [length for length, _ in bars.values()] == pytest.approx([4, 2, 1])  # v1: medians 100 and 200
    dots = ax.collections[-1].get_offsets()
    assert sorted(dots[:, 0]) == pytest.approx([100 / 75, 200 / 75])
    assert ax.get_xlabel().startswith("training speed relative to begun")
    numbers = [label.get_text() for label in block.axes[1].get_yticklabels()]
    assert numbers == ["4.00 times\n300 samples/s", "2.00 times\n150 samples/s", "1.00 times\n75.0 samples/s"]


def test_speed_relative_to_a_chosen_experiment(cost_run, tmp_path):
    for name, speed in {"v1": 100, "v2": 300, "v3": 150}.items():
        cost_run(name, columns={"images_per_sec": [speed] * 5})
    for name in ("v1", "v3"):
        cost_run(name, 1, hardware=GPU_Y)
    tasks = tasks_in(tmp_path)
    (block,) = draw_speed(tasks, "v2").subfigs  # it did not run on GPU Y
    lengths = {name: length for name, (length, _) in bars_of(block.axes[0]).items()}
    assert lengths == pytest.approx({"v2": 1, "v3": 0.5, "v1": 1 / 3})
    assert len(draw_speed(tasks, "v1").subfigs) == 2
    with pytest.raises(UserError, match=r"v9 has no run: name another --relative-to \(v1, v2, v3\)"):
        draw_speed(tasks, "v9")


def test_a_reference_of_two_configurations_is_refused(cost_run, tmp_path):
    cost_run("v1"), cost_run("v1", 1, n_layer=3)
    with pytest.raises(UserError, match="v1 has runs of several configurations"):
        draw_speed(tasks_in(tmp_path), "v1")


def test_runs_without_a_speed_are_left_out(cost_run, tmp_path):
    cost_run("v1"), cost_run("v2")
    old = cost_run("v0") / "metrics.csv"
    old.write_text(old.read_text().replace("images_per_sec", "something"))
    assert sorted(bars_of(draw_speed(tasks_in(tmp_path), None).subfigs[0].axes[0])) == ["v1", "v2"]


# ---------------------------------------------------------------------------- the MLP multiplier


def test_results_and_parameters_over_the_multiplier(cost_run, tmp_path):
    results = {4: (0.60, 0.64), 16: (0.70, 0.71), 128: (0.81,)}
    for multiplier, tests in results.items():
        for seed, test in enumerate(tests):
            name = f"v2+epochs=5+mlp_internal_dim_multiplier={multiplier}" if multiplier != 16 else "v2+epochs=5"
            cost_run(name, seed, test=test, multiplier=multiplier, parameters=multiplier * 100_000)
    cost_run("v3+epochs=5", multiplier=4, n_layer=9)  # of one multiplier
    cost_run("vit+epochs=5", n_layer=2)  # likewise
    (block,) = draw_multipliers(tasks_in(tmp_path)).subfigs
    accuracy, parameters = block.axes
    ((line, _, (bars,)),) = accuracy.containers
    assert list(line.get_xdata()) == [4, 16, 128]
    assert line.get_ydata() == pytest.approx([100 * np.mean(tests) for tests in results.values()])
    ends = [bars.get_segments()[place][:, 1] for place in (0, 1)]
    for tests, (low, high) in zip(results.values(), ends, strict=False):
        assert (high - low) / 2 == pytest.approx(100 * np.std(tests, ddof=1))
    (count,) = parameters.lines
    assert list(count.get_xdata()) == [4, 16, 128] and count.get_ydata() == pytest.approx([0.4, 1.6, 12.8])
    assert [text.get_text() for text in block.legends[0].get_texts()] == ["v2"]
    assert block._suptitle.get_text() == "cifar10, epochs=5"
    assert parameters.get_yscale() == "log" and accuracy.get_xscale() == "log"
    assert [label.get_text() for label in accuracy.get_xticklabels()] == ["4", "16", "128"]


def test_what_differs_otherwise_is_another_sweep(cost_run, tmp_path):
    """Names decide only where two experiments have the same fields and multiplier."""
    for name, n_layer in (("before", 6), ("after", 6), ("wide", 12)):
        cost_run(f"{name}+mlp_internal_dim_multiplier=8", multiplier=8, n_layer=n_layer)
    for name, n_layer in (("before", 6), ("after", 6), ("another", 12)):
        cost_run(name, multiplier=32, n_layer=n_layer)
    cost_run("begun", done=1, multiplier=64)
    ((_, rows),) = tasks_in(tmp_path).items()
    sweeps = {frozenset(row.experiment.partition("+")[0] for row in sweep): sweep for sweep in sweeps_of(rows)}
    assert sweeps.keys() == {frozenset({"before"}), frozenset({"after"}), frozenset({"wide", "another"})}
    for sweep in sweeps.values():
        assert [row.runs[0].fields["mlp_internal_dim_multiplier"] for row in sweep] == [8, 32]
    (block,) = draw_multipliers(tasks_in(tmp_path)).subfigs
    assert sorted(text.get_text() for text in block.legends[0].get_texts()) == ["after", "before", "wide / another"]


def test_one_multiplier_is_no_figure(cost_run, tmp_path):
    cost_run("v2", multiplier=8), cost_run("v3", multiplier=8), cost_run("v2", 1, multiplier=8)
    cost_run("begun", done=2, multiplier=16)
    cost_run("other", dataset="cifar100", multiplier=16)
    assert draw_multipliers(tasks_in(tmp_path)) is None


# ---------------------------------------------------------------------------- files


def test_all_pictures(cost_run, tmp_path, call_script, capsys):
    """By the script: each is there twice, and shows every experiment in its colour."""
    for place, multiplier in enumerate((4, 16, 64)):
        for name, layers in (("v1", 3), ("v2", 6)):
            name += f"+mlp_internal_dim_multiplier={multiplier}"
            speed = {"images_per_sec": [1000 / multiplier * layers] * 5}
            sizes = dict(multiplier=multiplier, parameters=multiplier * layers * 10_000)
            cost_run(name, test=0.5 + place / 10 + layers / 100, n_layer=layers, columns=speed, **sizes)
    where = ["--runs-dir", "runs", "--output-dir", "out"]
    assert call_script("analysis/analyze.py", *where, "--relative-to", "v1+mlp_internal_dim_multiplier=4") == 0
    assert "skipped" not in capsys.readouterr().out
    names = ("accuracy_against_parameters", "accuracy_against_time", "speed", "mlp_multiplier")
    for name in names:
        pixels = check_picture(tmp_path / "out" / f"{name}.png")
        for color in COLORS[: 2 if name == "mlp_multiplier" else 6]:
            assert share_of_color(pixels, color) > 1e-4, (name, color)
    assert call_script("analysis/analyze.py", *where, "--relative-to", "v1") == 1
    assert "v1 has no run" in capsys.readouterr().err


def test_files_say_what_the_figures_show(cost_run, tmp_path):
    seconds, speeds = [[10, 20, 30, 40, 50], [11, 21, 31, 41, 51]], [[100, 200, 300, 400, 500], [600] * 5]
    columns = [{"epoch_time_sec": seconds[seed], "images_per_sec": speeds[seed]} for seed in (0, 1)]
    folders = [cost_run(seed=seed, columns=columns[seed]) for seed in (0, 1)]
    (line,) = read_table(write_results(by_task(make_rows(read_runs(folders))), tmp_path / "out", "Results")[-1])
    assert float(line["training_time_sec_median"]) == np.median([150, 155])
    assert float(line["images_per_sec_median"]) == np.median([300, 600])
