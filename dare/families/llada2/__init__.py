"""LLaDA2.0 and LLaDA2.1, mini 16B and flash 100B (Bie et al. 2025): block diffusion with experts."""

from __future__ import annotations

from dare.families.base import FamilyType
from dare.families.llada2.config import ARCHITECTURE, family_spec, is_llada2, new_config, read_shapes
from dare.families.llada2.network import LLaDA2Network

LLADA2 = FamilyType(
    name="llada2",
    architecture=ARCHITECTURE,
    matches=is_llada2,
    spec=family_spec,
    build=lambda config: LLaDA2Network(*read_shapes(config)),
    tiny_config=new_config,
)
