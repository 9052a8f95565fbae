"""Vision-BDH in timm: importing this module registers its models.

    import timm
    import models.timm_models

    timm.create_model("vision_bdh_v2", num_classes=100, img_size=64, n_layer=4)   # untrained, any config field
    timm.create_model("vision_bdh_speedrun", pretrained=True)                     # one per model in results/
    timm.create_model("vision_bdh_speedrun", pretrained=True, num_classes=3)      # a new head
    timm.create_model("vision_bdh_speedrun", pretrained=True, features_only=True, out_indices=(1, 3))

Untrained: vision_bdh_v1, _v2, _v2_softmax, _v3. Trained: vision_bdh_ and the name in `models.pretrained`, with _
for all but letters and digits. timm's own train.py and validate.py take them once this module is imported:

    python -c "import models.timm_models, runpy; runpy.run_path('validate.py', run_name='__main__')" --model ...

Arguments use timm's names: in_chans, drop_rate (dropout of the gated neurons), drop_path_rate; all others are fields of
VisionBDHConfig. Images are scaled to [-1, 1] (mean and standard deviation 0.5), bicubic, without a margin.
"""

import re
import warnings
from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from models import build_config, vision_bdh
from models.pretrained import RESULTS, pretrained_folders
from models.vision_bdh import VisionBDH, VisionBDHConfig, init_projection, interpolate_positions
from training.config import UserError
from training.stored import EXPORTED, read_config

UNTRAINED = ("v1", "v2", "v2_softmax", "v3")
POOLS = {"mean": "avg", "cls": "token", "seq": "seq"}  # timm's names
default_cfgs: dict[str, Any] = {}  # by model; `register_model` looks for it here


