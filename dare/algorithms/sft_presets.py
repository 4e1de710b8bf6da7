"""What a supervised objective is made of, and the published ones by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dare.diffusion.supervised import Noise

Norm = Literal["sequence", "token", "batch", "masked", "view", "constant"]
PresetName = Literal["llada", "d1", "mdlm", "dream", "bd3lm", "sdar", "llada2", "llada2_edit", "dllm_rl", "nemo"]


@dataclass(frozen=True)
class Objective:
    """A supervised objective, every setting decided; `SFTOptions` explains them."""

    noise: Noise = field(default_factory=Noise)
    norm: Norm = "sequence"
    norm_length: int | None = None
    focal_gamma: float | None = None
    focal_alpha: float = 0.25
    confidence_weight: float = 0.0
    draft_turns: int = 0
    block_schedule: tuple[tuple[float, int], ...] = ()


# Settings by the names of `SFTOptions`; what a row does not name is `Objective`'s default.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llada": {},
    "d1": {"norm": "token"},
    "mdlm": {"norm": "token"},
    "dream": {"weight": "cart", "cart_p": 0.1, "norm": "masked"},
    "bd3lm": {"time_per": "block", "time_spread": "blocks", "norm": "token"},
    "sdar": {"time_per": "sample", "norm": "token"},
    "llada2": {
        "weight": "uniform",
        "time_per": "sample",
        "t_min": 0.3,
        "t_max": 0.8,
        "views_per_sample": 2,
        "is_complementary": True,
        "norm": "masked",
    },
    "llada2_edit": {
        "weight": "uniform",
        "time_per": "sample",
        "t_min": 0.3,
        "t_max": 0.8,
        "norm": "token",
        "edit_rate": 0.1,
        "draft_turns": 1,
    },
    "dllm_rl": {"weight": "uniform", "time_per": "sample", "t_min": 0.1, "t_max": 0.9, "norm": "view"},
    "nemo": {"num_masked": "rounded", "norm": "token"},
}
