import doctest
import importlib
import inspect
import re
import types
import typing
from pathlib import Path

import jax
import pytest

import fedlr

PACKAGE = Path(fedlr.__file__).parent
MODULES = sorted(
    ".".join(("fedlr", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)
PUBLIC = [name for name in MODULES if not name.rpartition(".")[2].startswith("_")]


@pytest.fixture
def fresh_settings():
    """JAX as it is after a plain import, whatever the other tests need."""
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield
    jax.clear_caches()  # one module of tests runs the examples of all of them


def find_examples(module):
    """Collect the examples of a module. Without its globals: each brings its own imports."""
    return doctest.DocTestFinder(exclude_empty=True).find(module, globs={})


def run_examples(tests):
    """Run the examples and return how many were tried and what went wrong."""
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    report = []
    for test in tests:
        runner.run(test, out=report.append)
    return runner.summarize(verbose=False), "".join(report)


def documented_names(docstring, section):
    """Return the names listed in a section of a Google docstring, in their order."""
    match = re.search(rf"^{section}:\n(.*?)(?=^\S|\Z)", docstring, re.MULTILINE | re.DOTALL)
    if match is None:
        return []
    heads = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", match.group(1), re.MULTILINE)
    return [name.strip().lstrip("*") for head in heads for name in head.split(",")]


def docstring_faults(name, obj):
    """List what the docstring of a public function or class leaves out or gets wrong."""
    docstring = inspect.getdoc(obj)
    if not docstring or obj.__doc__ is None:
        return [f"{name}: no docstring"]
    listed = documented_names(docstring, "Attributes") + documented_names(docstring, "Args")
    if inspect.isclass(obj):
        fields = [] if getattr(obj, "_is_protocol", False) else list(typing.get_type_hints(obj))
        missing = [field for field in fields if field not in listed]
        return [f"{name}: does not document {missing}"] if missing else []
    faults = []
    signature = inspect.signature(obj)
    if listed != list(signature.parameters):
        faults.append(f"{name}: takes {list(signature.parameters)}, documents {listed}")
    says = re.search(r"^(Returns|Yields):\n", docstring, re.MULTILINE)
    if not says and not docstring.startswith("Return ") and signature.return_annotation is not None:
        faults.append(f"{name}: says not what it returns")
    return faults


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.usefixtures("fresh_settings")
def test_examples_print_what_they_say(name):
    results, report = run_examples(find_examples(importlib.import_module(name)))
    assert results.failed == 0, report


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    everything = [(f"{name}.{item}", getattr(module, item)) for item in module.__all__]
    # The rest are type aliases, which hold no docstring.
    objects = [item for item in everything if isinstance(item[1], (type, types.FunctionType))]
    assert [fault for item in objects for fault in docstring_faults(*item)] == []
    functions = [item for item, obj in objects if inspect.isfunction(obj)]
    assert not functions or find_examples(module), "no function has an example"


def test_wrong_docstrings_are_found():
    def scale(x, factor):
        """Scale an array.

        >>> 1 + 1
        3

        Args:
            x: Array.

        Returns:
            Array.
        """
        return x * factor

    class Pair(typing.NamedTuple):
        """Two numbers.

        Attributes:
            first: One of them.
        """

        first: int
        second: int

    assert docstring_faults("scale", scale) == [
        "scale: takes ['x', 'factor'], documents ['x']",
    ]
    assert docstring_faults("Pair", Pair) == ["Pair: does not document ['second']"]
    results, report = run_examples(doctest.DocTestFinder().find(scale, globs={}))
    assert results == (1, 1)
    assert "+ 2" in report
