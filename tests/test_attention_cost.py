"""benchmarks/attention_cost.py at a tiny size: the sides agree, their memory differs, the files are there."""

import pandas as pd
import pytest
import torch

from benchmarks import attention_cost
from benchmarks.attention_cost import Options, draw, expected_mb, file_stem, level_sides, measure, order_of
from tests.pictures import check_picture

CPU = torch.device("cpu")
TINY = dict(n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, repeats=2, warm_up=0.0)  # N = 16, so T* = 10.7
FLAGS = "--device cpu --n-embd 8 --n-head 2 --mlp-internal-dim-multiplier 4 --repeats 1 --warm-up 0".split()
SIDES = {"attention": ["plain", "reordered"], "level": ["plain", "reordered", "fast path"]}


@pytest.fixture(scope="module")
def rows():
    """Rows at 8 tokens, below T*, and at 512 and 1024, where T x T scores outweigh everything else."""
    return measure(Options(**TINY, tokens=(8, 512, 1024), device="cpu"), CPU)


def row_of(rows, part, side, tokens):
    return next(row for row in rows if (row["part"], row["side"], row["tokens"]) == (part, side, tokens))


@pytest.mark.parametrize("n_tokens", [7, 48])
@pytest.mark.parametrize("part", SIDES)
def test_all_sides_compute_the_same_result_and_gradients(part, n_tokens):
    sides = attention_cost.SIDES_OF[part](Options(**TINY, batch_size=3), n_tokens, CPU)
    assert list(sides) == SIDES[part]
    results = {}
    for name, side in sides.items():
        output = side.forward()
        results[name] = [output, *torch.autograd.grad(output, side.inputs, side.d_output)]
    assert len(results["plain"]) == {"attention": 3, "level": 5}[part]  # the output; of q and x, or x and three weights
    for name in SIDES[part][1:]:
        for got, expected in zip(results[name], results["plain"], strict=True):
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_only_the_plain_side_of_a_level_asks_for_scores_in_its_attention(monkeypatch):
    calls = []
    monkeypatch.setattr(attention_cost.ScoresAttention, "weights", lambda self, q, k: calls.append(q.shape) or q @ k.mT)
    sides = level_sides(Options(**TINY), 48, CPU)
    for side in sides.values():
        side.forward()
    assert calls == [(1, 2, 48, 16)]


def test_rows_have_every_field_for_every_side(rows):
    assert [(row["tokens"], row["part"], row["side"]) for row in rows] == [
        (n_tokens, part, side) for n_tokens in (8, 512, 1024) for part in SIDES for side in SIDES[part]
    ]
    fields = "machine precision batch_size n_embd n_head n_neurons".split()
    fields += "tokens part side order step_memory_mb kept_memory_mb scores_mb repeats".split()
    for direction in ("forward", "backward"):
        fields += [f"{direction}_{key}" for key in ("seconds", "fastest", "slowest")]
    fields += ["forward_ratio", "backward_ratio", "memory_ratio"]
    for row in rows:
        assert list(row) == fields
        assert all(value is not None for value in row.values())
        for direction in ("forward", "backward"):
            times = [row[f"{direction}_{key}"] for key in ("fastest", "seconds", "slowest")]
            assert times[0] > 0 and times == sorted(times)
            plain = row_of(rows, row["part"], "plain", row["tokens"])
            assert row[f"{direction}_ratio"] == plain[f"{direction}_seconds"] / row[f"{direction}_seconds"]


def test_the_order_of_a_side_changes_at_the_switch():
    options = Options()  # N = 1024, D = 256: T* = 409.6
    assert options.core_config().n_neurons == 1024
    assert [order_of(options, "reordered", n) for n in (409, 410)] == ["scores", "state"]
    assert [order_of(options, "plain", n) for n in (409, 410)] == ["scores", "scores"]


@pytest.mark.parametrize("part", SIDES)
def test_only_the_plain_side_holds_tensors_of_all_scores(rows, part):
    plain, *others = (row_of(rows, part, side, 1024) for side in SIDES[part])
    scores_mb = 2 * 1024**2 * 4 / 1e6
    assert plain["scores_mb"] == scores_mb
    assert plain["kept_memory_mb"] > scores_mb  # the scores
    assert plain["step_memory_mb"] > 2 * scores_mb  # and their gradient
    for row in others:
        assert row["order"] == "state"
        assert row["kept_memory_mb"] < row["step_memory_mb"] < scores_mb / 4
        assert row["memory_ratio"] == plain["step_memory_mb"] / row["step_memory_mb"] > 8


