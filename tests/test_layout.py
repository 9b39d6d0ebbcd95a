"""The layout that docs/design.md promises: few files to read, imports that run one way."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT, STAGES

TOOLS = ("prepare", "sample", "app", "eval", "upload", "bench")
# Each may import from those before it, and from itself where it is a folder.
ORDER = (("common",), ("tokenizer",), ("data",), ("model",), ("clip",), ("vision",), ("train",),
         ("prep",), ("inference",), ("evals",), STAGES, ("export",), ("benchmarks",), TOOLS)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for name in RANK for path in (*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py"))}


def imports(path):
    """The modules of this project that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (name for item in node.names for name in
                        (node.module, f"{node.module}.{item.name}") if name in MODULES)
        elif isinstance(node, ast.Import):
            yield from (item.name for item in node.names if item.name in MODULES)


def test_the_root_holds_sixteen_files():
    roots = {path.stem for path in ROOT.glob("*.py")}
    assert len(roots) == 16 and roots <= RANK.keys()


def test_imports_run_downward_and_never_in_a_circle():
    below = {module: set(imports(path)) for module, path in MODULES.items()}
    for module, names in below.items():
        for name in names:
            own, other = module.split(".")[0], name.split(".")[0]
            assert RANK[other] < RANK[own] or (own == other and "." in module), f"{module}: {name}"
    tuple(TopologicalSorter(below).static_order())  # CycleError names a circle
