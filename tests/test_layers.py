"""Imports point only upwards in the list of layers, and `import chunkglm` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import chunkglm

PACKAGE = Path(chunkglm.__file__).parent

LAYERS = [
    "_version",
    "errors",
    "schema",
    "plan",
    "kernels",
    "design",
    "expressions",
    "entities",
    "trees",
    "grids",
    "world",
    "nifti",
    "slabs",
    "chunkfiles",
    "tasks",
    "budget",
    "blocks",
    "store",
    "convert",
    "glm",
    "append",
    "streamed",
    "contrasts",
    "fixed_effects",
    "inference",
    "xarray_plugin",
    "cluster",
    "maps",
    "bids",
    "report",
    "describe",
    "accessor",
    "request",
    "jobplan",
    "preflight",
    "provenance",
    "stale",
    "stages",
    "job",
    "testing",
    "demo",
    "cli",
    "__main__",
]
"""From the top: an import points only to what stands above it."""

ONLY_IN = {
    "nibabel": {"nifti", "testing"},
    "zarr": {"store"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
}
"""Packages that only some layers may import."""

FOR_KERNELS = {*sys.stdlib_module_names, "numpy", "scipy"}

HEAVY = ["matplotlib", "jinja2", "nilearn", "distributed", "sklearn", "hypothesis", "isal"]
"""Packages that are not imported before they are needed."""

ELSEWHERE = ["isal", "jinja2"]
"""Of these, what others import if it is installed: fsspec, a dependency of dask, isal; dask, jinja2."""


def imports(source):
    """Names that a module imports, also inside functions; not those for type checkers only."""

    class Visitor(ast.NodeVisitor):
        def __init__(self):
            self.found = []

        def visit_If(self, node):
            if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                for child in node.orelse:
                    self.visit(child)
            else:
                self.generic_visit(node)

        def visit_Import(self, node):
            self.found += [alias.name for alias in node.names]

        def visit_ImportFrom(self, node):
            if node.level:
                self.found.append("." * node.level + (node.module or ""))
            elif node.module == "chunkglm":
                self.found += [f"chunkglm.{alias.name}" for alias in node.names]
            else:
                self.found.append(node.module)

        def visit_Call(self, node):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__") and node.args:
                argument = node.args[0]
                self.found.append(argument.value if isinstance(argument, ast.Constant) else "?")
            self.generic_visit(node)

    visitor = Visitor()
    visitor.visit(ast.parse(source))
    return visitor.found


def layer_of(module):
    """The layer of chunkglm.<layer>.<...>."""
    return module.split(".")[1] if "." in module else ""


def violations(module, source):
    """What is wrong with the imports of one module, ``chunkglm.<...>``."""
    layer = layer_of(module)
    found = []
    if layer not in ("", *LAYERS):
        found.append(f"{module} is in no layer")
    for name in imports(source):
        top = name.split(".")[0]
        problem = None
        if name.startswith(".") or name == "?":
            problem = "cannot be checked"
        elif top == "chunkglm":
            target = layer_of(name)
            if target not in LAYERS:
                # `import chunkglm` or `from chunkglm import fit` in a layer imports the whole package.
                problem = "is no layer" if layer else None
            elif layer not in ("", *LAYERS):
                problem = None
            elif layer == target:
                problem = None if layer in ("kernels", "report", "store", "cli") else "is itself"
            elif layer and LAYERS.index(target) > LAYERS.index(layer):
                problem = "stands below it"
            elif target == "testing" and layer not in ("cli", "demo"):
                problem = "is for tests and the command line"
        elif top in ONLY_IN and layer not in ONLY_IN[top]:
            problem = f"belongs in {sorted(ONLY_IN[top])}"
        if layer == "kernels" and not (top in FOR_KERNELS or name.startswith("chunkglm.kernels")):
            problem = "is more than a kernel may know"
        if problem:
            found.append(f"{module} imports {name}, which {problem}")
    return found


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text("utf-8")


def test_layers__imports_point_upwards():
    found = dict(modules())
    assert len(found) > 15
    assert "chunkglm.kernels.glm" in found
    assert [problem for module, source in found.items() for problem in violations(module, source)] == []


def test_layers__the_check_sees_the_imports_of_the_package():
    """What is imported where, so that an empty answer does not pass for a clean one."""
    found = {module: imports(source) for module, source in modules()}
    assert "chunkglm.blocks" in found["chunkglm.glm"]
    assert "chunkglm.kernels" in found["chunkglm.glm"]
    assert "zarr" in found["chunkglm.store.reading"]
    assert "nibabel" in found["chunkglm.nifti"]


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("chunkglm.schema", "from chunkglm.glm import fit", "stands below it"),
        ("chunkglm.schema", "def f():\n    import chunkglm.store", "stands below it"),
        ("chunkglm.blocks", "from chunkglm import contrasts", "stands below it"),
        ("chunkglm.nifti", "if x:\n    pass\nelse:\n    from chunkglm.store import save", "stands below it"),
        ("chunkglm.kernels.glm", "import xarray as xr", "more than a kernel may know"),
        ("chunkglm.kernels.glm", "from chunkglm.errors import InputError", "more than a kernel may know"),
        (
            "chunkglm.kernels.glm",
            "class A:\n    def f(self):\n        import dask.array",
            "more than a kernel",
        ),
        ("chunkglm.convert", "import nibabel as nib", "belongs in ['nifti', 'testing']"),
        ("chunkglm.glm", "from nibabel.affines import apply_affine", "belongs in"),
        ("chunkglm.__main__", "from chunkglm.testing import simulate_run", "is for tests"),
        ("chunkglm.blocks", "import zarr.storage", "belongs in ['store']"),
        ("chunkglm.cli", "import matplotlib.pyplot", "belongs in ['report']"),
        ("chunkglm.report.html", "from chunkglm.testing import simulate_run", "stands below it"),
        ("chunkglm.glm", "from . import blocks", "cannot be checked"),
        ("chunkglm.report", "from chunkglm import fit", "is no layer"),
        ("chunkglm.job", "from chunkglm import testing", "stands below it"),
        ("chunkglm.glm", "import chunkglm", "is no layer"),
        ("chunkglm.glm", "from chunkglm.glm import fit", "is itself"),
        ("chunkglm.glm", "import importlib\nimportlib.import_module('chunkglm.cli')", "stands below it"),
        ("chunkglm.glm", "import_module(name)", "cannot be checked"),
        ("chunkglm.helpers", "x = 1", "is in no layer"),
    ],
)
def test_layers__the_check_can_fail(module, source, problem):
    (found,) = violations(module, source)
    assert problem in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "chunkglm.glm",
            "from chunkglm import nifti\nfrom chunkglm.kernels import glm\nimport numpy, xarray",
        ),
        (
            "chunkglm.schema",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from chunkglm.cli import main",
        ),
        (
            "chunkglm.kernels.a",
            "import numpy as np\nfrom scipy import stats\nfrom chunkglm.kernels.b import c",
        ),
        ("chunkglm.testing", "import nibabel\nfrom chunkglm.errors import InputError"),
        ("chunkglm.cli", "from chunkglm.testing import simulate_run\nfrom chunkglm.glm import fit"),
        ("chunkglm.demo", "from chunkglm.testing import simulate_run"),
        ("chunkglm", "from chunkglm import errors\nfrom chunkglm.glm import fit"),
    ],
)
def test_layers__the_check_lets_pass_what_is_right(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize("module", [module for module, _ in modules()])
def test_import__no_module_imports_what_is_heavy_before_it_is_needed(module):
    source = dict(modules())[module]
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    assert not {name.split(".")[0] for name in imports(ast.unparse(tree))} & set(HEAVY)


def test_import__stays_light():
    names = sorted(set(HEAVY) - set(ELSEWHERE))
    code = f"import sys, chunkglm; print(sorted({{m.split('.')[0] for m in sys.modules}} & set({names})))"
    for setup, expected in (("", "[]"), ("import hypothesis; ", "['hypothesis']")):
        done = subprocess.run(
            [sys.executable, "-c", setup + code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


def test_import__a_job_does_not_load_distributed():
    """It takes a third of a second, and dask loads it to choose between schedulers or ways to change chunks."""
    code = (
        "import sys, numpy as np, chunkglm as cg, xarray as xr\n"
        "from chunkglm.cluster import threads\n"
        "from chunkglm.testing import simulate_run\n"
        "run = simulate_run(shape=(6, 7, 8), n_volumes=40)\n"
        "ds = run.drop_vars('design').chunk(z=3, time=11)\n"
        "fit = cg.fit(ds, run['design'].to_pandas())\n"
        "with threads(2):\n"
        "    cg.fixed_effects(cg.contrast(fit, 'DSt - SSt')).z_score.compute()\n"
        "print('distributed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
