"""Structured pruning: a smaller N in every head, so that the model computes less.

Neurons rotate in pairs (2 k, 2 k + 1) of one frequency, so pairs are kept or dropped, each head its own, and a kept
pair keeps its frequency: the buffer `attn.freqs` of a pruned model is (1, H, 1, N), a row for each head. With axial
positions, as many pairs are kept of those that rotate by rows as of those that rotate by columns.

A pruned model computes what the whole one computes with the dropped neurons silenced.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from models.bdh import BDHCore, StepWeights
from models.bdh_unet import BDHUNet
from models.rotary import axial_sizes


def core_of(model: nn.Module) -> BDHCore:
    """The part of the model with the neurons. Raises ValueError if the model is no BDH or cannot be pruned."""
    core = model.encoder if isinstance(model, BDHUNet) else model
    if not isinstance(core, BDHCore):
        raise ValueError(f"a {type(model).__name__} has no neurons to prune: give a BDH")
    if core.config.attention == "softmax":
        raise ValueError("attention = softmax divides scores by sqrt(N), which pruning would change: not supported")
    if core.config.qk_norm:
        raise ValueError("qk_norm takes the mean over all N neurons, which pruning would change: not supported")
    return core


def neuron_counts(config: Any) -> list[int]:
    """Numbers N of neurons per head that a config of this width and heads can have, up to its own."""
    multiple = 4 if config.rotary == "axial" else 2
    every = (m * config.n_embd / config.n_head for m in range(1, config.mlp_internal_dim_multiplier + 1))
    return [int(n) for n in every if n == int(n) and int(n) % multiple == 0 and n >= 2 * config.rotary_parts]


def kept_neurons(needed: Tensor, n_neurons: int, parts: int = 1) -> Tensor:
    """Numbers of the kept neurons, (H, n_neurons), ascending: the pairs whose two neurons are needed most together.

    parts: `CoreConfig.rotary_parts`, each of which keeps its share.
    """
    kept, first = [], 0
    of_parts = needed.split(axial_sizes(needed.shape[-1], parts), dim=-1)
    for part, size in zip(of_parts, axial_sizes(n_neurons, parts), strict=True):
        pairs = part.unflatten(-1, (-1, 2)).sum(-1)  # (H, pairs)
        best = pairs.topk(size // 2, dim=-1).indices.sort(dim=-1).values
        kept.append(first + torch.stack((2 * best, 2 * best + 1), dim=-1).flatten(-2))
        first += part.shape[-1]
    return torch.cat(kept, dim=-1)


def pruned(model: nn.Module, kept: Tensor) -> nn.Module:
    """A new model with the kept neurons only. kept: (H, n) as `kept_neurons` gives them.

    Raises ValueError for a model that cannot be pruned or a number of neurons that no config has.
    """
    core, n = core_of(model), kept.shape[1]
    config = model.config
    if n not in neuron_counts(config):
        raise ValueError(f"{n} neurons per head: choose one of {', '.join(map(str, neuron_counts(config)))}")
    smaller = dataclasses.replace(config, mlp_internal_dim_multiplier=n * config.n_head // config.n_embd)
    if getattr(smaller, "encoder", None):  # its weights come from the model
        smaller = dataclasses.replace(smaller, encoder=None)
    prefix = "encoder." if isinstance(model, BDHUNet) else ""
    state = model.state_dict()
    for name in (*StepWeights._fields, "attn.freqs"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}{name}"] = _part(name, state[f"{prefix}{name}"], kept)
    new = smaller.build().to(core.encoder)
    new.load_state_dict(state)
    return new.train(model.training)


def _part(name: str, value: Tensor, kept: Tensor) -> Tensor:
    """The kept neurons of one tensor of the core; a leading axis is the level's, if there is one for each."""
    kept = kept.to(value.device)
    H, n = kept.shape
    if name == "attn.freqs":  # (1, 1 or H, 1, N)
        return value.expand(1, H, 1, -1).gather(-1, kept[None, :, None, :])
    if name == "decoder":  # (..., H N, D)
        rows = value.unflatten(-2, (H, -1))
        index = kept[..., None].expand(*rows.shape[:-2], n, rows.shape[-1])
        return rows.gather(-2, index).flatten(-3, -2)
    return value.gather(-1, kept[:, None, :].expand(*value.shape[:-1], n))  # (..., H, D, N)
