"""A DARE model in lm-eval: equal answers and scores, any batch size, chat templates, task files, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dare
from dare import api
from dare.core.errors import DareError
from dare.evals.presets import plan
from tests.backends.conftest import TASKS, Case

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra dare-dllm[lm-eval]")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dare.evals.benchmarks.table import find_benchmark  # noqa: E402
from dare.harness.lm_model import DareLM  # noqa: E402
from dare.harness.lm_run import run_lm_eval  # noqa: E402
from dare.harness.lm_tasks import benchmark_task  # noqa: E402
from dare.harness.planning import plan_tasks  # noqa: E402

MANAGER = TaskManager(include_defaults=False)


def ask(kind: str, *requests: tuple[Any, ...], document: int | None = None) -> list[Instance]:
    """Requests of documents 0, 1, ..., or all of one."""
    return [
        Instance(kind, {}, arguments, index, ("task", index if document is None else document, 1))
        for index, arguments in enumerate(requests)
    ]


@pytest.fixture
def model(case: Case) -> dare.Model:
    return dare.load(case.checkpoint)


@pytest.mark.parametrize(("task", "batch_size"), [("gsm8k", 1), ("gsm8k", 5), ("arc_c", 1), ("winogrande", 7)])
def test_answers_and_scores_are_those_of_the_native_evaluation(
    task: str, batch_size: int, case: Case, model: dare.Model, data: Path
) -> None:
    [planned] = plan(None, [task], family=case.family, checkpoint="", overrides=case.options(task))
    is_chat = case.family == "sdar" and TASKS[task] == "generate"
    lm = DareLM(
        model,
        decode={"gen_length": 16, "block_length": 4, "batch_size": batch_size},
        likelihood={"num_samples": 5, "batch_size": batch_size},
    )
    own = benchmark_task(find_benchmark(task), planned.settings, "chat" if is_chat else "text", f"dare_{task}")
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[own], apply_chat_template=is_chat, task_manager=MANAGER, bootstrap_iters=0
    )
    samples = found["samples"][f"dare_{task}"]
    for record, sample in zip(case.native[task], samples, strict=True):
        if TASKS[task] == "generate":
            assert sample["resps"][0][0] == record["text"]
        else:
            assert [answer[0][0] for answer in sample["resps"]] == pytest.approx(record["logps"], abs=1e-4)
        assert {name: sample[name] for name in record["scores"]} == record["scores"]
    for metric in case.native[task][0]["scores"]:
        assert found["results"][f"dare_{task}"][f"{metric},none"] == pytest.approx(case.mean(task, metric))


def test_scores_say_something(case: Case) -> None:
    assert 0.0 < case.mean("gsm8k", "flexible") < 1.0
    assert len({record["text"] for record in case.native["gsm8k"]}) > 1
    assert any(0.0 < case.mean("arc_c", name) < 1.0 for name in ("acc", "acc_norm"))


def test_requests_of_a_task_are_obeyed_unless_the_model_says_otherwise(model: dare.Model) -> None:
    short = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    request = ask("generate_until", ("What is 2?", short), ("What is 2?", {**short, "max_gen_toks": 4}))
    texts = DareLM(model, decode={"block_length": 4}).generate_until(request)
    assert len(texts[0]) == len(texts[1]) + 4
    assert DareLM(model, decode={"block_length": 4, "gen_length": 4}).generate_until(request) == [texts[1]] * 2
    stop = texts[0][2]
    cut = DareLM(model, decode={"block_length": 4}).generate_until(
        ask("generate_until", ("What is 2?", {**short, "until": stop}))
    )
    assert cut == [texts[0][: texts[0].index(stop)]]


def test_repeats_of_a_sampled_request_differ(model: dare.Model) -> None:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 9.0}
    texts = DareLM(model, decode={"block_length": 4}).generate_until(
        ask("generate_until", ("What is 2?", options), ("What is 2?", options))
    )
    again = DareLM(model, decode={"block_length": 4}, seed=1).generate_until(
        ask("generate_until", ("What is 2?", options))
    )
    assert len({*texts, *again}) == 3


def test_a_continuation_alone_is_checked_against_greedy_decoding(case: Case, model: dare.Model) -> None:
    length = 4
    greedy = model.generate(["Say: "], gen_length=length, block_length=4)[0].text or ""
    lm = DareLM(model)
    answers = lm.loglikelihood(ask("loglikelihood", ("Say: ", greedy), ("Say: ", "no" + greedy[2:])))
    assert [is_greedy for _, is_greedy in answers] == [True, False]
    several = lm.loglikelihood(ask("loglikelihood", ("Say: ", greedy), ("Say: ", "no" + greedy[2:]), document=0))
    assert [is_greedy for _, is_greedy in several] == [False, False]


def test_documents_are_summed_over_windows(case: Case, model: dare.Model) -> None:
    text = "one two three"
    lm = DareLM(model, likelihood={"num_samples": 4})
    alone, empty = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,), ("",)))
    assert alone < 0.0
    assert empty == 0.0
    size = model.family.spec.max_length
    whole = lm.loglikelihood_rolling(ask("loglikelihood_rolling", ("x" * size + text,), ("x" * size,)))
    assert whole[0] == pytest.approx(whole[1] + alone, rel=1e-5)


def test_chat_templates(case: Case, model: dare.Model) -> None:
    lm, messages = DareLM(model), [{"role": "user", "content": "Hi"}]
    if case.family == "llada":
        assert lm.chat_template(True) == ""
        with pytest.raises(DareError, match="need a chat template"):
            lm.apply_chat_template(messages)
        return
    assert lm.apply_chat_template(messages) == "[user]Hi[assistant]"
    assert model.encode(lm.apply_chat_template(messages)) == model.encode(messages)
    opened = [*messages, {"role": "assistant", "content": "So"}]
    assert lm.apply_chat_template(opened, add_generation_prompt=False) == "[user]Hi[assistant]So"
    assert lm.chat_template(True) == model.tokenizer.chat_template
    with pytest.raises(DareError, match="its own"):
        lm.chat_template("other")


def test_a_task_file_and_a_benchmark_of_ours(case: Case, data: Path, tmp_path: Path) -> None:
    """The same command goes on where it stopped; other settings or other data in its folder are refused."""
    file = tmp_path / "own.yaml"
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes((data / "gsm8k" / "test.jsonl").read_bytes())
    file.write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\n"
        'output_type: generate_until\ndoc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: [], max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    model = dare.load(case.checkpoint)
    backend = api.evaluation_backend(model, str(case.checkpoint))
    planned = plan_tasks(
        None, [str(file), "dare_arc_c"], family=case.family, checkpoint="",
        overrides={"block_length": 4, "task.limit": 3, "likelihood.num_samples": 2},
    )  # fmt: skip
    seen: list[str] = []
    results = run_lm_eval(backend, planned, tmp_path / "out", on_result=lambda task, _: seen.append(task))
    assert seen == [str(file), "dare_arc_c"]
    assert results[str(file)]["num_documents"] == 3
    records = [json.loads(line) for line in (tmp_path / "out" / "own" / "records.jsonl").read_text().splitlines()]
    assert [record["doc"]["question"] for record in records] == [f"What is {n * 7} plus {n}?" for n in range(3)]
    assert all(8 <= len(record["resps"][0][0]) < 8 + 4 for record in records)  # block models fill their last block
    assert run_lm_eval(backend, planned, tmp_path / "out") == results
    rows.write_text(rows.read_text() + rows.read_text())
    with pytest.raises(DareError, match="other settings"):
        run_lm_eval(backend, planned, tmp_path / "out")
    rows.unlink()
    with pytest.raises(DareError, match="data file of the task is not there"):
        run_lm_eval(backend, planned, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        ("none.yaml", {}, "task file is not there"),
        ("dare_gsm9k", {}, "did you mean"),
        ("dare_gsm8k", {"task.num_samples": 2, "temperature": 1.0}, "one completion"),
        ("dare_arc_c", {"task.method": "likelihood", "task.style": "chat"}, "plain text"),
    ],
)
def test_mistakes_are_found_before_the_first_forward(
    task: str, overrides: dict[str, Any], message: str, case: Case, data: Path, tmp_path: Path
) -> None:
    backend = api.evaluation_backend(dare.load(case.checkpoint))
    planned = plan_tasks(None, [task], family=case.family, checkpoint="", overrides=overrides)
    with pytest.raises(DareError) as caught:
        run_lm_eval(backend, planned, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_arguments_of_the_command_line(case: Case, data: Path) -> None:
    words = f"pretrained={case.checkpoint},gen_length=8,block_length=4,likelihood.num_samples=3,seed=2,device=cpu"
    lm = DareLM.create_from_arg_string(words, {"batch_size": 1, "max_batch_size": None, "device": None})
    info = lm.get_model_info()
    assert info["dare_decode"] == {"gen_length": 8, "block_length": 4, "batch_size": 1}
    assert info["dare_likelihood"] == {"num_samples": 3, "cfg_scale": 0.0, "batch_size": 1}
    assert info["dare_model"]["family"] == case.family
    assert len(lm.tokenizer_name) > 20
    for wrong, message in (("gen_length=8", "no checkpoint"), (f"pretrained={case.checkpoint},steps=3", "unknown key")):
        with pytest.raises(DareError, match=message):
            DareLM.create_from_arg_string(wrong)
    with pytest.raises(DareError, match="unknown generation option 'num_beams'"):
        lm.generate_until(ask("generate_until", ("a", {"num_beams": 2})))


def test_the_script_is_lm_eval_with_the_model_registered(case: Case, data: Path, tmp_path: Path) -> None:
    if case.family != "sdar":
        pytest.skip("once is enough: the script takes long to start")
    file = tmp_path / "own.yaml"
    file.write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}/gsm8k/test.jsonl}}}}\n"
        'test_split: test\ndoc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {until: [], max_gen_toks: 16}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ["--model", "dare", "--model_args", f"pretrained={case.checkpoint},block_length=4", "--tasks", str(file)]
    options = ["--apply_chat_template", "--log_samples"]
    command = [sys.executable, "-m", "dare.harness.lm_script", "run", *words, *options]
    done = subprocess.run([*command, "--output_path", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    [samples] = (tmp_path / "out").rglob("samples_own_*.jsonl")
    assert len(samples.read_text().splitlines()) == 6
