"""What the README, the pages of docs/ and the examples show is as they say."""

import contextlib
import itertools
import math
import pathlib
import re
import runpy
import shlex

import jax
import pytest

pytest.importorskip("tensorboardX", reason="launchers need the extra train")

import hyperlayer_jax
from train import config, glimpse, identity, sort, sparse, transformer

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
PAGES = sorted([*PAGES, *ROOT.glob("benchmarks/results/*.md")])
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
TASKS = {
    "train.sort": sort.Config,
    "train.sparse": sparse.Config,
    "train.identity": identity.Config,
    "train.glimpse": glimpse.Config,
    "train.transformer": transformer.Config,
}


def as_users_have_it():
    """The suite's strictness put aside, but for keys that are used twice."""
    stack = contextlib.ExitStack()
    for setting in (
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.debug_key_reuse(True),
    ):
        stack.enter_context(setting)
    return stack


def blocks():
    """Every block of Python: its text, under its page and line."""
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start(1)].count("\n")
            code = "\n" * line + match[1]
            yield pytest.param(page, code, id=f"{page.relative_to(ROOT)}:{line + 1}")


@pytest.mark.parametrize("page, code", list(blocks()))
def test_python_runs_as_printed(page, code, tmp_path, monkeypatch):
    """Each block alone: it makes all that it uses, so that they run in their order, too."""
    monkeypatch.chdir(tmp_path)
    if "runs/mine" in code:
        task = sparse.Config(method="random", hidden="2", steps=2, mesh="data:1")
        sparse.train_and_evaluate(task, tmp_path / "runs/mine")
    if "serialize()" in code:
        pytest.importorskip("flatbuffers")
    with as_users_have_it():
        exec(compile(code, page, "exec"), {"__name__": "block"})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path):
    """Two steps of each, to figures on held-out data, those of baselines among them."""
    assert len(path.read_text().splitlines()) <= 60
    with as_users_have_it():
        figures = runpy.run_path(str(path))["main"](steps=2)
    assert len(figures) >= 2 and all(math.isfinite(figure) for figure in figures.values())
    assert f"python examples/{path.name}\n" in path.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
        assert not target.endswith(".png") or (page.parent / target).stat().st_size < 100_000


def commands(pages):
    """(launcher, its flags) of every command, in order."""
    command = re.compile(r"""python -m (train\.\w+)((?: --[^\s`|)"]+)*)""")
    found = (command.findall(page.read_text()) for page in pages)
    return sorted(set(itertools.chain(*found)))


@pytest.mark.parametrize("name, flags", commands(PAGES))
def test_commands_are_understood(name, flags):
    """The launcher reads the flags; what it would do is left out."""
    argv = [name, *shlex.split(flags)]
    if "--help" in argv:
        with pytest.raises(SystemExit, match="0"):
            config.parse(TASKS[name], argv)
    else:
        config.make(TASKS[name], config.parse(TASKS[name], argv).given)


def test_the_readme_is_short_and_names_every_launcher():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert sum(block.values[0] == README for block in blocks()) >= 2
    assert "pip install -e '.[train]' && python -m train.sort\n" in text
    assert "pip install -e '.[test]' && python -m pytest\n" in text
    assert {name for name, _ in commands([README])} == set(TASKS)


def test_there_is_one_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {hyperlayer_jax.__version__}\n" in citation
    assert f"\n## {hyperlayer_jax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
