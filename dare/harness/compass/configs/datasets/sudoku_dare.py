"""sudoku with the prompts and the scores of DARE's own evaluation; the data is DARE_DATA/sudoku/test.jsonl."""

from opencompass.openicl.icl_prompt_template import PromptTemplate
from opencompass.openicl.icl_retriever import ZeroRetriever

from dare.harness.compass.benchmarks import BenchmarkDataset, BenchmarkEvaluator
from dare.harness.compass.inferencers import BenchmarkInferencer

dare_sudoku_datasets = [
    {
        "abbr": "dare_sudoku",
        "type": BenchmarkDataset,
        "benchmark": "sudoku",
        "style": "chat",
        "reader_cfg": {"input_columns": ["prompt"], "output_column": "gold"},
        "infer_cfg": {
            "prompt_template": {"type": PromptTemplate, "template": "{prompt}"},
            "retriever": {"type": ZeroRetriever},
            "inferencer": {"type": BenchmarkInferencer},
        },
        "eval_cfg": {"evaluator": {"type": BenchmarkEvaluator, "benchmark": "sudoku"}},
    }
]
