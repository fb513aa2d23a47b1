import hashlib
import io
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io

from fedlr import datasets
from fedlr.datasets import spectra

NAMED = os.environ.get("FEDLR_DATA")
DATA = Path(NAMED) if NAMED else Path(__file__).resolve().parents[2] / "shared" / "data"
RANGES = {
    "m5spec": (0.0317151, 0.877687),
    "mp5spec": (-0.0221554, 0.80977),
    "mp6spec": (-0.0339424, 0.800767),
}
MEANS = np.array([10.234, 3.498, 8.668, 64.696])


pytestmark = pytest.mark.usefixtures("cache")


def with_ends(x, low, high):
    """Numbers from `low` to `high`, which are the first two."""
    x = low + (high - low) * (0.1 + 0.8 * x)
    x.flat[:2] = low, high
    return x


@pytest.fixture
def tables(rng):
    """Tables of the shapes, ranges and means of the set."""
    found = {name: with_ends(rng.random((80, 700)), *ends) for name, ends in RANGES.items()}
    for name, rows in (("m5nbs", 3), ("mp5nbs", 4), ("mp6nbs", 4)):
        found[name] = rng.standard_normal((rows, 700))
    contents = rng.standard_normal((80, 4)) / 10
    contents[:2, 0] = np.array([9.377, 10.993]) - MEANS[0]
    contents[2:] -= contents.sum(axis=0) / 78
    found["propvals"] = contents + MEANS
    return found


def as_object(table):
    """A MATLAB object of class dataset with a few of its fields."""
    fields = np.empty((1, 1), dtype=[(name, object) for name in ("name", "data", "axisscale")])
    fields["name"][0, 0], fields["data"][0, 0] = "NIR", table
    fields["axisscale"][0, 0] = np.arange(float(table.shape[1]))[None]
    return scipy.io.matlab.MatlabObject(fields, "dataset")


def as_struct(table):
    return {"data": table, "name": "NIR"}


def pack(tables, form=as_struct):
    buffer = io.BytesIO()
    variables = {name: form(table) for name, table in tables.items()}
    scipy.io.savemat(buffer, {"information": "corn", **variables})
    return buffer.getvalue()


