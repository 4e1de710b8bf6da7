"""What the machine did to a run, said in the words of a DareError: no room, no permission, no memory."""

from __future__ import annotations

import errno

from dare.core.errors import DareError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
# torch has a type of its own for an exhausted GPU and a plain RuntimeError for an exhausted host.
_NO_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc")


def explain_fault(error: BaseException, *, where: str | None = None) -> DareError | None:
    """A fault of the machine as one message; None for anything else, which is a bug and keeps its traceback.

    where  what was being done, such as "step 3, save"; a file that the error names is added
    """
    is_exhausted = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)
    if is_exhausted or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return DareError(
            "out of memory",
            where=where,
            got=str(error).partition("\n")[0][:200] or None,
            fix="smaller train.micro_batch_tokens, train.recompute=full or a smaller decode.batch_size; "
            "`dare plan` says what a recipe needs",
        )
    if not isinstance(error, OSError) or error.errno == errno.EPIPE:  # a reader that has seen enough is no fault
        return None
    place = ", ".join(str(part) for part in (where, error.filename) if part) or None
    if error.errno in _NO_ROOM:
        fix = "make room; what was written before is whole, and --resume continues from the last checkpoint"
        return DareError("there is no room left to write", where=place, got=error.strerror, fix=fix)
    if error.errno in _NO_PERMISSION:
        fix = "make the folder writable, or choose another one"
        return DareError("no permission to write or read", where=place, got=error.strerror, fix=fix)
    return DareError("the operating system refused a file or a connection", where=place, got=str(error))
