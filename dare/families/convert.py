"""An autoregressive checkpoint turned into a diffusion model that can be trained on, the way Dream and SDAR were made.

What happens to it, and nothing else:

    mask token        added to the tokenizer; its row of the embedding (and of an untied head) is the mean of the others
    attention mask    causal becomes the family's: full, or block-causal
    shift             logits at position i scored token i + 1. A shifted family (Dream) keeps that; in any other the
                      network must learn to score token i, so it says little that makes sense before it is trained

Under a causal mask the new network computes exactly what the old one did.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dare.core.errors import DareError
from dare.core.registry import FAMILIES, resolve
from dare.families.base import Adoption, Family, FamilyType
from dare.families.causal import TOKEN_ROWS, CausalCheckpoint, read_causal
from dare.families.config import Config, ModelSizes
from dare.families.network import Network

Shift = Literal["keep", "drop"]
DEFAULT_MASK_TOKEN = "<|mask|>"


def convert_causal(
    source: str | Path,
    to: str,
    *,
    shift: Shift | None = None,
    mask_token: str = DEFAULT_MASK_TOKEN,
    block_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Family, Any]:
    """The family `to` with the weights of an autoregressive checkpoint, and the tokenizer with a mask token.

    source        folder or hub id of safetensors in the Llama, Qwen2 or Qwen3 layout, or a GGUF file
    shift         keep or drop, to be explicit; None takes what the family does
    mask_token    added unless the tokenizer has a mask token already
    block_length  the grid to train block models on; a default for the others; None: the family's
    dtype         None: that of the checkpoint; float32 for GGUF

    Raises DareError for a layout that does not fit the family (it says which do), or a shift that the family does
    not have.
    """
    family_type: FamilyType = resolve("families", to, where="to")
    checkpoint = read_causal(source)
    adoption = _adoption(family_type, checkpoint, str(source))
    tokenizer, mask_id = _with_mask_token(checkpoint.tokenizer, mask_token)
    config, generation_config = _new_config(family_type, checkpoint, tokenizer, mask_id, block_length)
    spec = family_type.spec(config, generation_config)
    _check_shift(shift, spec.is_shifted, to)
    with torch.device("meta"):
        network = family_type.build(config)
    _check_head_dim(network, checkpoint, to)
    network.to(dtype=dtype or checkpoint.dtype).to_empty(device="cpu")
    _fill(network, checkpoint, adoption, len(checkpoint.tokenizer), mask_id, str(source))
    return Family(spec, network, config, generation_config), tokenizer


def _adoption(family_type: FamilyType, checkpoint: CausalCheckpoint, source: str) -> Adoption:
    found = family_type.adopts.get(checkpoint.layout)
    if found is not None:
        return found
    fitting = [name for name in FAMILIES if checkpoint.layout in resolve("families", name).adopts]
    raise DareError(
        f"a {checkpoint.layout} checkpoint computes something that {family_type.name} does not",
        where=source,
        expected=f"a checkpoint of {' or '.join(family_type.adopts) or 'no autoregressive layout'}",
        fix=f"convert it to {' or '.join(fitting)}",
    )


def _check_shift(shift: Shift | None, is_shifted: bool, to: str) -> None:
    if shift is None or (shift == "keep") == is_shifted:
        return
    fitting = [name for name in FAMILIES if resolve("families", name).adopts]
    raise DareError(
        f"{to} {'keeps' if is_shifted else 'drops'} the shift: its logits at position i score token "
        f"{'i + 1' if is_shifted else 'i'}",
        where="shift",
        got=shift,
        fix=f"remove the option, or choose another of {', '.join(fitting)}",
    )


def _check_head_dim(network: Network, checkpoint: CausalCheckpoint, to: str) -> None:
    head_dim = checkpoint.sizes.head_dim
    if network.head_dim != head_dim:
        raise DareError(
            f"{to} has heads of hidden_size / num_attention_heads dimensions only",
            where="config.json, head_dim",
            got=head_dim,
            expected=network.head_dim,
        )


def _with_mask_token(tokenizer: Any, mask_token: str) -> tuple[Any, int]:
    """The tokenizer with a mask token and a padding token, and the id of the former."""
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.mask_token is None:
        if tokenizer.get_vocab().get(mask_token) is not None:
            raise DareError(
                "the vocabulary has this token already", where="mask_token", got=mask_token, fix="choose another name"
            )
        tokenizer.add_special_tokens({"mask_token": mask_token})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, int(tokenizer.mask_token_id)


def _new_config(
    family_type: FamilyType, checkpoint: CausalCheckpoint, tokenizer: Any, mask_id: int, block_length: int | None
) -> tuple[Config, Config | None]:
    sizes, eos = checkpoint.sizes, _eos_ids(checkpoint)
    config = family_type.tiny_config(
        ModelSizes(
            vocab_size=max(sizes.vocab_size, mask_id + 1),
            hidden_size=sizes.hidden_size,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            num_kv_heads=sizes.num_kv_heads,
            mlp_size=sizes.mlp_size,
            max_length=sizes.max_length,
            mask_id=mask_id,
            eos_id=eos[0],
            pad_id=eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            block_length=block_length,
            tie_embeddings=sizes.is_tied,
            head_dim=sizes.head_dim,
            rope_theta=sizes.rope_theta,
            norm_eps=sizes.norm_eps,
        )
    )
    generation_config = checkpoint.generation_config
    if len(eos) > 1:
        generation_config = {**(generation_config or {}), "eos_token_id": eos}
    return config, generation_config


def _eos_ids(checkpoint: CausalCheckpoint) -> list[int]:
    """Every token that ends something: the tokenizer's own first, which ends a chat turn in chat models."""
    found = [checkpoint.tokenizer.eos_token_id]
    for config in (checkpoint.config, checkpoint.generation_config or {}):
        value = config.get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    eos = list(dict.fromkeys(token for token in found if isinstance(token, int)))
    if not eos:
        raise DareError("neither the tokenizer nor the config names an EOS token", where="config.json, eos_token_id")
    return eos


