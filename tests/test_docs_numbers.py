"""Numbers typed into README.md, docs/results.md and docs/interpretability.md are those of the files in results/.

They are rounded as the page rounds them; the expected lines are built from the files. Tables that analysis/claims.py
makes are held to them in test_pages.py.
"""

import json
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.pages import NONE
from analysis.published import read_published
from analysis.tables import accuracy_interval
from plans import BEST_RATES, RATES, V4_BEST_RATES, V4_CHANGES, V4_RATES, V4_RIVALS, at_rate, training_flop
from training.command_line import experiment_of
from training.config import ROOT

RESULTS = ROOT / "results"


class Measured(NamedTuple):
    """A run in results/, in the words of the pages."""

    summary: dict[str, Any]
    metrics: pd.DataFrame

    @property
    def parameters(self) -> str:
        return f"{self.summary['parameters']:,}"

    @property
    def validation(self) -> float:
        """Validation accuracy of the best epoch in percent."""
        return 100 * self.summary["best"]["val_accuracy"]

    @property
    def value(self) -> float:
        """Test accuracy in percent."""
        return 100 * self.summary["test"]["accuracy"]

    @property
    def accuracy(self) -> str:
        return f"{self.value:.2f}"

    @property
    def interval(self) -> str:
        n = self.summary["images"]["test"]
        low, high = accuracy_interval(round(self.value * n / 100), n)
        return f"{100 * low:.2f} to {100 * high:.2f}"

    @property
    def minutes(self) -> float:
        """Without validation, as in analysis/time_to_accuracy.py."""
        return (self.summary["images"]["train"] / self.metrics.images_per_sec).sum() / 60


@cache
def run(name: str, seed: int = 0) -> Measured:
    """name: folder below results/ with the folders of the seeds."""
    folder = RESULTS / name / f"seed{seed}"
    return Measured(json.loads((folder / "summary.json").read_text()), pd.read_csv(folder / "metrics.csv"))


def published(script: str, flags: str = "") -> str:
    """The first published value of that script with those flags, in percent."""
    return next(line.value for line in read_published() if (line.script, line.flags) == (script, flags))


def petaflop(script: str, flags: str = "") -> str:
    """Training operations of that script with those flags, to three digits."""
    return f"{training_flop(experiment_of(script, flags)) / 1e15:.3g}"


V4 = [run("speedrun", seed) for seed in range(3)]
WIDE, VIT, WIDE_VIT = (run(f"speedrun/{name}") for name in ("width192", "vit_tiny", "vit_tiny_width192"))
MIRRORED = [run("speedrun/width192_flip", seed) for seed in range(3)]
V2, V1 = run("v2_cifar10+compile=True+precision=bf16"), run("v1_cifar10+epochs=10+precision=bf16")
V1_10_EPOCHS = ("train_v1_cifar10.py", "--epochs 10")
MINUTES = sorted(each.minutes for each in V4)
MEAN = np.mean([each.value for each in V4])


def readme() -> list[str]:
    return [
        f"v4 ({V4[0].parameters} parameters, {V4[0].accuracy} % test accuracy) and a ViT-Tiny of equal size with the "
        f"same training ({VIT.accuracy} %; with as many operations as v4: {WIDE_VIT.accuracy} %)",
        f"`results/speedrun/width192_flip/seed1` ({MIRRORED[1].parameters} parameters, {MIRRORED[1].accuracy} % of "
        "CIFAR-10's test images",
        f"`results/speedrun/seed0` ({V4[0].parameters} parameters, {V4[0].accuracy} %; three seeds: {MEAN:.2f} % on "
        f"average, {MINUTES[0]:.0f} to {MINUTES[-1]:.0f} minutes on two CPU cores)",
    ]