@pytest.mark.parametrize("part", SIDES)
def test_memory_grows_linearly_with_the_state_and_quadratically_with_the_scores(rows, part):
    def growth(side):
        return row_of(rows, part, side, 1024)["step_memory_mb"] / row_of(rows, part, side, 512)["step_memory_mb"]

    assert growth("plain") > 3.5
    for side in SIDES[part][1:]:
        assert 1.8 < growth(side) < 2.05


def test_the_expected_memory_is_an_upper_bound_and_not_a_wild_one(rows):
    for row in rows:
        if row["tokens"] > 8:
            expected = expected_mb(Options(**TINY), row["part"], row["side"], row["tokens"])
            assert 1 < expected / row["step_memory_mb"] < 3


def test_a_side_that_does_not_fit_is_left_out_and_says_so(monkeypatch, capsys):
    limit = 1e6 * expected_mb(Options(**TINY), "level", "reordered", 512)
    monkeypatch.setattr(attention_cost, "fits_in_memory", lambda n_bytes, device: n_bytes <= limit)
    rows = measure(Options(**TINY, tokens=(512,)), CPU)
    assert [(row["part"], row["side"]) for row in rows] == [
        ("attention", "reordered"),
        ("level", "reordered"),
        ("level", "fast path"),
    ]
    assert all(row["forward_ratio"] is None and row["memory_ratio"] is None for row in rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": needs")[0] for line in lines] == [
        "left out: attention, plain, 512 tokens",
        "left out: level, plain, 512 tokens",
    ]
    attention_cost.show(rows)
    draw(rows)


def test_panels_show_what_their_titles_say(rows):
    columns = {"forward": "forward_seconds", "backward": "backward_seconds", "peak memory": "step_memory_mb"}
    panels = [(part, *each) for part in SIDES for each in columns.items()]
    for ax, (part, title, column) in zip(draw(rows).axes, panels, strict=True):
        plain = [row[column] for row in rows if (row["part"], row["side"]) == (part, "plain")]
        scale = 1 if column == "step_memory_mb" else 1e3
        assert ax.get_title().endswith(f": {title}") and ax.lines[0].get_label().startswith("plain")
        assert ax.lines[0].get_ydata() == pytest.approx([scale * value for value in plain])


def test_the_script_writes_its_table_and_its_plot(call_script, tmp_path, capsys):
    assert call_script("benchmarks/attention_cost.py", *FLAGS, "--tokens", "8", "48", "--output-dir", "out") == 0
    (path,) = (tmp_path / "out").glob("attention_cost_cpu_1threads_tokens=8,48_*.csv")
    table = pd.read_csv(path)
    assert len(table) == 2 * 5
    assert table["machine"].str.startswith("1 thread of ").all()
    plot = path.with_suffix(".png")
    check_picture(plot)
    printed = capsys.readouterr().out
    assert "fast path" in printed and plot.name in printed and plot.with_suffix(".svg").name in printed


def test_the_script_ends_with_a_message_where_nothing_fits(call_script, monkeypatch, capsys):
    monkeypatch.setattr("training.device.fits_in_memory", lambda n_bytes, device: False)
    assert call_script("benchmarks/attention_cost.py", *FLAGS, "--tokens", "8") == 1
    assert "nothing fits into memory" in capsys.readouterr().err


def test_bf16_and_larger_batches_have_files_of_their_own(tmp_path):
    rows = measure(Options(**TINY, tokens=(16,), precision="bf16", batch_size=2), CPU)
    assert file_stem("cpu", rows[0], Options()) == "attention_cost_cpu_bf16_batch2"
    assert {row["scores_mb"] for row in rows} == {2 * 2 * 16**2 * 2 / 1e6}
    rows = measure(Options(**TINY, tokens=(16,), precision="tf32"), CPU)
    assert file_stem("cpu", rows[0], Options()) == "attention_cost_cpu"  # a CPU has no TF32
    assert file_stem("cpu", rows[0], Options(tokens=(16,))) == "attention_cost_cpu_tokens=16"


def test_fewer_steps_count_where_they_are_long():
    assert [Options().repeats_at(n) for n in (64, 1024, 2304, 4096, 9216)] == [21, 21, 9, 5, 3]
    assert Options(repeats=2).repeats_at(9216) == 2
