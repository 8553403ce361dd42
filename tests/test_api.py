"""The house rules: imports run downwards, names are documented, options are keyword-only."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from flax import nnx

import hyperlayer_jax
import hyperlayer_jax.nn
from hyperlayer_jax import kernels

ROOT = Path(__file__).parents[1]
PUBLIC = [
    (module.__name__, name, getattr(module, name))
    for module in (hyperlayer_jax, hyperlayer_jax.nn, kernels)
    for name in module.__all__
]
FUNCTIONS = [entry for entry in PUBLIC if inspect.isfunction(entry[2])]
CLASSES = [entry for entry in PUBLIC if inspect.isclass(entry[2])]
MODULES = [entry for entry in CLASSES if entry[0] == "hyperlayer_jax.nn"]

# From the bottom up: a module imports only modules of lower lines.
LAYERS = [
    {"hyperlayer_jax.kernels"},
    {"hyperlayer_jax.lift", "hyperlayer_jax.types"},
    {"hyperlayer_jax.checks"},
    {"hyperlayer_jax.transforms"},
    {"hyperlayer_jax.grids"},
    {"hyperlayer_jax.sampling"},
    {"hyperlayer_jax.density"},
    {"hyperlayer_jax.tensors"},
    {"hyperlayer_jax.hyperlayer", "hyperlayer_jax.exchange"},
    {"hyperlayer_jax.attention", "hyperlayer_jax.content", "hyperlayer_jax.sort"},
    {"hyperlayer_jax.ranks"},
    {"hyperlayer_jax"},
    {"hyperlayer_jax.nn"},
    {"train"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
NUMERIC = {"jax", "numpy"}


def ids(entries):
    return [f"{module}.{name}" for module, name, _ in entries]


def sources():
    """(module, path) of every source file."""
    folders = [ROOT / "hyperlayer_jax", ROOT / "hyperlayer_jax" / "nn"]
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        inside = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(("hyperlayer_jax", *inside)), path
    for path in sorted((ROOT / "train").glob("*.py")):
        yield f"train.{path.stem}", path


def layer_of(module):
    """The line of LAYERS that a module belongs to: that of its longest known prefix."""
    parts = module.removesuffix(".__init__").split(".")
    if len(parts) == 2 and parts[0] == "hyperlayer_jax":
        return ".".join(parts)
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in LEVEL:
            return ".".join(parts[:end])
    return None


def imports(module, path):
    """The full names that a file imports, relative ones resolved."""
    known = {name.removesuffix(".__init__") for name, _ in sources()} | set(LEVEL)
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield name if name in known else base


@pytest.mark.parametrize(
    ("module", "path"), list(sources()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_imports_run_downwards(module, path):
    own = layer_of(module)
    assert own in LEVEL, f"{module} has no place in LAYERS"
    for name in imports(module, path):
        top = name.split(".")[0]
        if top in ("kernels", "tests", "benchmarks"):
            pytest.fail(f"{module} imports {name}, which is not installed")
        if top in ("hyperlayer_jax", "train"):
            other = layer_of(name)
            assert other == own or LEVEL[other] < LEVEL[own], f"{module} imports {name}"
            inside = other == "hyperlayer_jax.kernels" != own
            assert not inside or name == other, (
                f"{module} imports {name}, want what {other} exports"
            )
            assert own != "hyperlayer_jax.kernels" or other == own, f"{module} imports {name}"
        elif own == "hyperlayer_jax.nn":
            assert top in NUMERIC | {"flax"} | sys.stdlib_module_names, f"{module} imports {name}"
        elif own != "train":
            assert top in NUMERIC | sys.stdlib_module_names, f"{module} imports {name}"


def test_importing_the_core_leaves_flax_alone():
    code = (
        "import hyperlayer_jax, sys; assert not {m.split('.')[0] for m in sys.modules} & {'flax'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_listed_in_order_and_exists():
    for module in (hyperlayer_jax, hyperlayer_jax.nn, kernels):
        assert module.__doc__ and module.__all__ == sorted(module.__all__)
    own = {
        name
        for name, value in vars(hyperlayer_jax).items()
        if getattr(value, "__module__", "").startswith("hyperlayer_jax") and name[0] != "_"
    }
    assert own == set(hyperlayer_jax.__all__)


def arguments_of(function):
    return [p for p in inspect.signature(function).parameters.values() if p.name != "self"]


def has_shapes(doc):
    return re.search(r"\[[*\w][^\]]*\]", doc) is not None


@pytest.mark.parametrize(("module", "name", "value"), PUBLIC, ids=ids(PUBLIC))
def test_every_public_name_is_documented(module, name, value):
    """In own words, with an entry for each argument, and shapes in brackets where arrays are."""
    assert value.__doc__ and re.match(r"[A-Z].*\.", value.__doc__, re.DOTALL)
    functions = [value] if inspect.isfunction(value) else []
    if inspect.isclass(value) and issubclass(value, nnx.Module):
        functions = [value.__init__, value.__call__]
        assert has_shapes(value.__call__.__doc__)
    elif not inspect.isfunction(value) or "Array" in str(inspect.signature(value)):
        assert has_shapes(value.__doc__)
    for function in functions:
        doc = inspect.getdoc(function)
        assert doc, function
        if function.__name__ == "__call__":
            continue
        for parameter in arguments_of(function):
            assert re.search(rf"\b{parameter.name}\b", doc), (function, parameter.name)


@pytest.mark.parametrize(("module", "name", "value"), FUNCTIONS, ids=ids(FUNCTIONS))
def test_keys_come_first_and_are_named_key(module, name, value):
    parameters = [p.name for p in arguments_of(value)]
    described = re.findall(r"^\s*(\w+): a PRNG key", value.__doc__, re.MULTILINE)
    assert described in ([], ["key"])
    if value is hyperlayer_jax.sparse_attention:
        # Attention has keys of its own.
        parameters.remove("key")
    assert ("key" in parameters) == (described == ["key"])
    assert "key" not in parameters[1:] and not {"rng", "seed", "prng_key"} & set(parameters)


@pytest.mark.parametrize(
    ("module", "name", "value"), FUNCTIONS + MODULES, ids=ids(FUNCTIONS + MODULES)
)
def test_options_are_keyword_only_and_explicit(module, name, value):
    functions = [value.__init__] if inspect.isclass(value) else [value]
    functions += [value.set_view] if "set_view" in vars(value) else []
    for function in functions:
        for p in arguments_of(function):
            assert p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            assert p.default is p.empty or p.kind == p.KEYWORD_ONLY, f"{name}: {p}"
            assert module == "hyperlayer_jax.kernels" or p.annotation is not p.empty


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(tmp_path):
    """Built from a copy, installed into a folder of its own, imported from an empty one."""
    source, wheels, site, empty = (tmp_path / n for n in ("source", "wheels", "site", "empty"))
    ignored = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "build", "runs", ".*")
    shutil.copytree(ROOT, source, ignore=ignored)
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True, cwd=empty)
    (wheel,) = wheels.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([*pip, *install], check=True, cwd=empty)
    assert {path.name for path in site.iterdir() if "." not in path.name} == {"hyperlayer_jax"}
    code = (
        "import importlib, pathlib, hyperlayer_jax, hyperlayer_jax.nn, hyperlayer_jax.kernels\n"
        f"assert pathlib.Path(hyperlayer_jax.__file__).is_relative_to({str(site)!r})\n"
        f"assert pathlib.Path(hyperlayer_jax.kernels.__file__).is_relative_to({str(site)!r})\n"
    )
    # Without user or editable installs in the way: those of the running interpreter come after.
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=empty, env=environment)
