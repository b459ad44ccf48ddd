"""The house of DESIGN.md: how big its rooms are, what may import what, and two files are enough."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("eat", "panum_at", "hardness_manipulation", "baselines")
PRODUCT = [ROOT / f"{name}.py" for name in (*METHODS, "common", "eval")]
SOURCES = [*PRODUCT, *(path for folder in ("results", "benchmarks", "tests")
                       for path in sorted((ROOT / folder).glob("*.py")))]
LINES = {"eat.py": 150, "panum_at.py": 220, "hardness_manipulation.py": 210, "baselines.py": 340,
         "common.py": 1850, "eval.py": 1250, "README.md": 250}
FLAGS = {"eat": 34, "panum_at": 34, "hardness_manipulation": 34, "baselines": 39, "eval": 20}
TOP = {*LINES, "pyproject.toml", ".gitignore", "requirements.txt", "requirements-dev.txt",
       "LICENSE", "CITATION.cff", "results", "docs", "benchmarks", "tests", ".ci"}


def lines_of(path):
    return path.read_text().splitlines()


def imports_of(nodes):
    """The top-level names of the modules that these nodes of a syntax tree import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


# ---- sizes

@pytest.mark.parametrize("file", LINES)
def test_a_file_keeps_to_its_lines(file):
    assert len(lines_of(ROOT / file)) <= LINES[file]


def test_the_tests_keep_to_their_lines():
    assert sum(len(lines_of(path)) for path in (ROOT / "tests").glob("*.py")) <= 8000


def test_pgd_is_on_the_first_screens_of_common():
    assert 0 < lines_of(ROOT / "common.py").index(
        "def pgd(objective, images, eps: float, step_size: float, steps: int, random_start: bool = "
        "True,") < 349


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_line_has_at_most_100_columns_and_a_product_names_its_licence(path):
    assert max(map(len, lines_of(path))) <= 100
    assert path.parent.name == "tests" or lines_of(path)[0] == "# SPDX-License-Identifier: MIT"


@pytest.mark.parametrize("name", FLAGS)
def test_help_is_short_and_shows_fractions(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(name).parse_args(["--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  (?:-\w, )?--([a-z-]+)", text.split("\noptions:\n")[1], re.M)
    flags += ["RUN"] if name == "eval" else []
    assert "help" in flags and 10 < len(flags) - 1 <= FLAGS[name], flags
    if name == "eat":
        assert len(text.splitlines()) <= 120 and re.search(r"--eps EPS .*16/255\)", text)


def test_nothing_else_lies_at_the_top():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    found = {line.split("/")[0] for line in git.stdout.splitlines() if (ROOT / line).exists()}
    if git.returncode:                           # an unpacked archive
        found = {path.name for path in ROOT.iterdir() if path.name[0] not in "._"}
    assert found - TOP - ({"data", "runs"} if git.returncode else set()) == set()
    assert {*LINES} <= found


# ---- arrows

@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)
def test_a_script_imports_common_alone_of_ours_and_common_nothing(path):
    tree = ast.parse(path.read_text())
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "numpy"}
    ours = set() if path.name == "common.py" else {"common"}
    assert set(imports_of(tree.body)) <= allowed | ours
    files = {source.stem for source in SOURCES}
    assert set(imports_of(ast.walk(tree))) & files == ours
    assert set(imports_of(ast.walk(tree))) <= allowed | ours | {"tqdm", "scipy", "PIL"}
    header = re.search(r"^# dependencies = (\[.*\])$", path.read_text(), re.M)
    assert path.name == "common.py" or json.loads(header.group(1)) == lines_of(
        ROOT / "requirements.txt")
    assert not any(isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__")
                   for node in ast.walk(tree))


def test_a_script_and_common_alone_run_to_the_end(tmp_path):
    program = ["import os, runpy, sys"]          # one process: torch is imported once
    for name in METHODS:
        place = tmp_path / name
        place.mkdir()
        for file in (f"{name}.py", "common.py"):
            (place / file).write_bytes((ROOT / file).read_bytes())
        argv = [f"{name}.py", *("--dataset gaussian --image-size 16 --embedding-dim 4 --epochs 1 "
                                "--attack-steps 1 --limit-queries 8 --out run").split()]
        program += [f"os.chdir({str(place)!r}); sys.path[0], sys.argv = os.getcwd(), {argv!r}",
                    "sys.modules.pop('common', None)",
                    f"runpy.run_path({argv[0]!r}, run_name='__main__')"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", "\n".join(program)], cwd=tmp_path, text=True,
                          capture_output=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for name in METHODS:
        assert {path.name for path in (tmp_path / name / "run").iterdir()} == \
            {"args.json", "log.jsonl", "last.pt", "results.json"}
    assert done.stdout.count("8 images of 2 unseen classes, a fixed subset") == 5
