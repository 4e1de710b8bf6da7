"""LLaDA 8B Base, Instruct and 1.5 (Nie et al. 2025): a masked model with full attention."""

from __future__ import annotations

from dare.families.base import Adoption, FamilyType
from dare.families.llada.config import ARCHITECTURE, family_spec, is_llada, new_config, read_shape
from dare.families.llada.network import LLaDANetwork, from_llama

LLADA = FamilyType(
    name="llada",
    architecture=ARCHITECTURE,
    matches=is_llada,
    spec=family_spec,
    build=lambda config: LLaDANetwork(read_shape(config)),
    tiny_config=new_config,
    adopts={"llama": Adoption(from_llama)},
)
