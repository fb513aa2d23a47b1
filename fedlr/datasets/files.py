"""Files of data sets: where they are looked for, their checksums, the cache and the download.

A file is taken from the first place that has it: the folder given to the loader, the folder named
in the environment variable FEDLR_DATA, the user's cache, an installed package that ships it, and
last its public address where there is one. Wherever it comes from, it is used only if its sha256 is
the one written beside its name.
"""

import hashlib
import http.client
import importlib.util
import os
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from fedlr import _checks

__all__ = ["File", "check_dtype", "installed_folders", "not_public", "read", "search_folders"]


class File(NamedTuple):
    """A file by its name, its checksum and, where these bytes are public, its address.

    Attributes:
        name: Path below the folders that are searched.
        sha256: Checksum of the bytes, in hexadecimal digits.
        url: Public address of these bytes; none if empty.
    """

    name: str
    sha256: str
    url: str = ""


def search_folders(folder: str | os.PathLike[str] | None = None) -> tuple[Path, ...]:
    """Return the folders in which the loaders look for their files, in this order.

    `folder`, the one that the environment variable FEDLR_DATA names at the time of the call, and
    the cache ``~/.cache/fedlr`` or ``$XDG_CACHE_HOME/fedlr``. They need not exist.

    Args:
        folder: Folder to look in before all others; none if None.

    Returns:
        Two folders, or one or three.

    Example:
        >>> from fedlr import datasets
        >>> print(datasets.search_folders("measurements")[0])
        measurements
    """
    named = [place for place in (folder, os.environ.get("FEDLR_DATA")) if place]
    return (*(Path(place).expanduser() for place in named), _cache())


def installed_folders(package: str, *parts: str) -> tuple[Path, ...]:
    """Return where an installed package keeps its data. It is not imported.

    Args:
        package: Name of the package.
        parts: Path of the folder inside the package.

    Returns:
        One folder, or none if the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec else None
    return tuple(Path(location, *parts) for location in locations or ())


def not_public(source: str) -> str:
    """Return the advice on a file whose public source has the data in another format.

    Args:
        source: Address of the source.

    Returns:
        A clause for the message of `read`.
    """
    return (
        f"the project's data folder has it, and its source, {source}, has the data in another "
        "format, so nothing is downloaded"
    )


def check_dtype(function: str, dtype) -> None:
    """Refuse a dtype that is not float32 or float64.

    Args:
        function: Name of the caller, for the message.
        dtype: What was asked for.

    Raises:
        ValueError: If it is none of the two.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
        raise _checks.fail(function, f"dtype {jnp.dtype(dtype)}", "float32 or float64")


def read(
    function: str,
    files: Sequence[File],
    folder: str | os.PathLike[str] | None,
    *,
    advice: str,
    installed: Sequence[Path] = (),
    download: bool = False,
) -> bytes:
    """Read one of several files that serve equally, from the first place that has one.

    Args:
        function: Name of the loader, for messages.
        files: The files; the last one is what would be downloaded.
        folder: Folder to look in first; see `search_folders`.
        advice: What can be done if there is none, for the message.
        installed: Further folders to look in last, see `installed_folders`.
        download: Whether a file that is nowhere to be found is downloaded into the cache.

    Returns:
        The bytes of the file, whose checksum is right.

    Raises:
        FileNotFoundError: If the file is absent and not, or not successfully, downloaded.
        ValueError: If the file has another checksum.
    """
    places = (*search_folders(folder), *installed)
    content = _find(function, files, places)
    if content is not None:
        return content
    if not download:
        raise _absent(function, files, places, advice)
    file = files[-1]
    try:
        with urllib.request.urlopen(file.url, timeout=60) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        advice += f"; its download failed: {error!r}"
        raise _absent(function, files, places, advice) from error
    _check_sha256(function, file, content, file.url)
    _store(_cache() / file.name, content)
    return content


def _cache() -> Path:
    """Return the folder of what was downloaded, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "fedlr"


def _check_sha256(function: str, file: File, content: bytes, origin: str | Path) -> None:
    """Refuse bytes that are not those of the file."""
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise _checks.fail(function, f"sha256 {found} of {origin}", file.sha256)


def _find(function: str, files: Sequence[File], places: Sequence[Path]) -> bytes | None:
    """Return the checked bytes of one of the files from the first place that has one."""
    for place in places:
        for file in files:
            path = place / file.name
            if path.is_file():
                content = path.read_bytes()
                _check_sha256(function, file, content, path)
                return content
    return None


def _absent(
    function: str, files: Sequence[File], places: Sequence[Path], advice: str
) -> FileNotFoundError:
    """Build the error that says where was looked and what can be done."""
    names = " or ".join(file.name for file in files)
    return FileNotFoundError(
        f"{function}: got no {names} in {', '.join(map(str, places))}, expected it there or in the "
        f"folder that the environment variable FEDLR_DATA names; {advice}"
    )


def _store(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees a part of it under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch, path.name)
        written.write_bytes(content)
        written.replace(path)
