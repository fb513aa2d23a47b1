import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A module imports only from strictly lower floors. A new module is given its floor here.
FLOORS = {
    "_checks": 0,
    "_cholesky": 0,
    "_partials": 0,
    "_precision": 0,
    "_alternating": 1,
    "_fourier": 1,
    "_joseph": 1,
    "_transpose": 1,
    "convolution.patches": 1,
    "convolution.transform": 2,
    "convolution": 2,
    "iteration": 1,
    "masking": 1,
    "multilinear": 1,
    "proximal": 1,
    "sketching": 1,
    "curvature._trees": 1,
    "curvature.hessians": 2,
    "curvature.updates": 2,
    "curvature": 2,
    "information._pairs": 1,
    "information.bounds": 2,
    "information.contrast": 2,
    "information.critics": 2,
    "information.gaussian": 2,
    "information": 2,
    "lowrank": 2,
    "noise": 2,
    "operators": 2,
    "phantoms": 2,
    "subspace": 2,
    "tomography": 2,
    "ellipsoids": 3,
    "multimodal": 3,
    "tucker": 3,
    "cp.tensor": 3,
    "cp.fitting": 4,
    "cp.diagnostics": 4,
    "cp.validation": 5,
    "cp.uncertainty": 5,
    "datasets.files": 3,
    "datasets.images": 4,
    "datasets.spectra": 4,
    "datasets.tensors": 4,
    "linked.model": 4,
    "linked.coupled": 5,
    "linked.fitting": 5,
    "linked.theory": 5,
    "linked.selection": 6,
    "linked.variational": 6,
    "synthetic.features": 4,
    "synthetic.scans": 4,
    "synthetic.sums": 4,
    "synthetic.tensors": 4,
    "federated.protocol": 5,
    "federated.aggregators": 6,
    "federated.checkpoints": 6,
    "federated.availability": 6,
    "federated.clients": 6,
    "federated.compressors._leafwise": 6,
    "federated.compressors.messages": 6,
    "federated.compressors.feedback": 7,
    "federated.compressors.low_rank": 7,
    "federated.compressors.quantization": 7,
    "federated.compressors.sketches": 7,
    "federated.compressors.sparse": 7,
    "federated.compressors": 7,
    "federated.coupling": 6,
    "federated.execution": 6,
    "federated.local.reconstruction": 6,
    "federated.local.training": 6,
    "federated.local.contrastive": 7,
    "federated.local.low_rank": 7,
    "federated.local": 7,
    "federated.partition._assignment": 5,
    "federated.partition.diagnostics": 6,
    "federated.partition.features": 7,
    "federated.partition.labels": 6,
    "federated.partition.sizes": 6,
    "federated.partition.splitting": 6,
    "federated.partition": 7,
    "federated.privacy._numbers": 6,
    "federated.privacy.accounting": 7,
    "federated.privacy.mechanism": 7,
    "federated.privacy": 7,
    "federated.products": 8,
    "federated.ranks": 6,
    "federated.servers": 6,
    "federated.stopping.levels": 6,
    "federated.stopping.rules": 7,
    "federated.stopping": 7,
    "federated.traffic": 8,
    "federated.channels": 8,
    "federated.rounds.combining": 7,
    "federated.rounds.composition": 8,
    "federated.rounds.recording": 7,
    "federated.rounds.running": 7,
    "federated.rounds.simulation": 8,
    "federated.rounds": 8,
    "algorithms.comp_jf": 9,
    "algorithms.fdrmfl": 9,
    "algorithms.fedavg": 9,
    "algorithms.fedex_lora": 9,
    "algorithms.fedhm": 9,
    "algorithms.fedlora": 9,
    "algorithms.fedloru": 9,
    "algorithms.fedlrt": 9,
    "algorithms.fednova": 9,
    "algorithms.fedpara": 9,
    "algorithms.ffa_lora": 9,
    "algorithms.firm": 9,
    "algorithms.flexlora": 9,
    "algorithms.flora": 9,
    "algorithms.local_only": 9,
    "algorithms.low_rank_descent": 9,
    "algorithms.scaffold": 9,
    "algorithms.mfedloru": 9,
    "algorithms.moon": 9,
    "algorithms.pfedloru": 9,
    "algorithms.rolora": 9,
    "algorithms.vertical_multifac": 9,
    "__main__": 10,
}
PACKAGES = {
    "",
    "algorithms",
    "convolution",
    "cp",
    "curvature",
    "datasets",
    "federated",
    "federated.compressors",
    "federated.local",
    "federated.partition",
    "federated.privacy",
    "federated.rounds",
    "federated.stopping",
    "information",
    "linked",
    "synthetic",
}


