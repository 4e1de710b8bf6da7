"""How much memory tensors take while a piece of code runs, counted instead of guessed; on the CPU."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside a `with` block: bytes of the tensors that were made in it and still exist, now and at most.

    Every storage counts once, from the operator that made it to its end; meta tensors take nothing. What a kernel
    allocates for itself and frees again is not seen. The backward of a CPU graph runs in the calling thread, so it
    counts too; a GPU's does not.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage(), before)
        return result

    def _count(self, storage: UntypedStorage, before: set[int]) -> None:
        address = storage._cdata
        if address in self._known or address in before:
            return
        size = storage.nbytes()

        def forget(_: Any) -> None:
            self.live -= size
            self._known.pop(address, None)

        self._known[address] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)
