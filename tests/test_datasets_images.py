import gzip
import hashlib
import importlib.util
import io
import re
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import datasets
from fedlr.datasets import images

LOADERS = [datasets.digits, datasets.fashion_mnist, datasets.cifar10, datasets.cifar100]
INSTALLED = importlib.util.find_spec("sklearn") is not None


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def no_sklearn(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)


def draw_bytes(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def idx(array):
    """An array of bytes in the IDX format."""
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def tar(members):
    """Bytes of a tar.gz archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write(monkeypatch, folder, loader, contents):
    """Write files that pass as those of the loader, and return their records."""
    name = {
        datasets.digits: "_DIGITS",
        datasets.fashion_mnist: "_FASHION_MNIST",
        datasets.cifar10: "_CIFAR10",
        datasets.cifar100: "_CIFAR100",
    }[loader]
    known = getattr(images, name)
    several = loader is datasets.fashion_mnist
    records = []
    for file, content in zip(known if several else [known], contents, strict=True):
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        records.append(file._replace(sha256=sha256(content), url=path.as_uri()))
    monkeypatch.setattr(images, name, tuple(records) if several else records[0])
    return records


def clothes(rng):
    """Images and labels as Fashion-MNIST has them, 5 and 3 of 4 by 6 pixels."""
    return [draw_bytes(rng, 5, 4, 6), draw_bytes(rng, 5), draw_bytes(rng, 3, 4, 6), np.arange(3)]


def pack_clothes(arrays):
    return [gzip.compress(idx(array.astype(np.uint8))) for array in arrays]


def cifar_records(labels, pixels):
    """Rows of labels (n, k), then three planes of 32 by 32, from pixels (n, 32, 32, 3)."""
    planes = [pixels[..., channel].reshape(len(pixels), -1) for channel in range(3)]
    return np.concatenate([labels, *planes], axis=1).astype(np.uint8).tobytes()


def pack_cifar10(batches):
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    return tar(
        {
            f"cifar-10-batches-bin/{name}": cifar_records(labels[:, None], pixels)
            for name, (labels, pixels) in zip(names, batches, strict=True)
        }
    )


def cifar10_batches(rng):
    return [(draw_bytes(rng, n), draw_bytes(rng, n, 32, 32, 3)) for n in (2, 1, 1, 1, 2, 3)]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_clothes_are_what_the_four_files_hold(monkeypatch, tmp_path, rng, dtype):
    arrays = clothes(rng)
    write(monkeypatch, tmp_path, datasets.fashion_mnist, pack_clothes(arrays))
    data = datasets.fashion_mnist(folder=tmp_path, dtype=dtype)
    assert data.train_images.shape == (5, 4, 6, 1)
    assert data.test_images.shape == (3, 4, 6, 1)
    np.testing.assert_array_equal(data.train_labels, arrays[1])
    np.testing.assert_array_equal(data.test_labels, arrays[3])
    for found, pixels in ((data.train_images, arrays[0]), (data.test_images, arrays[2])):
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found)[..., 0], pixels.astype(dtype) / 255)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_cifar10_joins_its_batches_in_order(monkeypatch, tmp_path, rng, dtype):
    batches = cifar10_batches(rng)
    write(monkeypatch, tmp_path, datasets.cifar10, [pack_cifar10(batches)])
    data = datasets.cifar10(folder=tmp_path, dtype=dtype)
    labels = np.concatenate([labels for labels, _ in batches[:5]])
    pixels = np.concatenate([pixels for _, pixels in batches[:5]])
    np.testing.assert_array_equal(data.train_labels, labels)
    np.testing.assert_array_equal(data.train_images, pixels.astype(dtype) / 255)
    np.testing.assert_array_equal(data.test_labels, batches[5][0])
    np.testing.assert_array_equal(data.test_images, batches[5][1].astype(dtype) / 255)
    assert data.train_images.dtype == dtype


def test_cifar100_has_fine_and_coarse_labels(monkeypatch, tmp_path, rng):
    labels, pixels = draw_bytes(rng, 7, 2), draw_bytes(rng, 7, 32, 32, 3)
    members = {
        "cifar-100-binary/train.bin": cifar_records(labels[:4], pixels[:4]),
        "cifar-100-binary/test.bin": cifar_records(labels[4:], pixels[4:]),
    }
    write(monkeypatch, tmp_path, datasets.cifar100, [tar(members)])
    fine = datasets.cifar100(folder=tmp_path)
    coarse = datasets.cifar100(coarse=True, folder=tmp_path)
    for data, column in ((coarse, 0), (fine, 1)):
        np.testing.assert_array_equal(data.train_labels, labels[:4, column])
        np.testing.assert_array_equal(data.test_labels, labels[4:, column])
        np.testing.assert_array_equal(data.train_images, pixels[:4].astype(np.float32) / 255)
        np.testing.assert_array_equal(data.test_images, pixels[4:].astype(np.float32) / 255)


def write_digits(monkeypatch, folder, rng, count):
    table = np.concatenate([rng.integers(0, 17, (count, 64)), np.arange(count)[:, None]], axis=1)
    buffer = io.StringIO()
    np.savetxt(buffer, table, delimiter=",", fmt="%d")
    write(monkeypatch, folder, datasets.digits, [gzip.compress(buffer.getvalue().encode())])
    return table


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_digits_are_split_once_and_for_all(monkeypatch, tmp_path, rng, dtype):
    table = write_digits(monkeypatch, tmp_path, rng, 23)
    data = datasets.digits(folder=tmp_path, dtype=dtype)
    assert data.train_images.shape == (19, 8, 8, 1)
    assert data.test_images.shape == (4, 8, 8, 1)
    assert data.train_images.dtype == dtype
    # the labels number the rows, so they say which is where
    rows = np.concatenate([data.train_labels, data.test_labels])
    np.testing.assert_array_equal(np.sort(rows), np.arange(23))
    pixels = np.concatenate([data.train_images, data.test_images])
    np.testing.assert_array_equal(pixels.reshape(23, 64), table[rows, :64] / 16)
    again = datasets.digits(folder=tmp_path, dtype=dtype)
    np.testing.assert_array_equal(again.test_labels, data.test_labels)
    other = datasets.digits(seed=1, folder=tmp_path, dtype=dtype)
    assert set(np.asarray(other.test_labels)) != set(np.asarray(data.test_labels))


@pytest.mark.skipif(not INSTALLED, reason="no scikit-learn")
def test_digits_of_an_installed_sklearn_are_the_real_ones():
    data = datasets.digits(download=False)
    assert (data.train_images.shape, data.test_images.shape) == ((1438, 8, 8, 1), (359, 8, 8, 1))
    labels = np.concatenate([data.train_labels, data.test_labels])
    # the class sizes that the source states
    expected = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    np.testing.assert_array_equal(np.bincount(labels), expected)
    pixels = np.concatenate([data.train_images, data.test_images])
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_images_pass_through_jit(monkeypatch, tmp_path, rng):
    write(monkeypatch, tmp_path, datasets.fashion_mnist, pack_clothes(clothes(rng)))
    data = datasets.fashion_mnist(folder=tmp_path)
    assert data.train_images.dtype == jnp.float32
    assert (data.train_labels.dtype, data.test_labels.dtype) == (jnp.int32, jnp.int32)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree))(data)
    assert type(doubled) is datasets.Images
    np.testing.assert_array_equal(doubled.test_labels, 2 * data.test_labels)


def test_a_download_lies_whole_in_the_cache(monkeypatch, tmp_path, rng, cache):
    source = tmp_path / "source"
    records = write(monkeypatch, source, datasets.fashion_mnist, pack_clothes(clothes(rng)))
    first = datasets.fashion_mnist()
    assert sorted(path.name for path in (cache / "fashion_mnist").iterdir()) == sorted(
        file.name.partition("/")[2] for file in records
    )
    for file in records:
        assert sha256((cache / file.name).read_bytes()) == file.sha256
        (source / file.name).unlink()
    again = datasets.fashion_mnist(download=False)
    np.testing.assert_array_equal(first.train_images, again.train_images)


@pytest.mark.parametrize(
    "cut", [lambda content: content[:-9], lambda content: content[:-1] + b"?"], ids=["short", "bit"]
)
def test_a_damaged_file_is_refused_and_not_kept(monkeypatch, tmp_path, rng, cache, cut):
    content = pack_cifar10(cifar10_batches(rng))
    (record,) = write(monkeypatch, tmp_path, datasets.cifar10, [content])
    (tmp_path / record.name).write_bytes(cut(content))
    for origin, options in (
        (record.url, {}),
        (tmp_path / record.name, {"folder": tmp_path}),
    ):
        message = (
            f"cifar10: got sha256 {sha256(cut(content))} of {origin}, expected {sha256(content)}"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            datasets.cifar10(**options)
    assert not list(cache.rglob("*"))


def test_a_truncated_archive_is_refused_even_where_its_checksum_is_right(
    monkeypatch, tmp_path, rng
):
    content = pack_cifar10(cifar10_batches(rng))
    write(monkeypatch, tmp_path, datasets.cifar10, [content[: len(content) // 2]])
    message = r"^cifar10: got .*, expected a whole archive with its members$"
    with pytest.raises(ValueError, match=message):
        datasets.cifar10(folder=tmp_path)


def test_an_archive_without_a_member_is_refused(monkeypatch, tmp_path):
    write(monkeypatch, tmp_path, datasets.cifar100, [tar({"cifar-100-binary/train.bin": b""})])
    message = r"^cifar100: got KeyError.*test\.bin.*, expected a whole archive with its members$"
    with pytest.raises(ValueError, match=message):
        datasets.cifar100(folder=tmp_path)


@pytest.mark.parametrize("size", [0, 3073, 2 * 3074 - 1])
def test_half_a_record_is_refused(monkeypatch, tmp_path, size):
    members = {
        "cifar-100-binary/train.bin": bytes(3074),
        "cifar-100-binary/test.bin": bytes(size),
    }
    write(monkeypatch, tmp_path, datasets.cifar100, [tar(members)])
    message = f"^cifar100: got .*test.bin of {size} bytes, expected records of 3074 bytes$"
    with pytest.raises(ValueError, match=message):
        datasets.cifar100(folder=tmp_path)


def test_other_bytes_than_idx_are_refused(monkeypatch, tmp_path, rng):
    good = pack_clothes(clothes(rng))
    raw = idx(np.zeros((5, 4, 6), np.uint8))
    for bad, message in (
        (good[0][:-9], "EOFError.*, expected a whole gzip file"),
        (b"no gzip", "BadGzipFile.*, expected a whole gzip file"),
        (gzip.compress(b""), r".*that begins with b'', expected IDX of bytes"),
        (gzip.compress(b"\0\0\x0d" + raw[3:]), ".*that begins with .*, expected IDX of bytes"),
        (gzip.compress(raw[:-1]), r".*of shape \(5, 4, 6\) with 119 bytes, expected 120 bytes"),
        (gzip.compress(raw + b"?"), r".*of shape \(5, 4, 6\) with 121 bytes, expected 120 bytes"),
        (gzip.compress(raw[:10]), ".*that begins with .*, expected IDX of bytes"),
        (
            gzip.compress(idx(np.zeros((3, 4, 6), np.uint8))),
            r"images of shape \(3, 4, 6\) with labels of shape \(5,\), expected a label for",
        ),
    ):
        write(monkeypatch, tmp_path, datasets.fashion_mnist, [bad, *good[1:]])
        with pytest.raises(ValueError, match=f"^fashion_mnist: got {message}"):
            datasets.fashion_mnist(folder=tmp_path)


def test_another_table_than_the_digits_is_refused(monkeypatch, tmp_path):
    write(monkeypatch, tmp_path, datasets.digits, [gzip.compress(b"1,2,3\n4,5,6\n")])
    message = r"^digits: got a table of shape \(2, 3\), expected 64 pixels and a label$"
    with pytest.raises(ValueError, match=message):
        datasets.digits(folder=tmp_path)


@pytest.mark.usefixtures("no_sklearn")
@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(
    ("load", "name", "advice"),
    [
        (datasets.digits, "digits.csv.gz", "pip install scikit-learn"),
        (datasets.fashion_mnist, "fashion_mnist/train-images-idx3-ubyte.gz", "zalandoresearch"),
        (datasets.cifar10, "cifar-10-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/"),
        (datasets.cifar100, "cifar-100-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/"),
    ],
)
def test_a_missing_file_is_explained(load, name, advice, download, tmp_path, cache):
    with pytest.raises(FileNotFoundError) as caught:
        load(folder=tmp_path, download=download)
    message = str(caught.value)
    assert message.startswith(f"{load.__name__}: got no {name} in {tmp_path}, {cache}, expected ")
    assert advice in message
    assert ("its download failed" in message) == download
    assert not cache.exists()


@pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)
def test_another_dtype_is_refused(load):
    message = f"^{load.__name__}: got dtype uint8, expected float32 or float64$"
    with pytest.raises(ValueError, match=message):
        load(dtype=jnp.uint8)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match=r"^digits: got seed .*, expected an integer from 0$"):
        datasets.digits(seed=seed)