def _fill(
    network: Network, checkpoint: CausalCheckpoint, adoption: Adoption, num_tokens: int, mask_id: int, source: str
) -> None:
    """Copy every tensor; each of the network's is written once, and each of the checkpoint's is used."""
    target = network.state_dict()  # shares memory with the parameters
    missing = {name for name in target if not name.endswith(adoption.zeros or ("\0",))}
    for name in target.keys() - missing:
        target[name].zero_()
    for theirs, tensor in checkpoint.tensors():
        name = adoption.rename(theirs)
        if name not in missing:
            raise DareError("the checkpoint holds a tensor that its layout does not have", where=source, got=theirs)
        missing.discard(name)
        expected = target[name].shape
        if theirs in TOKEN_ROWS:
            expected = torch.Size((checkpoint.sizes.vocab_size, *expected[1:]))
        if tensor.shape != expected:
            raise DareError(
                f"the tensor {theirs} has another shape than the config says",
                where=source,
                got=list(tensor.shape),
                expected=list(expected),
            )
        if theirs in TOKEN_ROWS:
            _copy_rows(target[name], tensor, num_tokens, mask_id)
        else:
            target[name].copy_(tensor)
    if missing:
        raise DareError("the checkpoint lacks tensors", where=source, got=", ".join(sorted(missing)[:5]))


def _copy_rows(target_VD: Tensor, source_VD: Tensor, num_tokens: int, mask_id: int) -> None:
    """The rows that there are; new ones and the mask token's get the mean of those that belong to a token.

    Rows beyond the tokenizer (padding of the published checkpoint) were never trained, so the mask token may take one.
    """
    num_rows = len(source_VD)
    target_VD[:num_rows].copy_(source_VD)
    mean_D = source_VD[:num_tokens].float().mean(0).to(target_VD.dtype)
    target_VD[num_rows:] = mean_D
    if mask_id >= num_tokens:
        target_VD[mask_id] = mean_D