class TimmVisionBDH(VisionBDH):
    """VisionBDH with the methods that timm asks a model for. Weights have the names of VisionBDH's."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float | None = None,
        drop_path_rate: float = 0.0,
        global_pool: str | None = None,
        **fields: Any,
    ):
        """num_classes: 0 for no head. global_pool: avg, token, seq, or "" for no pooling; default: the config's."""
        if drop_rate is not None:
            fields["dropout"] = drop_rate
        if global_pool:
            pools = {name: pool for pool, name in POOLS.items()}
            if global_pool not in pools:
                raise ValueError(f"global_pool = {global_pool!r} must be one of {', '.join(pools)}, or '' for none")
            fields["pool"] = pools[global_pool]
        sizes = dict(num_classes=max(num_classes, 1), in_channels=in_chans, drop_path=drop_path_rate)
        super().__init__(VisionBDHConfig(**fields, **sizes))
        self.num_features = self.head_hidden_size = self.embed_dim = self.config.n_embd
        self.num_prefix_tokens = int(self.cls_token is not None)
        self.global_pool = POOLS[self.config.pool] if global_pool is None else global_pool
        self.feature_info = [
            dict(module=f"level.{level}", num_chs=self.config.n_embd, reduction=self.config.patch_size)
            for level in range(self.config.n_layer)
        ]
        self.num_classes = num_classes
        if num_classes == 0:
            self.head = nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head; 0 classes for none. global_pool: "" for no pooling, or the model's own."""
        own = POOLS[self.config.pool]
        if global_pool not in (None, "", own):
            raise ValueError(f"global_pool = {global_pool!r} must be {own!r}, as the model was built, or ''")
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.num_classes = num_classes
        old = next(self.parameters())
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=old.device, dtype=old.dtype)
            init_projection(self.head, self.config.init_projections)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, height, width) -> last state (B, T, D), a class token first if there is one."""
        return self.tokens(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, T, D) -> logits (B, classes), or with pre_logits what the head reads, (B, D).

        Without pooling: (B, T, classes) or (B, T, D).
        """
        x = self.pooled(x) if self.global_pool else self.normalised(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The state after some of the levels as if each were the last, (B, D, rows, columns), or (B, T, D) as NLC.

        indices: levels from 0; the last n for a number; all for None. norm: apply the final LayerNorm to each. Returns
        the last state and the list, or the list alone. stop_early is not used: the last state needs all levels.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt = {output_fmt!r} must be NCHW or NLC")
        take, _ = feature_take_indices(self.config.n_layer, indices)
        tokens, grid = self.embed(x)
        states = self.states(tokens, grid)
        found = []
        for level in take:
            last = level == self.config.n_layer - 1  # has passed `finished` already
            state = states[level] if last else self.finished(states[level])
            if norm:
                state = self.normalised(state)
            prefix, patches = state[:, : self.num_prefix_tokens], state[:, self.num_prefix_tokens :]
            found_one = patches.mT.unflatten(-1, grid).contiguous() if output_fmt == "NCHW" else patches
            found.append((found_one, prefix) if return_prefix_tokens and self.num_prefix_tokens else found_one)
        return found if intermediates_only else (states[-1], found)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.recompute = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """For layer-wise rates: levels share their weights and are one layer, a hybrid's blocks one each."""
        return dict(
            stem=r"^cls_token|pos_embed|patch_embed",
            before=r"^blocks_before\.(\d+)",
            levels=r"^(?:encoder|decoder|level_|update_gain|mixing)",
            after=r"^blocks_after\.(\d+)",
        )


def _filter(weights: dict[str, Tensor], model: TimmVisionBDH) -> dict[str, Tensor]:
    """Weights in float32, in which timm adapts them, with learned positions for the model's size of images."""
    weights = {name: value.float() for name, value in weights.items()}
    positions = weights.get("pos_embed")
    if positions is not None and model.config.pos_embed and positions.shape[1:] != model.pos_embed.shape[1:]:
        _, *size = model.pretrained_cfg["input_size"]
        before = tuple(side // model.config.patch_size for side in size)
        weights = weights | {"pos_embed": interpolate_positions(positions, before, model.config.grid)}
    return weights


def _register(name: str, config: VisionBDHConfig, weights: Path | None = None) -> None:
    fields = {key: value for key, value in vars(config).items() if key not in ("num_classes", "in_channels")}
    renamed = dict(drop_rate=fields.pop("dropout"), drop_path_rate=fields.pop("drop_path"))

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        for own, of_timm in (("dropout", "drop_rate"), ("drop_path", "drop_path_rate"), ("in_channels", "in_chans")):
            if own in kwargs:
                raise TypeError(f"{own} has the name {of_timm} in timm: use that")
        return build_model_with_cfg(
            TimmVisionBDH,
            name,
            pretrained,
            feature_cfg=dict(out_indices=tuple(range(kwargs.get("n_layer", config.n_layer))), feature_cls="getter"),
            pretrained_filter_fn=_filter,
            **(fields | renamed | kwargs),
        )

    build.__name__ = name
    description = dict(
        url="",
        file=str(weights) if weights else None,
        num_classes=config.num_classes,
        input_size=(config.in_channels, config.img_size, config.img_size),
        crop_pct=1.0,
        interpolation="bicubic",
        mean=(0.5,) * config.in_channels,
        std=(0.5,) * config.in_channels,
        first_conv="patch_embed.first" if config.stem == "conv" else "patch_embed",
        classifier="head",
        license="mit",
    )
    default_cfgs.update(generate_default_cfgs({name: description}))
    register_model(build)


def register_pretrained(results: Path = RESULTS) -> list[str]:
    """Registers every VisionBDH in results and returns their timm names; warns of those it cannot read."""
    names = []
    for name, folder in pretrained_folders(results).items():
        try:
            config = read_config(folder)
            model = build_config(config["model_class"], config["config"]["model"])
        except (UserError, ValueError) as error:
            warnings.warn(f"{folder} is not registered: {error}", stacklevel=2)
            continue
        if type(model) is not VisionBDHConfig:
            continue
        name = "vision_bdh_" + re.sub(r"[^0-9A-Za-z_]+", "_", name)
        if name in default_cfgs and default_cfgs[name].default.file != str(folder / EXPORTED):
            warnings.warn(f"{folder} is not registered: there is a {name} already, rename the run", stacklevel=2)
            continue
        names.append(name)
        _register(name, model, folder / EXPORTED)
    return names


for variant in UNTRAINED:
    _register(f"vision_bdh_{variant}", getattr(vision_bdh, f"{variant}_config")())
register_pretrained()
