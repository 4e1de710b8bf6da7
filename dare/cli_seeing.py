"""The verbs `dare view` and `dare watch`; their bodies import what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dare.core.errors import DareError


def view(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE [TRACE]", help="one trace file, or two side by side")],
    *,
    step: Annotated[int | None, typer.Option(min=0, help="show the canvas after this step, and its choices")] = None,
    row: Annotated[list[int] | None, typer.Option(min=1, help="rows to show, from 1; repeatable")] = None,
    is_playing: Annotated[bool, typer.Option("--play", help="animate all steps")] = False,
    html: Annotated[Path | None, typer.Option(help="write a page with a time slider instead")] = None,
) -> None:
    """View a trace: the canvas filling, step by step, and why each token was committed.

    On a terminal, arrow keys go through the steps; elsewhere all steps are printed. `dare generate --save-trace FILE`
    writes a trace, and so does training with log.traces=4 in the run's folder `traces`.

    \b
    Examples:
      dare view trace.safetensors --step 3
      dare view low_confidence.safetensors threshold.safetensors --html view.html
    """
    from dare.rollout.trace_file import load_trace

    if len(traces) > 2:
        raise DareError("the viewer shows one trace, or two side by side", got=f"{len(traces)} traces")
    files = [load_trace(path) for path in traces]
    rows = [index - 1 for index in row or []]
    if html is not None:
        from dare.report.trace_page import write_trace_page

        typer.echo(write_trace_page(files, html, rows))
        return
    import sys

    from dare.report.trace_terminal import TraceView
    from dare.terminal.keys import read_keys

    shown = TraceView(files, rows)
    shown.head()
    if step is not None:
        shown.print_step(step)
    elif is_playing or not (shown.console.is_terminal and sys.stdin.isatty()):
        shown.play()
    else:
        shown.interact(read_keys())


def watch(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run folder", show_default=False)],
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8765,
    baseline: Annotated[Path | None, typer.Option(help="run folder to compare with")] = None,
) -> None:
    """Watch a run: its report page on http://127.0.0.1, live while it trains. Ctrl-C ends it.

    \b
    Example:
      dare watch runs/rl
    """
    from dare.report.watch import make_server

    if baseline is not None and not baseline.is_dir():
        raise DareError("not a run folder", where=str(baseline))
    server = make_server(run_dir, port, baseline)
    typer.echo(f"http://127.0.0.1:{server.server_address[1]}/  (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        typer.echo("ended")
    finally:
        server.server_close()
