"""Labelled images: handwritten digits, Fashion-MNIST and CIFAR.

Only formats that hold nothing but numbers are read: CSV, IDX and the binary version of CIFAR, never
a pickle. The checksums of Fashion-MNIST and CIFAR are those of TensorFlow Datasets, found again in
other public loaders of the same files; the one of the digits was taken from scikit-learn's own
packages.
"""

import gzip
import io
import math
import os
import tarfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from fedlr import _checks
from fedlr.datasets import files

__all__ = ["Images", "cifar10", "cifar100", "digits", "fashion_mnist"]

_DIGITS = files.File(
    "digits.csv.gz",
    "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
    "https://raw.githubusercontent.com/scikit-learn/scikit-learn/1.3.2/"
    "sklearn/datasets/data/digits.csv.gz",
)
_FASHION_URL = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
)
# Training images and labels, then those of the test. MNIST gives its files the same names, so these
# have a folder of their own.
_FASHION_MNIST = tuple(
    files.File(f"fashion_mnist/{name}", sha256, _FASHION_URL + name)
    for name, sha256 in (
        (
            "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    )
)
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_CIFAR10 = files.File(
    "cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    _CIFAR_URL + "cifar-10-binary.tar.gz",
)
_CIFAR100 = files.File(
    "cifar-100-binary.tar.gz",
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    _CIFAR_URL + "cifar-100-binary.tar.gz",
)


_Labelled = tuple[UInt8[np.ndarray, "n height width channels"], UInt8[np.ndarray, " n"]]


class Images(NamedTuple):
    """Labelled images for training and, held out, for the test.

    Attributes:
        train_images: Intensities from 0 to 1, shape (train, height, width, channels).
        train_labels: Classes from 0, int32, shape (train,).
        test_images: Intensities from 0 to 1, shape (test, height, width, channels).
        test_labels: Classes from 0, int32, shape (test,).
    """

    train_images: Float[Array, "train height width channels"]
    train_labels: Int[Array, " train"]
    test_images: Float[Array, "test height width channels"]
    test_labels: Int[Array, " test"]


def digits(
    *,
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    download: bool = True,
    dtype=jnp.float32,
) -> Images:
    """Load 1797 handwritten digits of 8 by 8 pixels, about 180 of each.

    The source has no split. Here a fifth, 359 images, is held out by a permutation that depends on
    nothing but `seed`.

    Reads scikit-learn's ``digits.csv.gz`` from the folders, from an installed scikit-learn, which
    is not imported, or, with `download`, from its repository into the cache (58 kB).

    Terms: Creative Commons Attribution 4.0, E. Alpaydin and C. Kaynak.

    Args:
        seed: Seed of the split. *Static.*
        folder: Folder to look in first; see `search_folders`.
        download: Whether a file that is nowhere to be found is downloaded. *Static.*
        dtype: float32 or float64. *Static.*

    Returns:
        The images, shape (1438, 8, 8, 1) and (359, 8, 8, 1), with their labels.

    Raises:
        FileNotFoundError: If the file is absent and not, or not successfully, downloaded.
        ValueError: If the file has another checksum, `dtype` is none of the two, or `seed` is not
            an integer from 0.

    Reference:
        E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
        Repository, 1998, doi:10.24432/C50P49: its test part, as scikit-learn ships it.
    """
    files.check_dtype("digits", dtype)
    _checks.check_count("digits", "seed", seed, minimum=0)
    content = files.read(
        "digits",
        [_DIGITS],
        folder,
        advice=f"it comes with scikit-learn (pip install scikit-learn) and lies at {_DIGITS.url}",
        installed=files.installed_folders("sklearn", "datasets", "data"),
        download=download,
    )
    table = np.loadtxt(io.BytesIO(_decompress("digits", content)), delimiter=",", dtype=np.uint8)
    if table.ndim != 2 or table.shape[1] != 65:
        raise _checks.fail("digits", f"a table of shape {table.shape}", "64 pixels and a label")
    table = table[np.random.default_rng(seed).permutation(len(table))]
    held_out = len(table) // 5
    images, labels = table[:, :64].reshape(-1, 8, 8, 1), table[:, 64]
    parts = [(images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])]
    return _as_images(parts, 16, dtype)


def fashion_mnist(
    *, folder: str | os.PathLike[str] | None = None, download: bool = True, dtype=jnp.float32
) -> Images:
    """Load 70000 grey images of clothes, 28 by 28 pixels, in ten classes of equal size.

    The classes are T-shirt or top, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag and
    ankle boot, in this order.

    Reads the four files of the source, such as ``fashion_mnist/train-images-idx3-ubyte.gz``, from
    the folders or, with `download`, from the authors' repository into the cache (31 MB).

    Terms: MIT License, Copyright 2017 Zalando SE.

    Args:
        folder: Folder to look in first; see `search_folders`.
        download: Whether a file that is nowhere to be found is downloaded. *Static.*
        dtype: float32 or float64. *Static.*

    Returns:
        The images, shape (60000, 28, 28, 1) and (10000, 28, 28, 1), with their labels.

    Raises:
        FileNotFoundError: If a file is absent and not, or not successfully, downloaded.
        ValueError: If a file has another checksum, or `dtype` is none of the two.

    Reference:
        H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking
        machine learning algorithms", 2017, arXiv:1708.07747.
    """
    files.check_dtype("fashion_mnist", dtype)
    arrays = []
    for file in _FASHION_MNIST:
        advice = f"it lies at {file.url}"
        content = files.read("fashion_mnist", [file], folder, advice=advice, download=download)
        arrays.append(_read_idx("fashion_mnist", file.name, content))
    parts = []
    for images, labels in (arrays[:2], arrays[2:]):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            got = f"images of shape {images.shape} with labels of shape {labels.shape}"
            raise _checks.fail("fashion_mnist", got, "a label for every image")
        parts.append((images[..., None], labels))
    return _as_images(parts, 255, dtype)


def cifar10(
    *, folder: str | os.PathLike[str] | None = None, download: bool = True, dtype=jnp.float32
) -> Images:
    """Load 60000 colour images of 32 by 32 pixels in ten classes of equal size.

    The classes are airplane, automobile, bird, cat, deer, dog, frog, horse, ship and truck, in this
    order.

    Reads the archive ``cifar-10-binary.tar.gz`` from the folders or, with `download`, from its
    author's page into the cache (170 MB). The images take 740 MB in float32.

    Terms: The source names none and asks to be cited.

    Args:
        folder: Folder to look in first; see `search_folders`.
        download: Whether a file that is nowhere to be found is downloaded. *Static.*
        dtype: float32 or float64. *Static.*

    Returns:
        The images, shape (50000, 32, 32, 3) and (10000, 32, 32, 3), with their labels.

    Raises:
        FileNotFoundError: If the file is absent and not, or not successfully, downloaded.
        ValueError: If the file has another checksum, or `dtype` is none of the two.

    Reference:
        A. Krizhevsky, "Learning multiple layers of features from tiny images", University of
        Toronto, 2009; www.cs.toronto.edu/~kriz/cifar.html.
    """
    train = [f"cifar-10-batches-bin/data_batch_{batch}.bin" for batch in range(1, 6)]
    test = ["cifar-10-batches-bin/test_batch.bin"]
    content = _read_cifar("cifar10", _CIFAR10, folder, download, dtype)
    return _as_images(_read_records("cifar10", content, (train, test), 1), 255, dtype)


def cifar100(
    *,
    coarse: bool = False,
    folder: str | os.PathLike[str] | None = None,
    download: bool = True,
    dtype=jnp.float32,
) -> Images:
    """Load 60000 colour images of 32 by 32 pixels in a hundred classes of equal size.

    The classes come in twenty groups of five, such as the aquatic mammals beaver, dolphin, otter,
    seal and whale; both are numbered in the order of the alphabet.

    Reads the archive ``cifar-100-binary.tar.gz`` from the folders or, with `download`, from its
    author's page into the cache (169 MB). The images take 740 MB in float32.

    Terms: The source names none and asks to be cited.

    Args:
        coarse: Whether the labels are the twenty groups instead of the hundred classes. *Static.*
        folder: Folder to look in first; see `search_folders`.
        download: Whether a file that is nowhere to be found is downloaded. *Static.*
        dtype: float32 or float64. *Static.*

    Returns:
        The images, shape (50000, 32, 32, 3) and (10000, 32, 32, 3), with their labels.

    Raises:
        FileNotFoundError: If the file is absent and not, or not successfully, downloaded.
        ValueError: If the file has another checksum, or `dtype` is none of the two.

    Reference:
        A. Krizhevsky, "Learning multiple layers of features from tiny images", University of
        Toronto, 2009; www.cs.toronto.edu/~kriz/cifar.html.
    """
    members = (["cifar-100-binary/train.bin"], ["cifar-100-binary/test.bin"])
    content = _read_cifar("cifar100", _CIFAR100, folder, download, dtype)
    parts = _read_records("cifar100", content, members, 2, label=0 if coarse else 1)
    return _as_images(parts, 255, dtype)


def _as_images(parts: Sequence[_Labelled], maximum: int, dtype) -> Images:
    """Scale the bytes of the images to [0, 1] and widen those of the labels."""
    train, test = (
        (jnp.asarray(images.astype(jnp.dtype(dtype)) / maximum), jnp.asarray(labels, jnp.int32))
        for images, labels in parts
    )
    return Images(train[0], train[1], test[0], test[1])


def _decompress(function: str, content: bytes) -> bytes:
    """Return what a gzip file holds."""
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise _checks.fail(function, repr(error), "a whole gzip file") from error


def _read_idx(function: str, name: str, content: bytes) -> UInt8[np.ndarray, "..."]:
    """Read bytes in the IDX format: 0, 0, 8, the number of axes, big-endian sizes, data."""
    raw = _decompress(function, content)
    known = len(raw) > 3 and raw[:3] == b"\0\0\x08"
    start = 4 + 4 * raw[3] if known else 4
    if not known or len(raw) < start:
        raise _checks.fail(function, f"{name} that begins with {raw[:4]!r}", "IDX of bytes")
    shape = tuple(int(size) for size in np.frombuffer(raw[4:start], ">u4"))
    if len(raw) - start != math.prod(shape):
        got = f"{name} of shape {shape} with {len(raw) - start} bytes"
        raise _checks.fail(function, got, f"{math.prod(shape)} bytes")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _read_cifar(
    function: str, file: files.File, folder: str | os.PathLike[str] | None, download: bool, dtype
) -> bytes:
    """Read an archive of CIFAR."""
    files.check_dtype(function, dtype)
    advice = f"it lies at {file.url}"
    return files.read(function, [file], folder, advice=advice, download=download)


def _read_records(
    function: str, content: bytes, parts: tuple[list[str], ...], label_bytes: int, label: int = 0
) -> list[_Labelled]:
    """Read records of labels and a red, a green and a blue plane from members of an archive."""
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for names in parts:
                streams = [archive.extractfile(name) for name in names]
                found.append([stream.read() if stream else b"" for stream in streams])
    except (tarfile.TarError, OSError, EOFError, zlib.error, KeyError) as error:
        raise _checks.fail(function, repr(error), "a whole archive with its members") from error
    labelled = []
    size = label_bytes + 3 * 32 * 32
    for names, members in zip(parts, found, strict=True):
        for name, member in zip(names, members, strict=True):
            if not member or len(member) % size:
                raise _checks.fail(
                    function, f"{name} of {len(member)} bytes", f"records of {size} bytes"
                )
        records = np.frombuffer(b"".join(members), np.uint8).reshape(-1, size)
        planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
        labelled.append((np.moveaxis(planes, 1, -1), records[:, label]))
    return labelled
