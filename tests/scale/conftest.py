"""One small Ray cluster for all tests of this folder; without verl they are skipped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A cluster for these tests alone: logical CPUs for four workers, and a temporary folder of its own."""
    ray = pytest.importorskip("ray", reason="needs the extra dare-dllm[verl]")
    pytest.importorskip("verl", reason="needs the extra dare-dllm[verl]")
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves workers on a busy machine
    environment = {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        namespace="dare-tests",
        _temp_dir=tempfile.mkdtemp(prefix="dare-ray-"),
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()
