"""The report page of a run that is still being written, served on loopback."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dare.core.errors import DareError
from dare.report.build import live_page

HOST = "127.0.0.1"
_WATCHED = ("recipe.yaml", "run.json", "metrics.jsonl", "timing.jsonl", "eval.jsonl", "samples.jsonl")
_WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<title>waiting</title><p>There is no run here yet. This page asks again every two seconds.</p></html>"""


def make_server(run_dir: Path, port: int, baseline: Path | None = None) -> ThreadingHTTPServer:
    """A server bound to 127.0.0.1 that shows `run_dir` as it is at every request; port 0 takes a free one.

    It answers "/" with the page and "/version" with a number that changes whenever the run's files do. Nothing else is
    served, and requests under another host name are refused. Raises DareError if the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
            if host not in (HOST, "localhost"):
                self._answer(403, "text/plain", "only on this machine")
            elif self.path == "/version":
                self._answer(200, "text/plain", version(run_dir))
            elif self.path == "/":
                self._answer(*_page(run_dir, baseline))
            else:
                self._answer(404, "text/plain", "not found")

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Nothing: the terminal belongs to whoever watches."""

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise DareError(
            "cannot serve the page", where=f"{HOST}:{port}", got=str(error), fix="choose another --port, or 0"
        ) from None


def version(run_dir: Path) -> str:
    """Sizes and times of the run's files: different text whenever one of them has changed."""
    found = []
    for name in _WATCHED:
        path = run_dir / name
        if path.is_file():
            status = path.stat()
            found.append(f"{status.st_size}.{status.st_mtime_ns}")
    return " ".join(found)


def _page(run_dir: Path, baseline: Path | None) -> tuple[int, str, str]:
    """Status, kind and text of what there is to show."""
    if not (run_dir / "recipe.yaml").exists():
        return 200, "text/html", _WAITING
    try:
        return 200, "text/html", live_page(run_dir, baseline)
    except DareError as error:
        return 503, "text/plain", str(error)
