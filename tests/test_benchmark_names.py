"""A benchmark at other sizes than the default's has a file of its own: it replaces no table of the full size."""

from pathlib import Path
from unittest import mock

import pandas as pd
import pytest

from benchmarks import attention_cost, data_loading, model_sizes, pruning_curve, scaling
from benchmarks.measure import changed

RUN = mock.Mock(stem="run", title="a run", file_name=str)
MEASURED = {  # what is not done here, of each benchmark
    scaling: {"measure": [dict(varied="n_layer", size=1, side="fast", seconds=1.0, step_memory_mb=1.0)], "draw": None},
    attention_cost: {"measure": [{"precision": "float32", "batch_size": 1}], "show": None, "draw": None},
    model_sizes: {"configs": {}},
    data_loading: dict(make_jpegs=None, load_dataset=None, measure_rates=[{}], measure_memory=[{}], draw=None),
    pruning_curve: {
        "TrainedRun": RUN,
        "measure": pd.DataFrame(dict(neurons_per_head=[], order=[], accuracy=[])),
        "draw": None,
    },
}


def file_of(benchmark, monkeypatch, fields):
    """The table that main writes first."""
    for name, result in MEASURED[benchmark].items():
        monkeypatch.setattr(benchmark, name, mock.Mock(return_value=result))
    written = mock.Mock(side_effect=lambda table, path, figure=None: (path, path, path))
    monkeypatch.setattr(benchmark, "write_results", written)
    benchmark.main(benchmark.Options(**fields))
    return written.call_args_list[0].args[1].name


@pytest.mark.parametrize(
    ("benchmark", "needed", "trials"),
    [
        (scaling, {}, [dict(depths=(2,)), dict(base=(1, 32, 16, 4)), dict(sides=("fast",)), dict(n_embd=96)]),
        (attention_cost, {}, [dict(tokens=(8,)), dict(n_embd=64), dict(tokens=tuple(range(1, 200)))]),
        (model_sizes, {}, [dict(precision="float32")]),
        (data_loading, dict(images_dir=Path("jpegs")), [dict(images=60), dict(img_size=32), dict(memory_images=60)]),
        (pruning_curve, dict(run=Path("run")), [dict(points=2), dict(test_images=9), dict(seed=1)]),
    ],
)
def test_a_trial_has_a_file_of_its_own(benchmark, needed, trials, monkeypatch):
    names = [file_of(benchmark, monkeypatch, needed | fields) for fields in ({}, *trials)]
    assert len(set(names)) == len(names) and "=" not in names[0] and max(map(len, names)) < 250


def test_the_name_of_many_changes_is_short():
    one, other = (changed(attention_cost.Options(tokens=tuple(range(1, n))), "tokens") for n in (200, 201))
    assert one != other and len(one) == len(other) == 9
