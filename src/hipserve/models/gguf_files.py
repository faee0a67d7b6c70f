"""Which GGUF file a name means; importing this loads no torch."""

from __future__ import annotations

import re
from pathlib import Path

from hipserve.errors import ArgumentError


def find_gguf(name: str | Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder without config.json.

    Raises:
        ArgumentError: several files could be meant, or the file is a part of one.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        files = [f for f in sorted(path.glob("*.gguf*")) if not f.name.startswith("mmproj")]
        if len(files) > 1 and not any(map(_is_part, files)):
            got = f"{len(files)} in {name} ({', '.join(file.name for file in files)})"
            raise ArgumentError("model", "one GGUF file", got, "name the file")
        path = files[0] if files else path
    if not (path.is_file() and ".gguf" in path.name):
        return None
    if _is_part(path):
        raise ArgumentError("model", "a whole GGUF file", f"{path.name}, a part", _joining(path))
    return path


def _is_part(path: Path) -> bool:
    return path.suffix != ".gguf" or bool(re.search(r"-\d{5}-of-\d{5}$", path.stem))


def _joining(path: Path) -> str:
    if path.suffix != ".gguf":
        whole = path.name[: path.name.index(".gguf") + 5]
        return f"join the parts: cat {whole}.* > {whole}"
    whole = re.sub(r"-\d{5}-of", "-00001-of", path.name)
    return f"join the parts: llama-gguf-split --merge {whole} model.gguf"