def status() -> list[str]:
    v2, v1 = V2, V1
    vit = [run("vit_tiny_cifar10+epochs=10+precision=bf16", seed) for seed in range(3)]
    few = [run("v1_cifar10+epochs=10+mlp_internal_dim_multiplier=4+precision=bf16", seed) for seed in range(3)]
    resnet = [run("resnet20_cifar100+precision=bf16", seed) for seed in range(3)]
    of_v2, of_v1 = (100 * each.metrics.set_index("epoch") for each in (v2, v1))
    by_epoch = "{:.1f}, {:.1f}, {:.1f} and {:.1f}".format(*of_v1.val_accuracy[[1, 2, 5, 9]])
    losses = [each.metrics.train_loss.iloc[-1] for each in resnet]
    lead = v1.value - max(each.value for each in vit)
    return [
        f"the headline: {v2.accuracy} % ({v2.interval}), one seed",
        f"published {published('train_v2_cifar10.py')}, inside",
        f"Epoch {v2.summary['best']['epoch']} validates best ({v2.validation:.2f} %)",
        f"are reached in epoch {(of_v2.val_accuracy >= 81.73).idxmax()}.",
        f"classifies {of_v2.train_accuracy.iloc[-1]:.1f} % of its augmented training images",
        f"rises from {of_v2.val_loss.min() / 100:.2f} after epoch {of_v2.val_loss.idxmin()} to "
        f"{of_v2.val_loss.iloc[-1] / 100:.2f}",
        f"10 epochs**: {v1.accuracy} % ({v1.interval}), one seed; published {published(*V1_10_EPOCHS)}",
        f"it validates at {by_epoch} %",
        f"**ViT-Tiny, 10 epochs**: {_spread(vit)}; published {published('train_vit_tiny_cifar10.py', '--epochs 10')}",
        f"v1 is {v1.value - vit[0].value:.2f} points ahead",
        f"(published {float(published(*V1_10_EPOCHS)) - 65.96:.2f}), and {lead:.1f} ahead of the best",
        f"10 epochs: {_mean(few)} % with {few[0].parameters} parameters",
        f"**ResNet-20 on CIFAR-100**: {_spread(resnet)}; published {published('train_resnet20_cifar100.py')}",
        f"loss {min(losses):.2f} to {max(losses):.2f})",
    ]


def _mean(runs: list[Measured]) -> str:
    values = [each.value for each in runs]
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def _spread(runs: list[Measured]) -> str:
    return f"{_mean(runs)} % ({', '.join(each.accuracy for each in runs)})"


def speedrun() -> list[str]:
    """The table, and what is said below it."""
    costs = pd.read_csv(RESULTS / "speedrun" / "time_to_accuracy.csv")
    costs = costs.set_index(["parameters", costs.experiment.str.contains("eval_flip")])

    def of_seeds(runs: list[Measured]) -> str:
        values = [each.value for each in runs]
        mean, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        seeds = ", ".join(each.accuracy for each in runs)
        return f"{mean:.2f} ({seeds}; 95 % interval of the mean {mean - half:.1f} to {mean + half:.1f})"

    results = {
        "v4": (V4[0], of_seeds(V4)),
        "v4, width 192 (`--n-embd 192`)": (WIDE, None),
        "v4, width 192, with mirror images (`--eval-flip`)": (MIRRORED[1], of_seeds(MIRRORED)),
        "ViT-Tiny of v4's size": (VIT, None),
        "ViT-Tiny with v4's operations (width 192)": (WIDE_VIT, None),
    }
    lines = []
    for name, (one, result) in results.items():
        cost = costs.loc[one.summary["parameters"], "eval_flip" in one.summary]
        reached = NONE if np.isnan(cost.pflop_to_target) else f"{cost.pflop_to_target:.2f}"
        result = result or f"{one.accuracy} ({one.interval} over test images)"
        lines.append(f"| {name} | {one.parameters} | {cost.seeds} | {cost.pflop:.2f} | {reached} | {result} |")
    v2, v1, target = petaflop("train_v2_cifar10.py"), petaflop(*V1_10_EPOCHS), published("train_v2_cifar10.py")
    reached = (V2.metrics.set_index("epoch").val_accuracy >= float(target) / 100).idxmax()
    to_target = reached / 50 * training_flop(experiment_of("train_v2_cifar10.py")) / 1e15
    v4_to_target = costs.loc[V4[0].summary["parameters"], False].pflop_to_target
    lines += [
        f"| v2, published protocol, 50 epochs | {V2.parameters} | 1 | {v2} | {to_target:.1f} | {V2.accuracy} "
        f"(published {target}) |",
        f"| v1, published protocol, ten epochs | {V1.parameters} | 1 | {v1} | {NONE} | {V1.accuracy} (published "
        f"{published(*V1_10_EPOCHS)}) |",
        f"v4 needs 1/{to_target / v4_to_target:.0f} of what v2",
        f"the wide v4 gains {MIRRORED[0].value - WIDE.value:.2f} points",
        f"({100 * WIDE_VIT.metrics.train_accuracy.iloc[-1]:.1f} % in the last epoch)",
        "trained for {:.0f}, {:.0f} and {:.0f} minutes".format(*MINUTES),
    ]
    return lines


