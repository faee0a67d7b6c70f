"""Records that kernels are compiled for."""

from __future__ import annotations

import functools


class HashedOnce:
    """Remembers its hash: Triton asks for it at every launch, and fields take a microsecond.

    A frozen dataclass hashes its fields unless its body says `__hash__ = HashedOnce.__hash__`.
    """

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(vars(self).values()))

    def __hash__(self) -> int:
        return self._hash
