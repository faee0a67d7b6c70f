"""Files that commands write: their folders are made before anything is measured."""

from __future__ import annotations

from pathlib import Path

from hipserve.errors import ArgumentError


def make_folder(option: str, folder: Path) -> None:
    """Makes a folder, with those above it.

    Raises:
        ArgumentError: naming the option, if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file" if folder.is_file() else error.strerror
        raise ArgumentError(option, "a folder", f"{folder} ({reason})") from None


def make_room(option: str, file: Path | None) -> None:
    """Makes the folder of a file that is to be written, if any.

    Raises:
        ArgumentError: naming the option, if there can be no such file.
    """
    if file is None:
        return
    if file.is_dir():
        raise ArgumentError(option, "a file to write", f"{file} (a folder)")
    make_folder(option, file.parent)


def write(option: str, file: Path, text: str) -> None:
    """Writes a text file, in a folder that is made for it.

    Raises:
        ArgumentError: naming the option, if it cannot be written.
    """
    make_room(option, file)
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise ArgumentError(option, "a file to write", f"{file} ({error.strerror})") from None