def write(monkeypatch, folder, content):
    """Write a file that passes as that of the loader."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corn.mat"
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    record = spectra._CORN._replace(sha256=sha256, url=path.as_uri())
    monkeypatch.setattr(spectra, "_CORN", record)
    return path


@pytest.mark.parametrize(("form", "dtype"), [(as_object, jnp.float64), (as_struct, jnp.float32)])
def test_corn_is_what_the_file_holds(monkeypatch, tmp_path, tables, form, dtype):
    write(monkeypatch, tmp_path, pack(tables, form))
    data = datasets.corn(folder=tmp_path, dtype=dtype)
    for found, names in (
        (data.spectra, ("m5spec", "mp5spec", "mp6spec")),
        (data.standards, ("m5nbs", "mp5nbs", "mp6nbs")),
        ((data.contents,), ("propvals",)),
    ):
        for x, name in zip(found, names, strict=True):
            np.testing.assert_array_equal(x, tables[name].astype(dtype))
    np.testing.assert_array_equal(data.wavelengths, range(1100, 2500, 2))
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree))(data)
    assert type(doubled) is datasets.Corn
    assert {leaf.dtype for leaf in jax.tree.leaves(doubled)} == {jnp.dtype(dtype)}


def test_a_download_lies_whole_in_the_cache(monkeypatch, tmp_path, tables, cache):
    content = pack(tables)
    source = write(monkeypatch, tmp_path / "source", content)
    with pytest.raises(FileNotFoundError):
        datasets.corn(download=False)
    first = datasets.corn()
    assert [path.name for path in cache.iterdir()] == ["corn.mat"]
    assert (cache / "corn.mat").read_bytes() == content
    source.unlink()
    again = datasets.corn(download=False)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_other_bytes_are_refused_and_not_kept(monkeypatch, tmp_path, tables, cache):
    content = pack(tables)
    path = write(monkeypatch, tmp_path / "source", content)
    path.write_bytes(content[:-1])
    found, expected = (hashlib.sha256(b).hexdigest() for b in (content[:-1], content))
    for origin, options in ((path.as_uri(), {}), (path, {"folder": path.parent})):
        message = f"corn: got sha256 {found} of {origin}, expected {expected}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            datasets.corn(**options)
    assert not list(cache.rglob("*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m5nbs": np.ones((4, 700))}, "got m5nbs of shape (4, 700), expected (3, 700)"),
        ({"propvals": np.ones((80, 5))}, "got propvals of shape (80, 5), expected (80, 4)"),
        ({"propvals": np.tile(MEANS[[0, 2, 1, 3]], (80, 1))}, "got contents of mean [10.234"),
        ({"propvals": np.tile(MEANS, (80, 1))}, "got moisture from 10.234 to 10.234"),
        ({"mp5spec": np.full((80, 700), 0.5)}, "got mp5spec from 0.5 to 0.5, expected (-0.0221554"),
        ({"mp6spec": np.full((80, 700), np.nan)}, "got mp6spec from nan to nan, expected (-0.03"),
    ],
)
def test_other_numbers_are_refused(monkeypatch, tmp_path, tables, change, message):
    write(monkeypatch, tmp_path, pack(tables | change))
    with pytest.raises(ValueError, match=f"^{re.escape(f'corn: {message}')}"):
        datasets.corn(folder=tmp_path)


def test_instruments_in_another_order_are_refused(monkeypatch, tmp_path, tables):
    swapped = tables | {"mp5spec": tables["mp6spec"], "mp6spec": tables["mp5spec"]}
    write(monkeypatch, tmp_path, pack(swapped))
    with pytest.raises(ValueError, match=r"^corn: got mp5spec from -0.0339424 to 0.800767, expect"):
        datasets.corn(folder=tmp_path)


@pytest.mark.parametrize("form", [lambda table: table, lambda table: {"values": table}])
def test_another_layout_is_refused(monkeypatch, tmp_path, tables, form):
    write(monkeypatch, tmp_path, pack(tables, form))
    message = r"^corn: got corn.mat with .*'m5spec'.*, expected an object m5spec with a field data$"
    with pytest.raises(ValueError, match=message):
        datasets.corn(folder=tmp_path)


def test_a_missing_variable_is_refused(monkeypatch, tmp_path, tables):
    del tables["mp6nbs"]
    write(monkeypatch, tmp_path, pack(tables))
    with pytest.raises(ValueError, match=r"^corn: .*, expected an object mp6nbs with a field data"):
        datasets.corn(folder=tmp_path)


def test_a_missing_file_is_explained(tmp_path, cache):
    with pytest.raises(FileNotFoundError) as caught:
        datasets.corn(folder=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"corn: got no corn.mat in {tmp_path}, {cache}, ")
    assert "https://eigenvector.com/data/Corn/corn.mat" in message
    assert "its download failed" in message
    assert not list(cache.rglob("*"))


def test_nothing_is_downloaded_that_could_not_be_read(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a download")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=r"^corn: got dtype int32, expected float32 or float64$"):
        datasets.corn(dtype=jnp.int32)
    with pytest.raises(FileNotFoundError):
        datasets.corn(download=False)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"^corn: got no SciPy, expected it .*; pip install scip"):
        datasets.corn()


@pytest.mark.skipif(not (DATA / "corn.mat").is_file(), reason="the file is not distributed")
def test_the_original_is_read():
    data = datasets.corn(folder=DATA, download=False, dtype=jnp.float64)
    for x, ends in zip(data.spectra, RANGES.values(), strict=True):
        np.testing.assert_allclose([x.min(), x.max()], ends, rtol=2e-6)
    np.testing.assert_allclose(data.contents.mean(axis=0), MEANS, rtol=0, atol=6e-4)


def test_ranges_take_every_channel_between_the_edges_once(rng):
    x = rng.standard_normal((3, 2, 7))
    wavelengths = np.array([850.0, 1050.0, 900.0, 950.0, 1049.0, 1050.5, 849.0])
    edges = (850, 950, 1050)
    parts = datasets.spectral_ranges(jnp.asarray(x), wavelengths, edges)
    # An edge belongs to the range above it, the last one to the last range.
    for found, chosen in zip(parts, ([0, 2], [1, 3, 4]), strict=True):
        np.testing.assert_array_equal(found, x[..., chosen])
    cut = jax.jit(lambda x: datasets.spectral_ranges(x, wavelengths, edges))
    jax.tree.map(np.testing.assert_array_equal, cut(jnp.asarray(x)), parts)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ranges_of_tecator_are_its_halves(rng, dtype):
    """With the wavelengths that `tecator` returns: 850, 850 + 200 / 99, .., 1050."""
    x = jnp.asarray(rng.standard_normal((4, 100)), dtype)
    wavelengths = jnp.linspace(850, 1050, 100, dtype=dtype)
    halves = datasets.spectral_ranges(x, wavelengths, (850, 950, 1050))
    assert [part.dtype for part in halves] == [dtype, dtype]
    np.testing.assert_array_equal(halves[0], x[:, :50])
    np.testing.assert_array_equal(halves[1], x[:, 50:])


@pytest.mark.parametrize(
    ("wavelengths", "edges", "message"),
    [
        ([1.0, 2.0], (1, 2), "got wavelengths of shape (2,) for spectra of shape (4, 3), expected"),
        ([[1.0, 2.0, 3.0]], (1, 2), "got wavelengths of shape (1, 3) for spectra of shape (4, 3)"),
        ([1.0, 2.0, 3.0], (1,), "got edges (1,), expected two or more increasing numbers"),
        ([1.0, 2.0, 3.0], (1, 1), "got edges (1, 1), expected two or more increasing numbers"),
        ([1.0, 2.0, 3.0], (1, np.nan), "got edges (1, nan), expected two or more increasing"),
        ([1.0, 2.0, 3.0], (0, 1, 4), "got no wavelength from 0 to 1, expected a channel in every"),
    ],
)
def test_bad_ranges_are_refused(wavelengths, edges, message):
    x = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=f"^{re.escape(f'spectral_ranges: {message}')}"):
        datasets.spectral_ranges(x, jnp.asarray(wavelengths), edges)
