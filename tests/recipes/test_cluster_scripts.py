"""The scripts for SLURM and Ray jobs, run with stand-ins for a cluster's programs that write down their calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dare.core.recipe import load_recipe

CLUSTER = Path(__file__).parents[2] / "recipes" / "cluster"
RECIPE = CLUSTER / "llada_8b_rl.yaml"


def run(script: str, tmp_path: Path, nodes: list[str]) -> list[str]:
    """Lines of all calls, in order."""
    log = tmp_path / "calls"
    for name in ("srun", "ray", "dare", "scontrol"):
        answer = "\n".join(nodes) if name == "scontrol" else ""
        wait = "exec sleep 60" if name == "srun" else "exit 0"
        stand_in = tmp_path / name
        stand_in.write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n[ -z "{answer}" ] || echo "{answer}"\n{wait}\n')
        stand_in.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_ID": "4711",
        "SLURM_GPUS_ON_NODE": "8",
        "DARE_HEAD_SECONDS": "0.2",
        "DARE_NODES_SECONDS": "0.2",
    }
    command = ["bash", str(CLUSTER / script), str(RECIPE), "/shared/run", "train.steps=3"]
    subprocess.run(command, check=True, env=environment, timeout=30, cwd=tmp_path)
    return log.read_text().splitlines()


def overrides(line: str) -> list[str]:
    return [word for word in line.split() if "=" in word and not word.startswith("--")]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("nodes", [["n1"], ["n1", "n2"]])
def test_slurm_starts_one_ray_over_all_nodes(tmp_path: Path, nodes: list[str]) -> None:
    calls = run("slurm.sh", tmp_path, nodes)
    starts = [call for call in calls if call.startswith("srun")]
    assert len(starts) == len(nodes)
    assert "--nodelist=n1 ray start --head --port=24711" in starts[0]
    assert all("--nodes=1" in start and "--block" in start for start in starts)
    if len(nodes) > 1:
        assert "--exclude=n1 ray start --address=n1:24711" in starts[1]
    (train,) = [call for call in calls if call.startswith("dare")]
    assert train.startswith(f"dare train {RECIPE} --out /shared/run --resume ")
    options = load_recipe(RECIPE, overrides(train)).executor.build().options
    assert (options.num_workers, options.address, options.fsdp_size) == (8 * len(nodes), "n1:24711", 8)
    assert load_recipe(RECIPE, overrides(train)).train.steps == 3


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_a_ray_job_joins_the_cluster_that_runs_it(tmp_path: Path) -> None:
    (call,) = run("ray_job.sh", tmp_path, ["n1"])
    submit, _, train = call.partition(" -- ")
    assert submit == "ray job submit --working-dir ."
    assert train.startswith(f"dare train {RECIPE} --out /shared/run --resume ")
    assert load_recipe(RECIPE, overrides(train)).executor.build().options.address == "auto"
