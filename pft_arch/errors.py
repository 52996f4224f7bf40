"""What an error is, where its class does not tell."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of memory, by its words: torch's own class for it is new, and allocators have theirs."""
    words = str(error).lower()
    told = ("out of memory", "can't allocate memory", "cannot allocate memory")
    return isinstance(error, MemoryError) or any(text in words for text in told)
