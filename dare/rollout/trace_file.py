"""Trace files: one rollout on disk, to be looked at later and elsewhere. Reading one needs neither torch nor the model.

A safetensors file. Its tensors are the fields of `TraceBatch`, `Edits` and `Predictions` under their own names (ids as
int32); its metadata has one entry, `dare_trace`, a JSON object: version, family, mask_id, eos_ids, temperature,
attention, decode, policy (name, score, rule in words), labels of the rows and pieces, the text of every token id that
occurs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.files import write_bytes
from dare.core.recipe_errors import explain
from dare.core.spec import FamilySpec
from dare.core.types import TraceBatch
from dare.diffusion import unmask

if TYPE_CHECKING:
    import numpy as np

VERSION = 1
NUM_ALTERNATIVES = 5  # tokens kept for each open position
_KEY = "dare_trace"
_CANVAS = ("input_BS", "is_completion_BS", "is_real_BS", "block_BS")
_TRACE = ("step_map_BS", "logp_BS", "nfe_B", "is_eos_B", "sample_id_B")
_EDITS = ("row_E", "position_E", "token_E", "since_E", "until_E", "logp_E")
_OPEN = ("step_P", "position_P", "held_P", "token_P", "prob_P", "score_P", "is_written_P", "top_PA", "top_prob_PA")
_REQUIRED = (*_CANVAS, "step_map_BS", "nfe_B")
_PREDICTIONS = ("row_P", *_OPEN, "row_D", "step_D", "start_D", "quota_D", "row_M", "step_M", "position_M")
_KINDS = {"eos_ids": list, "temperature": float, "decode": dict, "policy": dict, "labels": list, "pieces": dict}
_TOKENS = ("input_BS", "token_E", "held_P", "token_P", "top_PA")


class _PolicyInfo(BaseModel):
    name: str = "?"
    score: str = ""
    rule: str = ""
    is_first_forced: bool = False


class _Info(BaseModel):
    """The types of what readers use of the metadata; what else a file of a later version says is let be."""

    version: int
    mask_id: int
    eos_ids: list[int] = []
    family: str = "?"
    temperature: FiniteFloat = 0.0
    policy: _PolicyInfo = _PolicyInfo()
    labels: list[str] = []
    pieces: dict[str, str] = {}
    decode: dict[str, str | bool | int | FiniteFloat | list[Any] | dict[str, Any] | None] = {}


@dataclass(frozen=True)
class TraceFile:
    """What a trace file holds. `missing` says in plain words what it lacks or what could not be read."""

    path: Path
    info: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    missing: list[str] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return int(self.arrays["input_BS"].shape[0])

    @property
    def has_predictions(self) -> bool:
        return "row_P" in self.arrays

    def piece(self, token: int) -> str:
        """The text of a token id; the id itself where the file does not say."""
        return str(self.info.get("pieces", {}).get(str(token), f"‹{token}›"))


def save_trace(
    path: Path,
    trace: TraceBatch,
    *,
    spec: FamilySpec,
    decode: Decode,
    piece: Callable[[int], str],
    labels: Sequence[str] = (),
) -> None:
    """Write a rollout atomically; the folder is made if needed.

    piece   the text of a token id
    labels  a name for each row, such as its prompt's uid; default: row numbers
    """
    from safetensors.numpy import save

    arrays = _arrays(trace)
    tokens = sorted({int(token) for name in _TOKENS if name in arrays for token in arrays[name].ravel()})
    policy = unmask.find_policy(decode.unmask)
    info = {
        "version": VERSION,
        "family": spec.name,
        "mask_id": trace.mask_id,
        "eos_ids": list(trace.eos_ids),
        "temperature": trace.temperature,
        "attention": trace.canvas.attention,
        "weights_version": trace.weights_version,
        "is_exact": trace.is_exact,
        "decode": dict(trace.decode),
        "policy": {
            "name": decode.unmask,
            "score": policy.score,
            "rule": unmask.rule_in_words(decode),
            "is_first_forced": unmask.is_first_forced(decode.cache, is_shifted=spec.is_shifted),
        },
        "labels": list(labels) or [f"row {row + 1}" for row in range(trace.canvas.batch_size)],
        "pieces": {str(token): piece(token) for token in tokens},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(arrays, metadata={_KEY: json.dumps(info, ensure_ascii=False)}))


def load_trace(path: Path) -> TraceFile:
    """Read a trace file, also one of a later version as far as it is understood.

    Raises DareError if it is no trace file, is damaged, or lacks what every trace has.
    """
    arrays, metadata = _read(path)
    try:
        info = json.loads(metadata[_KEY])
        version = int(info["version"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DareError(
            "not a trace file",
            where=str(path),
            got="safetensors without a trace's metadata",
            fix="write one with `dare generate CHECKPOINT --prompt TEXT --save-trace FILE`",
        ) from None
    strange = [name for name, kind in _KINDS.items() if name in info and not _is_of(info[name], kind)]
    lacking = [name for name in _REQUIRED if name not in arrays]
    if lacking:
        raise DareError("the trace lacks tensors that every trace has", where=str(path), got=f"no {', '.join(lacking)}")
    missing = [f"its metadata has no readable {name}" for name in strange]
    info = {name: value for name, value in info.items() if name not in strange}
    if version > VERSION:
        missing.append(
            f"the file is of format version {version}, this DARE reads up to {VERSION}: what is newer is left out"
        )
    for names, what in (
        (_PREDICTIONS, "no alternatives, confidences and reasons were recorded; the order comes from the step map"),
        (("logp_BS",), "no log-probs were recorded"),
    ):
        if any(name not in arrays for name in names):
            missing.append(what)
            arrays = {name: array for name, array in arrays.items() if name not in names}
    _check(path, arrays, info)
    return TraceFile(path, info, arrays, missing)


def _arrays(trace: TraceBatch) -> dict[str, np.ndarray]:
    import numpy as np

    tensors = {name: getattr(trace.canvas, name) for name in _CANVAS}
    tensors |= {name: getattr(trace, name) for name in _TRACE}
    if trace.edits is not None:
        tensors |= {name: getattr(trace.edits, name) for name in _EDITS}
    if trace.predictions is not None:
        tensors |= trace.predictions.tensors()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    is_small = {name: array.dtype == np.int64 and name != "sample_id_B" for name, array in arrays.items()}
    return {
        name: np.ascontiguousarray(array.astype(np.int32) if is_small[name] else array)
        for name, array in arrays.items()
    }


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DareError("trace file not found", where=str(path))
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DareError(
            "the trace cannot be read", where=str(path), got=str(error), fix="the file is damaged or no trace at all"
        ) from None


def _is_of(value: Any, kind: type) -> bool:
    """Whether an entry of the metadata is of the kind that this version writes; float stands for any finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return is_number if kind is float else isinstance(value, kind)