def read_package(folder):
    """Return the source of every file by its module name inside the package ("" for the root)."""
    sources = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return sources


def imports(source):
    """Yield the text and the targets inside the package of every import, and its top package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield ast.unparse(node), [alias.name], alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield ast.unparse(node), names, module.partition(".")[0]


def faults(sources, floors):
    """List every import, module and `__init__` that breaks a rule of the house."""
    found = []
    for name, source in sources.items():
        if name in PACKAGES:
            found += [f"{name or 'fedlr'}: logic in __init__: {text}" for text in logic(source)]
            continue
        if name not in floors:
            found.append(f"{name}: has no floor")
            continue
        for text, targets, top in imports(source):
            if top == "":
                found.append(f"{name}: relative: {text}")
            if top != "fedlr":
                continue
            for target in targets:
                other = target.removeprefix("fedlr").removeprefix(".")
                if other not in floors or not text.startswith("from"):
                    found.append(f"{name}: not `from package import module`: {text}")
                elif floors[other] >= floors[name]:
                    found.append(f"{name} (F{floors[name]}): imports F{floors[other]}: {text}")
    return found


def logic(source):
    """Yield what an `__init__` holds besides its docstring, re-exports, names and a version."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        targets = [ast.unparse(t) for t in node.targets] if isinstance(node, ast.Assign) else []
        if targets not in (["__all__"], ["__version__"]):
            yield ast.unparse(node)


def test_every_module_imports_from_lower_floors_only():
    assert faults(read_package(ROOT / "fedlr"), FLOORS) == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("low", "from fedlr import high", "imports F2"),
        ("low", "from fedlr import peer", "imports F1"),
        ("low", "def f():\n    from fedlr import high", "imports F2"),
        ("low", "import fedlr.zero", "not `from package import module`"),
        ("low", "import fedlr", "not `from package import module`"),
        ("low", "from fedlr.zero import function", "not `from package import module`"),
        ("low", "from fedlr import zero, unknown", "not `from package import module`"),
        ("low", "from . import zero", "relative"),
        ("new", "import math", "has no floor"),
        ("federated", "CACHE = {}", "logic in __init__"),
        ("", "def f(): ...", "logic in __init__"),
    ],
)
def test_a_broken_rule_is_found(name, source, fault):
    floors = {"zero": 0, "low": 1, "peer": 1, "high": 2}
    found = faults({name: source}, floors)
    assert len(found) == 1
    assert fault in found[0]


def test_what_the_house_allows_is_no_fault():
    floors = {"zero": 0, "federated.part": 1, "low": 1}
    sources = {
        "": '"""About."""\nfrom fedlr import low\n__all__ = ["low"]\n__version__ = "1"',
        "federated": '"""About."""\nfrom fedlr.federated.part import name',
        "low": "import math\nimport jax.numpy as jnp\nfrom fedlr import zero",
        "federated.part": "from fedlr import zero",
    }
    assert faults(sources, floors) == []


def test_the_library_imports_its_core_dependencies_only():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {line.split(">=")[0] for line in project["dependencies"]}
    allowed = sys.stdlib_module_names | declared | {"fedlr"}
    found = {
        (name, top)
        for name, source in read_package(ROOT / "fedlr").items()
        for _, _, top in imports(source)
        if top not in allowed
    }
    assert found == set()
