import hashlib
import http.client
import io
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlr import datasets, masking
from fedlr.datasets import tensors

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# 1-based rows of tecator.csv that are equal
PAIRS = """12-48 13-188 15-51 16-54 17-190 26-138 28-29 36-110 37-116 38-117 39-142 40-123 58-135
59-192 61-62 64-150 75-136 86-180 89-181 139-204 145-176 186-215"""


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def no_tensorly(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorly", None)


@pytest.fixture
def real_data(cache, monkeypatch):
    """The folder of real data, named by FEDLR_DATA after `cache` took it away."""
    if not DATA.is_dir():
        pytest.skip(f"no folder of real data at {DATA}")
    monkeypatch.setenv("FEDLR_DATA", str(DATA))
    return DATA


@pytest.fixture
def serology_file(monkeypatch, no_tensorly, rng):
    """Bytes that pass as those of the serology, and its record, which names no address."""
    buffer = io.BytesIO()
    np.save(buffer, rng.standard_normal((438, 6, 11)))
    content = buffer.getvalue()
    file = tensors._COVID_SEROLOGY._replace(sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(tensors, "_COVID_SEROLOGY", file)
    return content, file


def singular_values(x, mode):
    return np.linalg.svd(np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1), compute_uv=False)


def everything(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


@pytest.mark.usefixtures("real_data")
def test_amino_acids_are_those_of_the_source():
    data = datasets.amino_acids(dtype=jnp.float64)
    x = np.asarray(data.intensity)
    assert x.shape == (5, 201, 61)
    np.testing.assert_array_equal(data.emission, np.arange(250, 451))
    np.testing.assert_array_equal(data.excitation, np.arange(240, 301))
    assert np.unravel_index(x.argmax(), x.shape) == (1, 53, 34)
    np.testing.assert_allclose([x.min(), x.max()], [-6.204, 938.499], atol=5e-4, rtol=0)
    np.testing.assert_allclose(x.mean(), 112.4928, atol=5e-5, rtol=0)
    for mode, leading in enumerate(
        (
            (39272.3, 22595.8, 15802.7, 637.8, 460.8),
            (39292.5, 24467.9, 12644.5, 555.7),
            (45049.9, 15663.3, 5259.4, 523.1),
        )
    ):
        found = singular_values(x, mode)[: len(leading)]
        np.testing.assert_allclose(found, leading, atol=0.051, rtol=0)
    mixtures = [[1.58e-6, 5.44e-6, 3.55e-4], [8.79e-7, 4.40e-6, 2.97e-4]]
    np.testing.assert_allclose(data.concentrations[3:], mixtures, rtol=1e-12)


@pytest.mark.usefixtures("real_data")
def test_pure_amino_acids_peak_where_their_names_say():
    data = datasets.amino_acids()
    pure = data.concentrations[:3]
    np.testing.assert_array_equal(pure > 0, np.eye(3, dtype=bool))
    assert data.names == ("tryptophan", "tyrosine", "phenylalanine")
    for sample, (emission, excitation) in enumerate([(360, 274), (303, 274), (286, 255)]):
        row, column = np.unravel_index(np.argmax(data.intensity[sample]), (201, 61))
        assert (data.emission[row], data.excitation[column]) == (emission, excitation)


@pytest.mark.usefixtures("real_data")
def test_il2_response_is_that_of_the_source():
    data = datasets.il2_response(dtype=jnp.float64)
    x = np.asarray(data.response)
    assert x.shape == (13, 4, 12, 8)
    assert x.shape == tuple(map(len, (data.ligands, data.times, data.doses, data.cells)))
    np.testing.assert_array_equal(data.times, [4, 2, 1, 0.5])
    ratios = np.asarray(data.doses[1:] / data.doses[:-1])
    np.testing.assert_allclose(ratios, (0.000474 / 84.0) ** (1 / 11), rtol=1e-12)
    assert (data.doses[0], data.doses[-1]) == (84.0, 0.000474)
    assert (np.nanmin(x), np.nanmax(x)) == (0, 1)
    for found, expected, digits in (
        (np.nanmean(x), 0.153764, 6),
        (np.nanmean(x, axis=(0, 2, 3)), (0.1730, 0.1379, 0.1492, 0.1552), 4),
        (
            np.nanmean(x, axis=(0, 1, 2)),
            (0.2995, 0.2371, 0.1866, 0.1351, 0.1118, 0.0752, 0.0762, 0.1086),
            4,
        ),
        (np.nanmean(x, axis=(0, 1, 3))[[0, -1]], (0.3950, 0.0106), 4),
    ):
        np.testing.assert_allclose(found, expected, atol=0.501 * 10.0**-digits, rtol=0)
    assert (np.diff(np.nanmean(x, axis=(0, 1, 3))) < 0).all()


@pytest.mark.usefixtures("real_data")
def test_il2_response_lacks_two_ligands_at_half_an_hour():
    data = datasets.il2_response()
    _, mask = masking.from_nan(data.response)
    missing = np.zeros((13, 4, 12, 8), bool)
    missing[3:5, 3] = True
    np.testing.assert_array_equal(~mask, missing)
    assert data.times[3] == 0.5
    assert data.ligands[3:5] == ("H16N N-term (Biv)", "R38Q N-term (Biv)")


@pytest.mark.usefixtures("no_tensorly")
def test_il2_response_is_the_same_from_either_file(real_data, tmp_path):
    expected = datasets.il2_response()
    with np.load(real_data / "il2_response.npz") as arrays:
        np.save(tmp_path / "IL2_Response_Tensor.npy", arrays["X"])
    other = datasets.il2_response(folder=tmp_path)
    np.testing.assert_array_equal(other.response, expected.response)


def test_il2_response_of_an_installed_tensorly_is_the_same():
    source = pytest.importorskip("tensorly.datasets").load_IL2data()
    data = datasets.il2_response(download=False, dtype=jnp.float64)
    np.testing.assert_array_equal(data.response, np.asarray(source.tensor))
    ligands, times, doses, cells = source.ticks
    assert (list(data.ligands), list(data.cells)) == (ligands, cells)
    np.testing.assert_array_equal(data.times, times)
    np.testing.assert_array_equal(data.doses, doses)


def test_covid_serology_of_an_installed_tensorly_is_the_same():
    source = pytest.importorskip("tensorly.datasets").load_covid19_serology()
    data = datasets.covid_serology(download=False, dtype=jnp.float64)
    x = np.asarray(data.binding)
    np.testing.assert_array_equal(x, np.asarray(source.tensor))
    statuses, antigens, receptors = source.ticks
    assert data.statuses == tuple(statuses)
    assert (list(data.antigens), list(data.receptors)) == (antigens, receptors)
    assert x.shape == (438, 6, 11)
    assert np.isfinite(x).all()
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=438 * np.finfo(float).eps)


@pytest.mark.usefixtures("real_data")
def test_tecator_is_that_of_the_source():
    data = datasets.tecator(dtype=jnp.float64)
    spectra, contents = np.asarray(data.spectra), np.asarray(data.contents)
    assert (spectra.shape, contents.shape) == ((215, 100), (215, 3))
    np.testing.assert_allclose(data.wavelengths, 850 + np.arange(100) * 200 / 99, rtol=1e-12)
    assert (spectra.min(), spectra.max()) == (2.06301, 5.47374)
    np.testing.assert_allclose(spectra.mean(), 3.190852, atol=5e-7, rtol=0)
    assert contents.min(axis=0).tolist() == [39.3, 0.9, 11.0]
    assert contents.max(axis=0).tolist() == [76.6, 49.1, 21.8]
    correlations = np.corrcoef(contents.T)[np.triu_indices(3, 1)]
    leading = singular_values(spectra - spectra.mean(axis=0), 0)[:6]
    for found, expected, digits in (
        (contents.mean(axis=0), (63.2044, 18.1423, 17.6828), 4),
        (contents.std(axis=0), (9.8796, 12.7106, 3.0097), 4),
        (correlations, (-0.9881, 0.8145, -0.8609), 4),
        (leading, (74.774, 7.145, 4.097, 2.542, 0.571, 0.378), 3),
    ):
        np.testing.assert_allclose(found, expected, atol=0.501 * 10.0**-digits, rtol=0)


@pytest.mark.usefixtures("real_data")
def test_tecator_contents_nearly_close():
    total = np.asarray(datasets.tecator(dtype=jnp.float64).contents).sum(axis=1)
    found = total.min(), total.mean(), total.max()
    np.testing.assert_allclose(found, (91.8, 99.0295, 101.5), atol=5e-5, rtol=0)


@pytest.mark.usefixtures("real_data")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_distinct_samples_leaves_out_the_second_of_each_pair(dtype):
    data = datasets.tecator(dtype=dtype)
    pairs = np.array([pair.split("-") for pair in PAIRS.split()], int) - 1
    for field in (data.spectra, data.contents):
        np.testing.assert_array_equal(field[pairs[:, 0]], field[pairs[:, 1]])
    kept = np.setdiff1d(np.arange(215), pairs[:, 1])
    distinct = datasets.distinct_samples(data)
    assert len(distinct.spectra) == 193
    np.testing.assert_array_equal(distinct.spectra, data.spectra[kept])
    np.testing.assert_array_equal(distinct.contents, data.contents[kept])
    np.testing.assert_array_equal(distinct.wavelengths, data.wavelengths)


def test_distinct_samples_keeps_equal_spectra_of_other_contents(rng):
    spectra, wavelengths = jnp.ones((4, 3)), jnp.arange(3.0)
    contents = jnp.asarray(rng.standard_normal((4, 2))[[0, 1, 0, 1]])
    found = datasets.distinct_samples(datasets.Tecator(spectra, contents, wavelengths))
    np.testing.assert_array_equal(found.contents, contents[:2])
    again = datasets.distinct_samples(found)
    np.testing.assert_array_equal(again.contents, found.contents)


@pytest.mark.usefixtures("real_data")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "load",
    [datasets.amino_acids, datasets.il2_response, datasets.tecator],
    ids=lambda f: f.__name__,
)
def test_arrays_have_the_dtype_asked_for_and_pass_through_jit(load, dtype):
    data = load(dtype=dtype)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + leaf, tree))(data)
    assert type(doubled) is type(data)
    for once, twice in zip(jax.tree.leaves(data), jax.tree.leaves(doubled), strict=True):
        assert once.dtype == dtype
        np.testing.assert_array_equal(twice, 2 * once)


