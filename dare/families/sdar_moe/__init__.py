"""SDAR 30B-A3B (Cheng et al. 2025): SDAR whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

from dare.families.base import FamilyType
from dare.families.sdar_moe.config import ARCHITECTURE, family_spec, is_sdar_moe, new_config, read_shapes
from dare.families.sdar_moe.network import SDARMoENetwork

SDAR_MOE = FamilyType(
    name="sdar_moe",
    architecture=ARCHITECTURE,
    matches=is_sdar_moe,
    spec=family_spec,
    build=lambda config: SDARMoENetwork(*read_shapes(config)),
    tiny_config=new_config,
)
