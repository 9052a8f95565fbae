"""A pruned copy of a run: a folder that scripts open like a run, and from which a training can start."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interpretability.common.recorder import record
from models.pruning import core_of, kept_neurons, neuron_counts, pruned
from tools.exporting.weights import check_target, export_weights, write_bytes
from training.command_line import experiment_of, flags_of
from training.config import ROOT, UserError
from training.session import count_parameters


@torch.no_grad()
def importance(model: nn.Module, batches: Iterable[Tensor], criterion: str = "use") -> Tensor:
    """How much each neuron is needed, (H, N), summed over levels, tokens and images (B, C, height, width).

    criterion: "activity" is the sum of its gated activity; "use" is that sum times the length of its row of the
    decoder, a bound on what its own path through the decoder adds to the updates; what the neuron does as a query and
    key of the attention is not measured. Raises ValueError for a model that cannot be pruned.
    """
    core = core_of(model)
    total = torch.zeros(core.encoder.shape[-3], core.encoder.shape[-1], dtype=torch.float64)
    with record(model, "gated") as trace:
        for images in batches:
            model(images)
            for level, weights in enumerate(core.step_weights()):
                gated = trace.gated(level).abs().sum((0, 2))  # (H, N)
                if criterion == "use":
                    gated = gated * weights.decoder.view(*gated.shape, -1).norm(dim=-1)
                total.add_(gated.cpu().double())
    return total


def prune(model: nn.Module, batches: Iterable[Tensor], keep: float) -> nn.Module:
    """The model with the share `keep` of the neurons of every head: those that are needed most on these images.

    Raises UserError for a model that cannot be pruned.
    """
    try:
        core = core_of(model)
    except ValueError as error:
        raise UserError(str(error)) from None
    counts = neuron_counts(core.config)
    n_neurons = min(counts, key=lambda n: abs(n - keep * core.config.n_neurons))
    needed = importance(model, batches)
    return pruned(model, kept_neurons(needed, n_neurons, core.config.rotary_parts))


def write_pruned(model: nn.Module, config: dict[str, Any], target: Path) -> Path:
    """Writes the pruned model's weights and config.json into target; returns the file of the weights.

    config: of the run that the model comes from. Raises UserError if target holds another run.
    """
    multiplier = model.config.mlp_internal_dim_multiplier
    content = json.loads(json.dumps(config))
    content["config"]["model"]["mlp_internal_dim_multiplier"] = multiplier
    content["experiment"] += f"+pruned={multiplier}"
    content["parameters"] = count_parameters(model)
    content["origin"] = {"pruned_from": config["experiment"], "run_id": config.get("run_id")}
    check_target(target, content)
    path = export_weights(model, target, target)
    write_bytes(target / "config.json", (json.dumps(content, indent=2) + "\n").encode())
    return path


def fine_tuning_command(model: nn.Module, config: dict[str, Any], weights: Path) -> str:
    """The command that continues training with the pruned weights, as far as it is known for a run of another name."""
    script = f"train_{config['experiment'].partition('+')[0]}.py"
    start = f"--start-from {shlex.quote(str(weights))}"
    if not (ROOT / script).is_file():
        multiplier = model.config.mlp_internal_dim_multiplier
        return f"python SCRIPT AND FLAGS OF THE RUN --mlp-internal-dim-multiplier {multiplier} {start}"
    known = experiment_of(script)
    fields = {}
    for ours, theirs in ((known.model, vars(model.config)), (known.train, config["config"]["train"])):
        fields |= {
            key: theirs[key] for key, value in vars(ours).items() if key in theirs and not _same(theirs[key], value)
        }
    for key in ("encoder", "encoder_weights", "start_from", "seed"):
        fields.pop(key, None)
    flags = " ".join(flags_of({key: value for key, value in fields.items() if value is not None}))
    return f"python {script} {flags} {start}"


def _same(one: Any, other: Any) -> bool:
    return (list(one) if isinstance(one, tuple) else one) == (list(other) if isinstance(other, tuple) else other)
