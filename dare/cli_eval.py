"""The verbs `dare eval` and `dare data path | fetch`; like those of `dare.cli`, their bodies import what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dare.cli_backends import HarnessCall, print_result, run_harness
from dare.cli_options import Base, Checkpoint, DecodeOptions, Device, Dtype, load_model
from dare.core.errors import DareError

Harness = Annotated[
    str | None, typer.Option("--backend", help="lm-eval or opencompass around the model; default: our own evaluation")
]
WeakSandbox = Annotated[
    bool, typer.Option("--allow-weak-sandbox", help="run the model's programs without full isolation")
]


class _RunByDefault(TyperGroup):
    """`dare eval CHECKPOINT` is `dare eval run CHECKPOINT`; a folder named like a verb is written ./compare."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


eval_app = typer.Typer(
    cls=_RunByDefault, help="Evaluate: solve rates and benchmarks.", short_help="Solve rate on problems or benchmarks.",
    rich_markup_mode=None,
)  # fmt: skip


@eval_app.command("run", short_help="Evaluate a checkpoint; `dare eval CHECKPOINT` is short for this.")
def run(
    checkpoint: Checkpoint,
    overrides: DecodeOptions = None,
    *,
    preset: Annotated[str | None, typer.Option(help="table, paper or a YAML file: benchmarks and settings")] = None,
    tasks: Annotated[str | None, typer.Option(help="benchmarks, comma-separated; `dare data path` lists them")] = None,
    published: Annotated[str | None, typer.Option("--model", help="paper: the published model that this is")] = None,
    harness: Harness = None,
    shard: Annotated[str | None, typer.Option(help="only the documents of this part, such as 0/4")] = None,
    is_weak_allowed: WeakSandbox = False,
    task: Annotated[str | None, typer.Option(help="a task; default: the task of the recipe")] = None,
    recipe: Annotated[Path | None, typer.Option(help="task and decode options; default: the checkpoint's run")] = None,
    num: Annotated[int | None, typer.Option(min=1, help="held-out problems, or documents of each benchmark")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="for sampling; default: the recipe's, or 0")] = None,
    split: Annotated[str, typer.Option(help="eval or train; of a task")] = "eval",
    out: Annotated[Path | None, typer.Option(help="folder for results; benchmarks go on where they stopped")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
    base: Base = None,
    device: Device = "auto",
    dtype: Dtype = "checkpoint",
) -> None:
    """Evaluate: the solve rate on held-out problems of a task, or scores on benchmarks, with 95% intervals.

    Without --task, --recipe, --tasks and --preset, the settings are those of the run that the checkpoint belongs to.
    Keys that start with "task." are options of the task or benchmark (task.num_shots, task.method=likelihood), those
    with "likelihood." of the estimator, all others decode options.

    \b
    Examples:
      dare eval runs/rl
      dare eval runs/rl --task countdown --num 500 gen_length=16 task.max_value=9
      dare eval CHECKPOINT --backend lm-eval --tasks dare_gsm8k,my_task.yaml gen_length=256
      dare eval GSAI-ML/LLaDA-8B-Instruct --preset table --tasks gsm8k,humaneval --out results/llada
      dare eval compare results/llada results/sdar
    """
    choice = {"--preset": preset, "--tasks": tasks, "--model": published, "--shard": shard, "--backend": harness}
    if _is_benchmarks(choice, {"--task": task, "--recipe": recipe}):
        numbers = {"task.limit": num, "task.seed": seed}
        words = [*(overrides or []), *(f"{name}={value}" for name, value in numbers.items() if value is not None)]
        _run_benchmarks(checkpoint, words, choice, out, (device, dtype, base), is_weak_allowed, is_json)
        return
    from dare.terminal.settings import evaluation_settings

    settings = evaluation_settings(checkpoint, task, recipe, overrides or [])
    model = load_model(checkpoint, device, dtype, base)
    from dare import api
    from dare.terminal.progress import evaluation_line

    result = api.evaluate(
        model,
        settings.task,
        num=num or settings.num,
        seed=settings.seed if seed is None else seed,
        split=split,
        out=out,
        **settings.decode,
    )
    typer.echo(_to_json(result) if is_json else evaluation_line(None, result))


@eval_app.command("compare", short_help="What differs between two evaluations, and what the difference is worth.")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="folder of an evaluation", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help="folder of another", show_default=False)],
) -> None:
    """Compare two finished evaluations: differing settings first, then the paired difference with its significance.

    \b
    Example:
      dare eval compare results/before results/after
    """
    from dare.evals.compare import compare_text

    typer.echo(compare_text(first, second))


