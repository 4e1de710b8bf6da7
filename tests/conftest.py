"""Tiny real models, made once per session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dare.core.files import whole_directory
from dare.families.base import Family
from dare.families.weights import create_family, save_family

torch.set_num_threads(1)
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ+-*/()=>. "


def tiny_family(name: str, *, seed: int = 0, vocab_size: int = 24) -> Family:
    """A random model of `name` with special ids at the end of its vocabulary."""
    return create_family(
        name,
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=48,
        max_length=96,
        block_length=4,
        tie_embeddings=False,
        mask_id=vocab_size - 1,
        eos_id=vocab_size - 2,
        pad_id=vocab_size - 3,
        seed=seed,
    )


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    return {name: tiny_family(name) for name in ("llada", "sdar")}


def save_checkpoint(path: Path, name: str, tokenizer: Any, *, seed: int = 0, **sizes: int) -> Path:
    """A random checkpoint of `name` for a tokenizer in the new folder `path`, which is returned."""
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_size": 48, "max_length": 96}
    family = create_family(
        name,
        vocab_size=len(tokenizer),
        block_length=4,
        mask_id=tokenizer.mask_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        seed=seed,
        **{**shape, **sizes},
    )
    with whole_directory(path) as temporary:
        save_family(family, temporary)
        tokenizer.save_pretrained(temporary)
    return path


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints with a character tokenizer, by family."""
    from dare.families.tokenizer import char_tokenizer

    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(root / name, name, char_tokenizer(ALPHABET)) for name in ("llada", "sdar")}
