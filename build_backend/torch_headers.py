"""Where torch's headers are: in this environment, also while pip builds apart from it."""

from __future__ import annotations

import sys
import sysconfig
from importlib.metadata import distributions

OLDEST = (2, 10)
"""The first torch whose stable interface the native kernels use."""


def find() -> str | None:
    """The folder of an installed torch that is new enough.

    An isolated build cannot import it, but sees where the environment keeps its packages.
    """
    places = dict.fromkeys(
        [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    )
    for torch in distributions(name="torch", path=list(places)):
        major, minor = torch.version.split(".")[:2]
        if (int(major), int(minor)) >= OLDEST:
            return str(torch.locate_file("torch"))
    return None


if __name__ == "__main__":
    sys.stdout.write(find() or "")
