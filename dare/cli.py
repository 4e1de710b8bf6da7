"""The `dare` command. Every body imports what it needs when it runs, so help, list, check and show stay instant."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dare.cli_average import average
from dare.cli_bench import bench_app
from dare.cli_bulk import bulk_generate
from dare.cli_compare import compare
from dare.cli_data import data_app
from dare.cli_eval import data_fetch, data_path, eval_app
from dare.cli_export import export
from dare.cli_models import chat, convert
from dare.cli_options import (
    Base,
    Checkpoint,
    DecodeOptions,
    Device,
    Dtype,
    Overrides,
    RecipeFile,
    load_model,
    token_text,
)
from dare.cli_plan import plan
from dare.cli_remote import rollout_server
from dare.cli_seeing import view, watch
from dare.cli_serve import serve
from dare.core.errors import DareError, Interrupted
from dare.core.faults import explain_fault
from dare.core.secrets import hide_secrets

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns a user's mistake into a message and an exit code instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DareError as error:
            _fail(str(error))
            raise typer.Exit(EXIT_USER_ERROR) from error
        except (OSError, MemoryError, RuntimeError) as error:
            fault = explain_fault(error)
            if fault is None:
                raise
            _fail(str(fault))
            raise typer.Exit(EXIT_USER_ERROR) from error
        except KeyboardInterrupt as error:
            text = str(error)
            typer.secho(f"interrupted{': ' if text else ''}{text}", fg="yellow", err=True)
            code = 128 + error.signum if isinstance(error, Interrupted) else EXIT_INTERRUPTED
            raise typer.Exit(code) from error


class _ResumingCommand(TyperCommand):
    """`--resume` may be followed by the word auto; any other word after it is an argument, as it always was."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spelt: list[str] = []
        for word in args:
            if word == "auto" and spelt[-1:] == ["--resume"]:
                word = "--resume-auto"
            spelt += ["--resume", "--resume-auto"] if word == "--resume=auto" else [word]
        return super().parse_args(ctx, spelt)


app = typer.Typer(
    name="dare",
    cls=_Group,
    help="Post-train and evaluate diffusion language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")


def main() -> None:
    """The entry point of the console script."""
    app()


@app.command(cls=_ResumingCommand, short_help="Train as a recipe says.")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    *,
    out: Annotated[Path | None, typer.Option(help="run folder; default: runs/NAME of the recipe")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            help="continue the run in --out from its last checkpoint, if there is a run; --resume auto: from the last "
            "whole one, passing over damaged ones"
        ),
    ] = False,
    is_damage_skipped: Annotated[bool, typer.Option("--resume-auto", hidden=True)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="show nothing; the logs are written anyway")] = False,
) -> None:
    """Train: supervised fine-tuning or reinforcement learning, as the recipe says.

    SIGINT (Ctrl-C) and SIGTERM save the last whole step and end; a second one ends at once. Exit codes: 0 finished,
    2 a mistake or a fault that the message explains, 75 hung, 130 and 143 stopped by SIGINT and SIGTERM.

    \b
    Examples:
      dare train recipes/tiny/llada_rl.yaml train.steps=50 decode.temperature=0.7 --out runs/rl
      dare train recipes/tiny/llada_rl.yaml train.steps=50 decode.temperature=0.7 --out runs/rl --resume auto
    """
    from dare.core.checks import check as check_recipe
    from dare.core.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    check_recipe(resolved)  # before torch is loaded: mistakes are reported at once
    from dare import api
    from dare.terminal.progress import ConsoleReporter, NullReporter

    reporter = NullReporter() if quiet else ConsoleReporter()
    try:
        api.train(
            resolved,
            out or Path("runs") / resolved.name,
            is_resumed=resume or is_damage_skipped,
            is_damage_skipped=is_damage_skipped,
            reporter=reporter,
        )
    except KeyboardInterrupt as error:
        told = f"{error}; " if str(error) else ""
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        advice = "the same command with --resume continues from the last checkpoint"
        raise Interrupted(signum, told + advice) from error


app.add_typer(eval_app, name="eval")


@app.command(short_help="Complete prompts; --trace shows how.")
def generate(
    checkpoint: Checkpoint,
    overrides: DecodeOptions = None,
    *,
    prompt: Annotated[list[str] | None, typer.Option(help="text; repeatable")] = None,
    prompt_ids: Annotated[list[str] | None, typer.Option(help='token ids, "1,2,3"; repeatable')] = None,
    file: Annotated[Path | None, typer.Option(help='JSON lines: {"prompt": ...} or {"prompt_ids": [...]}')] = None,
    out: Annotated[Path | None, typer.Option(help="with --file: JSON lines to write; resumes what is there")] = None,
    is_chat: Annotated[bool, typer.Option("--chat", help="send text as a user message")] = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    is_traced: Annotated[bool, typer.Option("--trace", help="show the canvas filling, step by step")] = False,
    save_trace: Annotated[Path | None, typer.Option(help="file for `dare view`: every step with its choices")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="one JSON object per completion")] = False,
    base: Base = None,
    device: Device = "auto",
    dtype: Dtype = "checkpoint",
) -> None:
    """Generate: one completion per prompt, greedy unless temperature says otherwise.

    Without options, a checkpoint of a run decodes as that run is evaluated. With --out every completion is written as
    soon as it is there; the same command continues a run that was stopped or killed.

    \b
    Examples:
      dare generate runs/rl --prompt "3 5 7>22=" gen_length=16 --trace
      dare generate GSAI-ML/LLaDA-8B-Instruct --chat --prompt "Who are you?" gen_length=64 block_length=32
      dare generate runs/rl --file prompts.jsonl temperature=1.0 --seed 1 --json
      dare generate runs/rl --prompt "3 5 7>22=" --save-trace trace.safetensors
      dare generate runs/rl --file prompts.jsonl --out completions.jsonl temperature=1.0
    """
    from dare.terminal.settings import generation_options, read_prompts

    if out is not None:
        if file is None or prompt or prompt_ids or is_traced:
            raise DareError("--out writes the completions of a file", where="--out", fix="give --file and no prompts")
        bulk_generate(checkpoint, file, out, overrides or [], is_chat=is_chat, seed=seed, device=device, dtype=dtype)
        return
    prompts = read_prompts(prompt or [], prompt_ids or [], file, is_chat=is_chat)
    decode = generation_options(checkpoint, overrides or [])
    model = load_model(checkpoint, device, dtype, base)
    from dare.terminal.canvas import CanvasView
    from dare.terminal.completions import print_completions
    from dare.terminal.progress import progress_bar

    spec = model.family.spec
    if is_traced:
        with CanvasView(token_text(model.tokenizer), spec.mask_id, spec.eos_ids) as view:
            completions = model.generate(prompts, seed=seed, on_step=view.on_step, trace_file=save_trace, **decode)
    else:
        with progress_bar("denoising") as on_progress:
            completions = model.generate(prompts, seed=seed, on_progress=on_progress, trace_file=save_trace, **decode)
    print_completions(prompts, completions, is_json=is_json)