def attention() -> list[str]:
    """Ranges over levels, and the few-shot table."""
    table = pd.read_csv(RESULTS / "looks" / "attention_statistics.csv")
    table = table[(table["head"] == "all") & (table["weights"] == "trained")].set_index(["run", "statistic"])["mean"]

    def spread(name: str, statistic: str, digits: int = 2, factor: int = 1) -> str:
        values = factor * table[name, statistic]
        return f"{values.min():.{digits}f} to {values.max():.{digits}f}"

    v1, v4, vit, tuned = "v1 (4 neurons a dimension)", "v4", "ViT-Tiny", "ViT-Tiny, v4's recipe"
    near, images, heads = ("distance", 1, 1), ("same_for_images", 0, 100), ("same_for_heads", 0, 100)
    lowest, highest = (pick(table[name, "distance"].agg(pick) for name in (v1, v4)) for pick in (min, max))
    few = pd.read_csv(RESULTS / "looks" / "few_shot_cifar100.csv", keep_default_na=False)
    few = few[few["method"] == "nearest_mean"]
    rows = []
    for (features, weights), of in few.groupby(["features", "weights"], sort=False):
        half = 50 * (of["accuracy_high"] - of["accuracy_low"])
        cells = " | ".join(f"{100 * a:.1f} ± {h:.1f}" for a, h in zip(of["accuracy"], half, strict=True))
        rows.append(f"| {features}{', untrained' * (weights == 'untrained')} | {cells} |")
    return [
        f"{spread(v1, 'entropy')} of that of equal shares (v1) and {spread(v4, 'entropy')} (v4)",
        f"ViT-Tiny's is {spread(vit, 'entropy')}",
        f"{spread(v1, 'self_share', 1, 100)} % in v1",
        f"ViT-Tiny has {spread(vit, 'self_share', 1, 100)} %",
        f"gets {spread(vit, 'to_class_token', 1, 100)} % of the weight",
        f"({lowest:.1f} to {highest:.1f} patches; equal shares 4.1; ViT-Tiny {spread(vit, *near)})",
        f"images share {spread(v1, *images)} % of it in v1, {spread(vit, *images)} % in ViT-Tiny",
        f"({spread(v1, *heads)} % against {spread(vit, *heads)})",
        f"({spread(tuned, *near)} patches, {spread(tuned, *images)} %, {spread(tuned, *heads)} %)",
        *rows,
    ]


def published_model() -> list[str]:
    """What the scripts made of v2 as published: ranges over levels."""
    looks = RESULTS / "v2_cifar10+compile=True+precision=bf16" / "looks"
    table = pd.read_csv(looks / "attention_statistics.csv")
    table = table[table["head"] == "all"].set_index(["run", "weights", "statistic"])["mean"]

    def spread(statistic: str, digits: int = 0, factor: int = 100, run: str = "v2", weights: str = "trained") -> str:
        values = factor * table[run, weights, statistic]
        return f"{values.min():.{digits}f} to {values.max():.{digits}f}"

    probe = pd.read_csv(looks / "probe.csv").set_index(["method", "level"])["accuracy"] * 100
    cka = pd.read_csv(looks / "representations.csv")
    cka = cka[cka.run_a.str.startswith("v2") & cka.run_b.str.startswith("vit") & (cka.level_a == cka.level_b)]
    cka = cka.set_index("level_a").cka
    neurons = pd.read_csv(looks / "sparsity.csv")
    share = 100 * neurons[neurons.quantity == "gated"].groupby("level")["share"].mean()
    by_level = [f"{probe['linear_probe', level]:.1f}" for level in range(1, 7)]
    more = probe["run_with_levels"]
    return [
        f"entropy {spread('entropy', 2, 1)} of that of equal",
        f"{spread('self_share')} % on the patch itself, at a mean distance of {spread('distance', 1, 1)} patches",
        f"{spread('row_share')} % to the others in its row",
        f"{spread('column_share')} % to those in its column",
        f"{spread('row_share', weights='untrained')} % are there before training",
        f"{spread('row_share', run='v4')} and {spread('column_share', run='v4')} %",
        f"are {spread('negative')} % of the sum",
        f"reads {', '.join(by_level[:5])} and {by_level[5]} % after",
        f"has {probe['readout', 1]:.1f} % after level 1 and {probe['readout', 5]:.1f} after level 5",
        f"keeps {more[7]:.1f} % with seven and {more[8]:.1f} with eight, and falls to {more[12]:.1f} with twelve",
        f"CKA {cka[0]:.2f} before the first one, {cka[3]:.2f} after the third, {cka[6]:.2f} after the last",
        f"{share.min():.1f} to {share.max():.1f} % of them, fewest at level {share.idxmin()}",
    ]


