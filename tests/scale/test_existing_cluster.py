"""The command that cluster scripts run joins a Ray that is there already, and leaves it running."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from dare.families.tokenizer import char_tokenizer
from tests.conftest import ALPHABET, save_checkpoint
from tests.scale.conftest import ROOT
from tests.scale.test_workers import recipe_of


def test_the_command_joins_a_cluster(cluster: None, tmp_path: Path) -> None:
    import ray

    checkpoint = save_checkpoint(tmp_path / "base", "llada", char_tokenizer(ALPHABET))
    recipe = recipe_of(checkpoint, "sft", "verl", steps=2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "dare.cli", "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    overrides = ["--resume", "executor.num_workers=1", f"executor.address={address}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *overrides], cwd=tmp_path, env=environment, check=False, timeout=400, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert ray.is_initialized()
    assert ray.get(ray.put(1)) == 1
