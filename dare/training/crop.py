"""Rows of random length, so that a model that is trained on full rows knows short ones too."""

from __future__ import annotations

from dare.core.rng import Key

_ONE = 2**63


def cropped(ids: list[int], rate: float, key: Key | None, uid: str, unit: int = 1) -> list[int]:
    """A share `rate` of the rows is cut to a length uniform on {1..its own}, up to the end of a unit of so many tokens.

    Which ones and where is a function of the key and the row's `uid`; without a key none is. LLaDA's pre-training does
    so with 1 % of its data (Nie et al. 2025, section 2.2), its published guidelines with whole batches.
    """
    if key is None or key.fold("crop", uid).python_seed() >= rate * _ONE:
        return ids
    length = 1 + key.fold("crop length", uid).python_seed() * len(ids) // _ONE
    return ids[: length + -length % unit]
