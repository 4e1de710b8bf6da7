"""What is passed on to FSDP2 changes nothing but where numbers are kept: one worker in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dare.executors.local import LocalEngine
from dare.families.tokenizer import char_tokenizer
from tests.conftest import ALPHABET, save_checkpoint
from tests.scale.test_workers import check_updates, recipe_of

pytest.importorskip("verl", reason="needs the extra dare-dllm[verl]")

CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "packed": ("espo", {}, {"train": {"pack_length": 40}}),
    "few positions at a time": ("sft", {}, {"train": {"micro_batch_tokens": 25}}),
    "bfloat16": ({"name": "d1", "beta": 0.1}, {}, {"dtype": "bfloat16"}),
    "adapter in bfloat16": ("dpo", {}, {"dtype": "bfloat16", "lora": {"rank": 3}}),
    "recomputed": ("d1", {"reshard_after_forward": False}, {"train": {"recompute": "full"}}),
    "offloaded": ("d1", {"cpu_offload": True}, {"train": {"recompute": "selective"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_options_change_nothing(name: str, tmp_path: Path) -> None:
    algorithm, options, changes = CASES[name]
    tokenizer = char_tokenizer(ALPHABET)
    checkpoint = save_checkpoint(tmp_path / "base", "sdar_moe", tokenizer)
    executor = {"name": "verl", "in_process": True, **options}
    recipe = recipe_of(checkpoint, algorithm, executor, changes.get("lora"), **changes.get("train", {}))
    model = recipe.model.model_copy(update={"dtype": changes.get("dtype", "float32")})
    recipe = recipe.model_copy(update={"model": model})
    local = LocalEngine.create(recipe, tokenizer, needs_reference=True)
    engine: Any = recipe.executor.build().create(recipe, tokenizer, needs_reference=True, critic_lr=None)
    try:
        check_updates((local, engine), algorithm, tmp_path, num_files=2)
    finally:
        engine.close()