def clips() -> list[str]:
    of_all = [run("clips/video_bdh+precision=float32", seed) for seed in range(3)]
    one = run("clips/video_bdh+in_channels=3+n_frames=1+precision=float32+tubelet=1")
    values = [each.value for each in of_all]
    spread = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f} ({', '.join(each.accuracy for each in of_all)})"
    return [
        f"| 8 frames, tokens of 2 | {of_all[0].parameters} | {spread} | 3 |",
        f"| the frame in the middle | {one.parameters} | {one.accuracy} | 1 |",
    ]


def recipe_rates() -> list[str]:
    """The table of learning rates: validation and test of both models, the best validation bold."""
    lines = []
    for optimizer, title in {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}.items():
        for rate in RATES[optimizer]:
            cells = [title, rate]
            for of_model, best in BEST_RATES.items():
                done, chosen = (_run_at(of_model, optimizer, each) for each in (rate, best[optimizer]))
                assert done.validation <= chosen.validation
                bold = "**" * (best[optimizer] == rate)
                cells += [f"{bold}{done.validation:.2f}{bold}", done.accuracy]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _run_at(model: str, optimizer: str, rate: str) -> Measured:
    return _run_of("recipe_small_cpu", f"{at_rate(model, optimizer, rate)} --precision bf16")


def _run_of(folder: str, line: str, seed: int = 0) -> Measured:
    """line: a script with flags."""
    script, _, flags = line.partition(" ")
    return run(f"{folder}/{experiment_of(script, flags).name}", seed)


def v4_rates() -> list[str]:
    """The table of learning rates of v4 and its rivals: best validation of each, the best of a model bold."""
    titles = (
        "v4, width 64",
        "v2, width 64",
        "ViT, width 64: as many parameters",
        "ViT, width 160: as many training operations",
    )
    lines = []
    for title, rival in zip(titles, V4_RIVALS, strict=True):
        done = [_run_of("v4_small_cpu", f"{rival} --learning-rate {rate} --precision float32") for rate in V4_RATES]
        best = max(each.validation for each in done)
        cells = [f"**{best:.2f}**" if each.validation == best else f"{each.validation:.2f}" for each in done]
        lines.append(f"| {' | '.join([title, done[0].parameters, *cells])} |")
    best = zip(V4_RIVALS[:2], V4_BEST_RATES, strict=False)
    chosen = [f"{rival} --learning-rate {rate} --precision float32" for rival, rate in best]
    (v4, v2), (v4_again, v2_again) = (
        [_run_of("v4_small_cpu", each, seed).accuracy for each in chosen] for seed in (0, 1)
    )
    return [*lines, f"{v4_again} and {v2_again} % of the test images, after {v4} and {v2} with the first"]


def v4_parts() -> list[str]:
    """The table of single changes, first the model itself."""
    lines = []
    for change in V4_CHANGES[:7]:
        done = _run_of("v4_small_cpu", f"{V4_RIVALS[0]}{change} --precision float32")
        title = f"`{change.strip()}`" if change else "none: v4"
        lines.append(f"| {title} | {done.parameters} | {done.validation:.2f} | {done.accuracy} |")
    return lines


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("README.md", readme),
        ("docs/results.md", status),
        ("docs/results.md", speedrun),
        ("docs/interpretability.md", attention),
        ("docs/interpretability.md", published_model),
        ("results/recipe_small_cpu/README.md", recipe_rates),
        ("results/clips/README.md", clips),
        ("results/v4_small_cpu/README.md", v4_rates),
        ("results/v4_small_cpu/README.md", v4_parts),
    ],
    ids=["README", "status", "speedrun", "attention", "published model", "recipe", "clips", "v4 rates", "v4 parts"],
)
def test_a_page_says_what_the_files_in_results_say(page, expected):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    missing = [line for line in expected() if line not in text]
    assert not missing, (
        f"change {page} (or, for new words, this test). By the files in results/, it says:\n" + "\n".join(missing)
    )
