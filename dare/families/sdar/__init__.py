"""SDAR 1.7B, 4B, 8B and TraDo (Cheng et al. 2025): block diffusion with block-causal attention."""

from __future__ import annotations

from dare.families.base import Adoption, FamilyType
from dare.families.sdar.config import ARCHITECTURE, family_spec, is_sdar, new_config, read_shape
from dare.families.sdar.network import SDARNetwork

SDAR = FamilyType(
    name="sdar",
    architecture=ARCHITECTURE,
    matches=is_sdar,
    spec=family_spec,
    build=lambda config: SDARNetwork(read_shape(config)),
    tiny_config=new_config,
    adopts={"qwen3": Adoption()},
)