def _check(path: Path, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any]) -> None:
    """Raise DareError unless shapes fit together and indices point into the canvas."""
    shape = arrays["input_BS"].shape
    where = str(path)
    if len(shape) != 2 or 0 in shape:
        raise DareError("the trace is empty or malformed", where=where, got=f"input_BS of shape {shape}")
    lengths: dict[str, tuple[str, int]] = {}
    for name, array in arrays.items():
        axis = name.rpartition("_")[2]
        if axis in ("BS", "B") and array.shape != shape[: len(axis)]:
            raise DareError("the trace is malformed", where=where, got=f"{name} {array.shape}, canvas {shape}")
        if axis in ("P", "PA", "D", "M", "E"):
            first, length = lengths.setdefault(axis[0], (name, len(array)))
            if len(array) != length:
                raise DareError(
                    "the trace is malformed", where=where, got=f"{len(array)} of {name}, {length} of {first}"
                )
        limit = {"row": shape[0], "position": shape[1]}.get(name.rpartition("_")[0])
        if limit is not None and len(array) and not 0 <= int(array.min()) <= int(array.max()) < limit:
            raise DareError("the trace is malformed", where=where, got=f"{name} outside 0..{limit - 1}")
        if name.startswith("is_") and array.dtype != bool:
            raise DareError("the trace is malformed", where=where, got=f"{name} is {array.dtype}, not bool")
        if array.dtype.kind == "f" and not bool((abs(array) < math.inf).all()):
            raise DareError("the trace is malformed", where=where, got=f"{name} is not finite")
    try:
        _Info.model_validate(info)
    except ValidationError as error:
        raise explain(error, _Info, where=where, what="the trace is malformed: its metadata is") from None
