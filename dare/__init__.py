"""DARE: post-train and evaluate diffusion language models.

>>> import dare
>>> model = dare.load("runs/demo/rl")
>>> model.generate(["3 5 7>22="], gen_length=8)[0].text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dare.api import convert as convert
    from dare.api import evaluate as evaluate
    from dare.api import evaluate_benchmarks as evaluate_benchmarks
    from dare.api import train as train
    from dare.exports import export as export
    from dare.model import Model as Model
    from dare.model import load as load

_HOMES = {
    "load": "dare.model",
    "Model": "dare.model",
    "convert": "dare.api",
    "evaluate": "dare.api",
    "evaluate_benchmarks": "dare.api",
    "export": "dare.exports",
    "train": "dare.api",
}
__all__ = ["Model", "convert", "evaluate", "evaluate_benchmarks", "export", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import dare` and the command line stay instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dare' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
