"""Tiny real models that read printable ASCII, and a data folder with a few rows of every benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dare.families.tokenizer import char_tokenizer
from tests.conftest import save_checkpoint

ASCII = "".join(map(chr, range(32, 127))) + "\n"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

HUMANEVAL = {
    "task_id": "X/0",
    "prompt": 'def helper(x):\n    return x + 1\n\n\ndef double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(helper(0)) == 2\n",
}
MBPP = {
    "text": "Write a function to add.",
    "code": "def add(a, b):\r\n  return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
    "test_setup_code": "",
}
CHOICE_ROWS: dict[str, dict[str, Any]] = {
    "mmlu": {"question": "1+1?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "sums"},
    "mmlu_pro": {"question": "1+1?", "options": ["1", "2", "3"], "answer": "B", "answer_index": 1, "category": "math"},
    "hellaswag": {"activity_label": "Run", "ctx": "He runs and", "endings": ["falls.", "flies.", "a"], "label": "0"},
    "arc_c": {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
    "gpqa": {"Question": "Why?", "Correct Answer": "so", "Incorrect Answer 1": "a", "Incorrect Answer 2": "b",
             "Incorrect Answer 3": "c"},
    "piqa": {"goal": "Open it", "sol1": "pull", "sol2": "sing", "label": 0},
    "winogrande": {"sentence": "The cup is in the box as _ is big.", "option1": "cup", "option2": "box", "answer": "2"},
}  # fmt: skip
SPLITS = {"hellaswag": "validation", "piqa": "validation", "winogrande": "validation", "gpqa": "train"}
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "gsm8k": ("test", [{"question": f"What is {n} plus 2?", "answer": f"{n} + 2.\n#### {n + 2}"} for n in range(9)]),
    "math": ("test", [{"problem": "Half of 1?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "type": "Algebra"}]),
    "math500": ("test", [{"problem": "Half of 1?", "solution": "x", "answer": "\\frac{1}{2}", "subject": "Algebra"}]),
    "aime24": ("test", [{"problem": "?", "solution": "\\boxed{204}"}]),
    "aime25": ("test", [{"problem": "?", "answer": "70"}]),
    "olympiadbench": ("train", [{"question": "?", "final_answer": ["$\\sqrt{2}$"], "solution": ["x"]}]),
    **{name: (SPLITS.get(name, "test"), [row]) for name, row in CHOICE_ROWS.items()},
    "humaneval": ("test", [HUMANEVAL]),
    "mbpp": ("test", [MBPP]),
    "mbpp_sanitized": ("test", [{**MBPP, "prompt": "Add.", "test_imports": []}]),
    "ifeval": ("train", [{"prompt": "Say no comma.", "instruction_id_list": ["punctuation:no_comma"],
                          "kwargs": [{}]}]),
    "countdown": ("test", [{"input": "2,3,7", "output": "20"}]),
    "sudoku": ("test", [{"Puzzle": "0234341221434321", "Solution": "1234341221434321"}]),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder, and DARE_DATA pointing to it."""
    root = tmp_path / "data"
    for name, (split, rows) in ROWS.items():
        (root / name).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / name / f"{split}.jsonl").write_text(text)
    (root / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["gsm8k"][1][:3]))
    monkeypatch.setenv("DARE_DATA", str(root))
    return root


@pytest.fixture(scope="session")
def ascii_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints by family; SDAR's has a chat template."""
    found = {}
    for name in ("llada", "sdar"):
        tokenizer = char_tokenizer(ASCII)
        if name == "sdar":
            tokenizer.chat_template = TEMPLATE
        sizes = {"hidden_size": 16, "num_heads": 2, "mlp_size": 24, "max_length": 1024}
        path = tmp_path_factory.mktemp("ascii") / name
        found[name] = save_checkpoint(path, name, tokenizer, seed=1, **sizes)
    return found
