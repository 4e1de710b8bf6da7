"""`dare serve` as a process: it says where it listens, answers, and ends with 0 when it is told to stop."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dare.cli import app

ROOT = Path(__file__).parents[2]


def test_a_signal_ends_the_server_with_zero(tiny_checkpoints: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "dare.cli", "serve", str(tiny_checkpoints["sdar"]), "gen_length=8", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/"
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("sdar: http://127.0.0.1:"), line
    connection = http.client.HTTPConnection("127.0.0.1", int(line.split(":")[3].split()[0]), timeout=30)
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "1+1"}), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "ended\n")
    assert "/v1/completions 200 in 17" in err
    assert "1+1" not in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "API key is required"),
        (["--limit", "max_token=3"], "did you mean 'max_tokens'"),
        (["gen_lenght=8"], "did you mean 'gen_length'"),
        (["gen_length=90", "--limit", "max_tokens=64"], "longer by default"),
        (["--api-key-env", "NOT_SET_ANYWHERE"], "no API key"),
    ],
)
def test_mistakes_are_said_before_anything_is_served(
    words: list[str], message: str, tiny_checkpoints: dict[str, Path]
) -> None:
    result = CliRunner().invoke(app, ["serve", str(tiny_checkpoints["llada"]), "--port", "0", *words])
    assert result.exit_code == 2
    assert message in result.output
