"""LLaDA-MoE 7B-A1B Base and Instruct (Zhu et al. 2025): a masked model with full attention and experts."""

from __future__ import annotations

from dare.families.base import FamilyType
from dare.families.llada_moe.config import ARCHITECTURE, family_spec, is_llada_moe, new_config, read_shapes
from dare.families.llada_moe.network import LLaDAMoENetwork

LLADA_MOE = FamilyType(
    name="llada_moe",
    architecture=ARCHITECTURE,
    matches=is_llada_moe,
    spec=family_spec,
    build=lambda config: LLaDAMoENetwork(*read_shapes(config)),
    tiny_config=new_config,
)
