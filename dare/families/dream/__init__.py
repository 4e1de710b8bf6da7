"""Dream 7B, DiffuCoder and Dream-Coder (Ye et al. 2025; Gong et al. 2025): masked, full attention, shifted logits."""

from __future__ import annotations

from dare.families.base import Adoption, FamilyType
from dare.families.dream.config import ARCHITECTURE, family_spec, is_dream, new_config, read_shape
from dare.families.dream.network import DreamNetwork

DREAM = FamilyType(
    name="dream",
    architecture=ARCHITECTURE,
    matches=is_dream,
    spec=family_spec,
    build=lambda config: DreamNetwork(read_shape(config)),
    tiny_config=new_config,
    adopts={"qwen2": Adoption(), "llama": Adoption(zeros=("q_proj.bias", "k_proj.bias", "v_proj.bias"))},
)
