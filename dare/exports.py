"""Folders to publish: an adapter merged into its base, a trained model without its trainer, or the adapter alone.

Everything is verified on the files that were written, before the folder appears under its name.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dare.core.errors import DareError
from dare.core.files import whole_directory
from dare.core.rng import Key
from dare.families import adapter_files
from dare.families.base import Family
from dare.families.checkpoint import base_folder, load_checkpoint
from dare.families.hub import resolve_checkpoint
from dare.families.lora import merge_adapter
from dare.families.shards import Shards
from dare.families.tokenizer import load_tokenizer
from dare.families.weights import load_family, save_family
from dare.training.checkpoint import resolve_model_path

# Root mean square of (written - source) logits over that of the source's: rounding of sums and of the stored weights.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_PROBE_ROWS, _PROBE_LENGTH = 2, 32


@dataclass(frozen=True)
class Export:
    """What was written.

    num_changed   weight matrices of the base that merging changed; 0 for a model that was whole already
    logit_error   distance of the written model's logits from those of its source: root mean square, relative
    logit_change  the same between the source's base and the source; 0 without an adapter
    """

    folder: Path
    kind: str
    dtype: torch.dtype
    num_tensors: int
    num_changed: int = 0
    logit_error: float = 0.0
    logit_change: float = 0.0

    def text(self) -> str:
        """One line for people."""
        head = f"{self.folder}: {self.kind}, {self.num_tensors} tensors, {str(self.dtype).removeprefix('torch.')}"
        if not self.num_changed:
            return head
        return (
            f"{head}; {self.num_changed} matrices changed; logits differ from the base's by {self.logit_change:.2%}, "
            f"from the adapter's by {self.logit_error:.2g}"
        )


def export_adapter(source: str | Path, to: str | Path) -> Export:
    """Copy the adapter of a run or checkpoint to the new folder `to`, with its tokenizer.

    Raises DareError if the source is no adapter or is damaged, or `to` exists.
    """
    folder, target = _source_and_target(source, to)
    if not adapter_files.is_adapter(folder):
        raise DareError("there is no adapter to export", where=str(folder), got="a whole model", fix="use --merge")
    stored = adapter_files.read_adapter(folder)
    with whole_directory(target) as temporary:
        for name in (adapter_files.CONFIG_NAME, adapter_files.WEIGHTS_NAME):
            shutil.copyfile(folder / name, temporary / name)
        _save_tokenizer(load_tokenizer(folder), temporary)
    return Export(target, "adapter", stored.dtype, 2 * len(stored.tensors))


def export(
    source: str | Path,
    to: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Export:
    """Write a whole model to the new folder `to`: the source as it is, an adapter merged into its base.

    dtype  of the written weights; None: that of the base (or of the source)
    Sums are float32 and rounded once. The written files are loaded again and must have the base's tensors, and logits
    within `TOLERANCE` of the source's. Raises DareError if they do not, if merging changes nothing, for a source that
    does not load, or if `to` exists.
    """
    folder, target = _source_and_target(source, to)
    base = None if base is None else resolve_model_path(str(base))
    whole = base_folder(folder, base)
    shards = Shards(whole)
    stored, compute = dtype or _weight_dtype(shards), _weight_dtype(shards)
    if adapter_files.is_adapter(folder):  # in the finer dtype, so that nothing is rounded but the sums
        compute = torch.promote_types(compute, adapter_files.read_adapter(folder).dtype)
    family = load_checkpoint(folder, compute, device, base=base, is_quantized=False)
    ids_BS = _probe(family)
    source_logits, base_logits, num_changed = _merge(family, ids_BS, folder)
    with whole_directory(target) as temporary:
        save_family(family, temporary, stored)
        _save_tokenizer(load_tokenizer(folder) or load_tokenizer(whole), temporary)
        _require_same_tensors(Shards(temporary), shards)
        del family  # one model in memory at a time
        written_logits = _logits(load_family(temporary, compute, device), ids_BS)
        error = _distance(written_logits, source_logits)
        tolerance = max(TOLERANCE[stored], TOLERANCE[compute])
        if not error <= tolerance:
            raise DareError(
                "the written model does not give the logits of its source",
                where=str(target),
                got=f"relative difference {error:.3g}",
                expected=f"<= {tolerance:g}",
            )
    return Export(
        folder=target,
        kind="model" if base_logits is None else "merged model",
        dtype=stored,
        num_tensors=len(shards.shapes),
        num_changed=num_changed,
        logit_error=error,
        logit_change=0.0 if base_logits is None else _distance(base_logits, source_logits),
    )


def _source_and_target(source: str | Path, to: str | Path) -> tuple[Path, Path]:
    target = Path(to).expanduser()
    if target.exists():
        raise DareError("the folder exists, and nothing is overwritten", where=str(target), fix="choose another --to")
    return resolve_checkpoint(resolve_model_path(str(source))), target


def _merge(family: Family, ids_BS: Tensor, folder: Path) -> tuple[Tensor, Tensor | None, int]:
    """Logits with the adapter, logits of the base (None without an adapter), matrices that merging has changed."""
    source_logits, adapter = _logits(family, ids_BS), family.adapter
    if adapter is None:
        return source_logits, None, 0
    with adapter.off():
        base_logits = _logits(family, ids_BS)
    num_changed = merge_adapter(family)
    if not num_changed:
        raise DareError(
            "merging changes nothing: the adapter is untrained, or smaller than the weights' rounding",
            where=str(folder),
            fix="export a later checkpoint, or one trained with a higher optimizer.lr",
        )
    return source_logits, base_logits, num_changed


def _probe(family: Family) -> Tensor:
    """int64 [B, S]: random tokens, every other position masked."""
    spec = family.spec
    length = min(_PROBE_LENGTH, spec.max_length)
    row_B1, column_1S = torch.arange(_PROBE_ROWS)[:, None], torch.arange(length)[None]
    ids_BS = Key(0).fold("export").integers(0, spec.vocab_size, row_B1, column_1S)
    return torch.where((row_B1 + column_1S) % 2 == 0, spec.mask_id, ids_BS)


def _logits(family: Family, ids_BS: Tensor) -> Tensor:
    with torch.no_grad():
        return family.logits(ids_BS).cpu()


def _distance(logits: Tensor, source: Tensor) -> float:
    return float((logits - source).square().mean().sqrt() / source.square().mean().sqrt())


def _weight_dtype(shards: Shards) -> torch.dtype:
    """That of the matrices; buffers may have another."""
    return next(shards.dtypes[name] for name, shape in sorted(shards.shapes.items()) if len(shape) == 2)


def _require_same_tensors(written: Shards, expected: Shards) -> None:
    if written.shapes != expected.shapes:
        different = sorted(set(written.shapes.items()) ^ set(expected.shapes.items()))
        raise DareError("the written tensors are not those of the base", where=str(written.folder), got=different[:3])


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