@pytest.mark.usefixtures("real_data")
def test_the_default_is_float32():
    assert datasets.tecator().spectra.dtype == jnp.float32


def test_folders_are_searched_in_order(monkeypatch, tmp_path, cache):
    assert datasets.search_folders() == (cache,)
    monkeypatch.setenv("FEDLR_DATA", str(tmp_path / "named"))
    assert datasets.search_folders() == (tmp_path / "named", cache)
    assert datasets.search_folders(tmp_path) == (tmp_path, tmp_path / "named", cache)
    monkeypatch.setenv("FEDLR_DATA", "")
    assert datasets.search_folders() == (cache,)


def test_the_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert datasets.search_folders("~/mine") == (
            tmp_path / "mine",
            tmp_path / ".cache" / "fedlr",
        )


def test_the_first_folder_that_has_the_file_wins(monkeypatch, serology_file, tmp_path, cache):
    content, file = serology_file
    for name, place in (("first", tmp_path / "a"), ("second", tmp_path / "b"), ("third", cache)):
        place.mkdir(parents=True)
        (place / file.name).write_text(name)
    monkeypatch.setenv("FEDLR_DATA", str(tmp_path / "b"))
    for place, folder in ((tmp_path / "a", tmp_path / "a"), (tmp_path / "b", None), (cache, None)):
        # the wrong checksum of the first found shows which one that is
        message = f"of {place / file.name}, expected {file.sha256}"
        with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
            datasets.covid_serology(folder=folder)
        (place / file.name).write_bytes(content)
        expected = np.load(io.BytesIO(content))
        found = datasets.covid_serology(folder=folder, dtype=jnp.float64).binding
        np.testing.assert_array_equal(found, expected)
        (place / file.name).unlink()