@eval_app.command("table", short_help="Several evaluations as one table.")
def table(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="evaluations", show_default=False)],
) -> None:
    """Put finished evaluations into one table; refused where the tasks are not the same.

    \b
    Example:
      dare eval table results/llada results/dream results/sdar
    """
    from dare.evals.compare import table_text

    typer.echo(table_text(folders), nl=False)


@eval_app.command("configs", short_help="The folder of configurations for OpenCompass's own command.")
def configs() -> None:
    """Print the folder that `opencompass --config-dir` takes: a model of ours and data sets.

    \b
    Example:
      DARE_CHECKPOINT=runs/rl opencompass --config-dir $(dare eval configs) --models dare_model --datasets gsm8k_dare
    """
    typer.echo(Path(__file__).parent / "harness" / "compass" / "configs")


def data_path() -> None:
    """List the benchmarks: the file of each, or the public data set to get and where to put it.

    \b
    Example:
      DARE_DATA=data dare data path
    """
    from dare.evals.benchmarks.rows import data_root
    from dare.evals.benchmarks.table import BENCHMARKS, find_benchmark

    typer.echo(f"data folder: {data_root()} (DARE_DATA)")
    for name in BENCHMARKS:
        benchmark = find_benchmark(name)
        try:
            place = str(benchmark.data_path())
        except DareError:
            place = f"missing: {name}/{benchmark.origin.split}.jsonl of {benchmark.origin.description}"
        typer.echo(f"{name:<15} {benchmark.summary:<55} {place}")


def data_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="benchmarks", show_default=False)],
) -> None:
    """Download the data of benchmarks from the Hugging Face hub into the data folder.

    \b
    Example:
      dare data fetch gsm8k arc_c
    """
    from dare.evals.benchmarks.rows import fetch
    from dare.evals.benchmarks.table import find_benchmark

    for benchmark in [find_benchmark(name) for name in names]:
        for origin in (benchmark.origin, benchmark.shot_origin):
            if origin is not None:
                typer.echo(str(fetch(benchmark.name, origin)))


def _is_benchmarks(of_benchmarks: dict[str, str | None], of_a_task: dict[str, object]) -> bool:
    """Which kind of evaluation is asked for; an option that would have no effect is a mistake."""
    is_benchmarks = of_benchmarks["--preset"] is not None or of_benchmarks["--tasks"] is not None
    idle = [name for name, value in (of_a_task if is_benchmarks else of_benchmarks).items() if value is not None]
    if idle:
        kind = "a task, not benchmarks" if is_benchmarks else "benchmarks, which --tasks or --preset name"
        raise DareError(
            f"{' and '.join(idle)} is for {kind}", fix="leave it out, or choose the other kind of evaluation"
        )
    return is_benchmarks


def _run_benchmarks(
    checkpoint: str,
    overrides: list[str],
    choice: dict[str, str | None],
    out: Path | None,
    place: tuple[str, str, str | None],
    is_weak_allowed: bool,
    is_json: bool,
) -> None:
    """`place`: device, dtype and base, as `load_model` takes them."""
    from dare.terminal.settings import parse_options

    options = parse_options(overrides)
    preset, shard = choice["--preset"], choice["--shard"]
    names = [name.strip() for name in (choice["--tasks"] or "").split(",") if name.strip()]
    harness = choice["--backend"]
    if harness is not None:
        if shard:
            raise DareError("a harness runs whole tasks", where="--shard", got=shard, fix="leave it out")
        call = HarnessCall(harness, checkpoint, names, preset, choice["--model"], options, out, place, is_weak_allowed)
        found = run_harness(call, None if is_json else print_result)
        if is_json:
            typer.echo(_to_json(found))
        return
    from dare.evals.suite import Shard

    part = Shard.parse(shard) if shard else None
    from dare.evals.remote import is_url

    model = checkpoint if is_url(checkpoint) else load_model(checkpoint, *place)
    from dare import api
    from dare.terminal.progress import benchmark_line, progress_bar

    with progress_bar("evaluating") as on_progress:
        results = api.evaluate_benchmarks(
            model,
            names,
            preset=preset,
            checkpoint=checkpoint,
            published=choice["--model"],
            out=out or Path("runs") / "eval" / f"{Path(checkpoint).name}-{Path(preset or 'tasks').stem}",
            overrides=options,
            shard=part,
            is_weak_sandbox_allowed=is_weak_allowed,
            on_progress=on_progress,
            on_result=None if is_json else lambda task, result: typer.echo(benchmark_line(task, result)),
        )
    if is_json:
        typer.echo(_to_json(results))


def _to_json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False, indent=2)