app.command(short_help="Talk to a model; its canvas streams.")(chat)
app.command(short_help="Make a diffusion model of an autoregressive one.")(convert)
app.command(short_help="Memory and speed of a recipe, before it runs.")(plan)
app.command(short_help="Average the weights of several checkpoints.")(average)
app.command(short_help="Merge an adapter, and write a model to publish.")(export)
app.command(short_help="Compare algorithms under one budget.")(compare)
app.command(short_help="Look at a trace: every step, and why.")(view)
app.command("rollout-server", short_help="Serve a model to training runs, as SGLang or LMDeploy would.")(rollout_server)
app.command(short_help="Serve the report of a run, live while it trains.")(watch)
app.command(short_help="Serve a model over HTTP, in the shape of the OpenAI API.")(serve)


@app.command(short_help="Check recipes without running them.")
def check(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="recipes, YAML", show_default=False)],
) -> None:
    """Check recipes without running them: unknown keys, impossible pairs, doubtful settings.

    \b
    Example:
      dare check recipes/tiny/*.yaml
    """
    from dare.core.checks import check as check_recipe
    from dare.core.recipe import load_recipe

    num_wrong = 0
    for path in recipes:
        try:
            warnings = check_recipe(load_recipe(path))
        except DareError as error:
            num_wrong += 1
            _fail(f"{path}: {error}")
            continue
        typer.secho(f"{path}: ok", fg="green")
        for warning in warnings:
            typer.secho(f"  warning: {warning}", fg="yellow")
    if num_wrong:
        raise typer.Exit(EXIT_USER_ERROR)


@app.command(short_help="Show a resolved recipe, or every key.")
def show(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="a recipe, YAML", show_default=False)] = None,
    overrides: Overrides = None,
    *,
    is_schema: Annotated[bool, typer.Option("--schema", help="every key with its type, default and meaning")] = False,
) -> None:
    """Show a resolved recipe as YAML, or every key that a recipe may have.

    \b
    Examples:
      dare show recipes/tiny/llada_rl.yaml train.steps=50
      dare show --schema
    """
    if is_schema:
        from dare.terminal.schema import schema_text

        typer.echo(schema_text())
        return
    if recipe is None:
        raise DareError("nothing to show", fix="give a recipe, or --schema")
    from dare.core.recipe import load_recipe

    typer.echo(load_recipe(recipe, overrides or []).dump_yaml(), nl=False)


@app.command("list", short_help="List algorithms, families, tasks, executors, recipes.")
def list_tables(
    table: Annotated[str | None, typer.Argument(help="one table; default: all", show_default=False)] = None,
) -> None:
    """List algorithms, families, tasks, executors and recipes.

    \b
    Example:
      dare list algorithms
    """
    from dare.terminal.listing import listing

    typer.echo(listing(table))


data_app.command("path", short_help="Where benchmark data lies, and what is missing.")(data_path)
data_app.command("fetch", short_help="Download the data of a benchmark.")(data_fetch)


@app.command(short_help="Write a report of a run as HTML, PNG, SVG and Markdown.")
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run folder", show_default=False)],
    *,
    out: Annotated[Path | None, typer.Option(help="folder to write; default: RUN_DIR/report")] = None,
    baseline: Annotated[Path | None, typer.Option(help="run folder to compare with")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="reference curve; default: the one shipped for the recipe")
    ] = None,
) -> None:
    """Write a report of a run, finished or not: one HTML page, curves as PNG and SVG, a table in Markdown.

    The page says in plain words what stands out, shows every recorded sample with the order of its tokens, and holds
    the run against the reference curve of its recipe, if one is shipped.

    \b
    Example:
      dare report runs/rl --baseline runs/sft --out runs/report
    """
    from dare.report.build import build_report

    typer.echo(build_report(run_dir, out or run_dir / "report", baseline, reference) / "index.html")


def _fail(text: str) -> None:
    first, _, rest = hide_secrets(text).partition("\n")
    typer.secho(f"error: {first}", fg="red", bold=True, err=True)
    if rest:
        typer.secho(rest, fg="red", err=True)


if __name__ == "__main__":
    main()