def test_serology_is_labelled_throughout(serology_file, tmp_path):
    content, file = serology_file
    (tmp_path / file.name).write_bytes(content)
    data = datasets.covid_serology(folder=str(tmp_path))
    assert data.binding.shape == tuple(map(len, (data.statuses, data.antigens, data.receptors)))
    assert data.binding.dtype == jnp.float32


def test_a_changed_file_is_refused(real_data, tmp_path, cache):
    content = bytearray((real_data / "amino_acids.npz").read_bytes())
    content[1000] ^= 1
    path = tmp_path / "amino_acids.npz"
    path.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    expected = hashlib.sha256((real_data / "amino_acids.npz").read_bytes()).hexdigest()
    message = f"amino_acids: got sha256 {found} of {path}, expected {expected}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        datasets.amino_acids(folder=tmp_path)
    assert everything(cache) == []


def download(monkeypatch, file, content, tmp_path):
    """Put the content at an address and let the serology be had from there."""
    source = tmp_path / "source"
    source.write_bytes(content)
    monkeypatch.setattr(tensors, "_COVID_SEROLOGY", file._replace(url=source.as_uri()))
    return source


def test_what_was_downloaded_is_in_the_cache(monkeypatch, serology_file, tmp_path, cache):
    content, file = serology_file
    source = download(monkeypatch, file, content, tmp_path)
    first = datasets.covid_serology()
    assert everything(cache) == [file.name]
    assert (cache / file.name).read_bytes() == content
    source.unlink()
    again = datasets.covid_serology()
    np.testing.assert_array_equal(first.binding, again.binding)


def test_a_wrong_download_leaves_nothing(monkeypatch, serology_file, tmp_path, cache):
    content, file = serology_file
    source = download(monkeypatch, file, content[:-1], tmp_path)
    found = hashlib.sha256(content[:-1]).hexdigest()
    message = f"covid_serology: got sha256 {found} of {source.as_uri()}, expected {file.sha256}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        datasets.covid_serology()
    assert everything(cache) == []


@pytest.mark.parametrize(
    "error",
    [http.client.IncompleteRead(b"half", 4), ConnectionResetError("reset"), TimeoutError("late")],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_connection_leaves_nothing(monkeypatch, serology_file, cache, error):
    class Broken(io.BytesIO):
        def read(self, *_):
            raise error

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Broken())
    with pytest.raises(FileNotFoundError, match=r"^covid_serology: .*; its download failed: "):
        datasets.covid_serology()
    assert everything(cache) == []


def test_a_full_disk_leaves_nothing(monkeypatch, serology_file, tmp_path, cache):
    content, file = serology_file
    download(monkeypatch, file, content, tmp_path)
    write = Path.write_bytes

    def half(path, data):
        write(path, data[: len(data) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="no space left"):
        datasets.covid_serology()
    assert everything(cache) == []


@pytest.mark.usefixtures("no_tensorly")
def test_nothing_is_downloaded_against_the_will(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a download")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for load in (datasets.il2_response, datasets.covid_serology):
        with pytest.raises(FileNotFoundError):
            load(download=False)
    for load in (datasets.amino_acids, datasets.tecator):
        with pytest.raises(FileNotFoundError):
            load()


@pytest.mark.usefixtures("no_tensorly")
@pytest.mark.parametrize(
    ("load", "name", "source"),
    [
        (datasets.amino_acids, "amino_acids.npz", "ucphchemometrics.com"),
        (
            datasets.il2_response,
            "il2_response.npz or IL2_Response_Tensor.npy",
            "https://raw.githubusercontent.com/tensorly/",
        ),
        (datasets.covid_serology, "COVID19_data.npy", 'pip install "fedlr[benchmarks]"'),
        (datasets.tecator, "tecator.csv", "lib.stat.cmu.edu/datasets/tecator"),
    ],
)
def test_a_missing_file_is_explained(load, name, source, monkeypatch, tmp_path, cache):
    named = tmp_path / "named"
    monkeypatch.setenv("FEDLR_DATA", str(named))
    with pytest.raises(FileNotFoundError) as caught:
        load(folder=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{load.__name__}: got no {name} in {tmp_path}, {named}, {cache}, ")
    assert "FEDLR_DATA" in message
    assert source in message
    assert everything(cache) == []


@pytest.mark.parametrize(
    "load",
    [datasets.amino_acids, datasets.il2_response, datasets.covid_serology, datasets.tecator],
    ids=lambda f: f.__name__,
)
def test_another_dtype_is_refused(load):
    message = f"^{load.__name__}: got dtype int32, expected float32 or float64$"
    with pytest.raises(ValueError, match=message):
        load(dtype=jnp.int32)
