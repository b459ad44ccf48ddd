"""The README does what it says: its commands parse, its snippet runs, its tables are the files."""

import ast
import builtins
import dis
import inspect
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

import baselines
import common
import eat
import eval as evaluator
import hardness_manipulation
import panum_at

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"eat.py": eat, "baselines.py": baselines, "panum_at.py": panum_at,
           "hardness_manipulation.py": hardness_manipulation, "eval.py": evaluator}
SOURCES = sorted(ROOT.glob("*.py"))


def commands(text):
    """The command lines of a text, those of its shell loops with the first values."""
    for variable, first in (("$method", "natural"), ("$seed", "0"), ("$loss", "triplet"),
                            ("$rate", "0.1"), ("$perturb", "anchor"), ("$source", "random"),
                            ("$destination", "semihard"), ("$eta", "2")):
        text = text.replace(variable, first)
    found = re.findall(r"(?:^ {4,}|`)(?:uv run|python) (\w+\.py[^`\n]*)", text, re.M)
    return [shlex.split(line.split("   #")[0]) for line in found]


@pytest.mark.parametrize("command", commands(README), ids=" ".join)
def test_every_command_in_the_readme_parses(command, tmp_path, monkeypatch):
    script, *flags = command
    monkeypatch.chdir(tmp_path)                      # --resume looks for a run's folder
    SCRIPTS[script].parse_args(flags)


@pytest.mark.parametrize("table", ["", "--matched"])
def test_every_command_of_the_table_over_all_defenses_parses(table, tmp_path, monkeypatch):
    shown = subprocess.run([sys.executable, ROOT / "results/all_defenses.py", "--print",
                            *table.split()], capture_output=True, text=True, check=True).stdout
    monkeypatch.chdir(tmp_path)                      # --resume looks for a run's folder
    found = [shlex.split(line)[1:] for line in shown.splitlines()]
    parsed = [(script, SCRIPTS[script].parse_args(flags)) for script, *flags in found]
    outs = [args.out for script, args in parsed if script != "eval.py"]
    assert len(outs) == len(set(outs)) == 3 * 16
    assert {out.startswith("runs/matched-") for out in outs} == {bool(table)}
    attacked = [args.runs for script, args in parsed if script == "eval.py" and not args.checks]
    assert attacked[:-1] == [[out] for out in outs] and len(attacked[-1]) == 16
    checked = [args.runs for script, args in parsed if script == "eval.py" and args.checks]
    assert checked == [[out] for out in outs if out.endswith("-s0") and not table]
    assert {args.protocol for script, args in parsed
            if script == "eval.py" and not args.checks} == {"all"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_in_a_scripts_docstring_parse(script):
    for name, *flags in commands(SCRIPTS[script].__doc__):
        SCRIPTS[name].parse_args(flags)


def test_the_snippet_for_your_own_model_runs(capsys):
    snippet = re.search(r"<!-- test: own-model -->\n```python\n(.*?)```", README, re.S).group(1)
    exec(compile(snippet, "README.md", "exec"), {})
    clean, attacked, warning = capsys.readouterr().out.split(maxsplit=2)
    assert 0 <= float(attacked) <= 1 and 0 <= float(clean) <= 1
    assert "unit vectors" in warning


def globals_of(code):
    """The global names that a code object and those inside it read."""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            yield instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from globals_of(inner)


PASTE = re.search(r"<!-- test: paste -->\n.*\n.*\n((?:\|.*\n)+)", README).group(1).splitlines()


@pytest.mark.parametrize("row", PASTE, ids=lambda row: row.split("`")[1])
def test_what_is_to_be_pasted_needs_nothing_else(row):
    preamble = re.search(r"Under\n((?:`[^`]+`[, and\n]*)+)each runs", README).group(1)
    names, owner = re.findall(r"`([^`]+)`", preamble + row), dict.fromkeys(vars(common), common)
    owner |= {name: baselines for name in ("at", "trades", "shift_attack")}
    space = {}
    for name in sorted(names, key=str.isidentifier):            # imports and constants come first
        if name.endswith(".py"):
            continue
        code = inspect.getsource(getattr(owner[name], name)) if name.isidentifier() else name
        exec(compile(code, name, "exec"), space)
    pasted = [value for value in space.values() if inspect.isfunction(value)]
    assert pasted
    for function in pasted:
        code = inspect.unwrap(function).__code__
        assert set(globals_of(code)) <= space.keys() | vars(builtins).keys(), function.__name__


@pytest.mark.parametrize("name", re.findall(r"<!-- (results/\S+\.md) -->", README))
def test_every_table_of_the_readme_is_its_file(name):
    assert f"<!-- {name} -->\n{(ROOT / name).read_text()}<!-- end -->" in README


# Of benchmarks.md, claims.md and costs: test_benchmarks.py, test_claims.py, test_reproduce.py
@pytest.mark.parametrize("path", [path for path in sorted(ROOT.glob("results/*.json")) if not
                                  re.search("^benchmarks-|-cost$", path.stem)],
                         ids=lambda path: path.stem)
def test_every_table_is_its_json(path):
    content = json.loads(path.read_text())
    assert evaluator.table_markdown(content) == path.with_suffix(".md").read_text()
    for row in content["rows"]:
        assert any(row["name"].startswith(configuration) for configuration in content["flags"])
    for own in content["flags"].values():
        assert "/" not in own["data_root"] + own["out"] + own["weights"]


def test_the_header_of_every_script_names_the_requirements():
    wanted = (ROOT / "requirements.txt").read_text().split()
    for script in SCRIPTS:
        header = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / script).read_text(), re.S | re.M)
        listed = re.search(r"^# dependencies = (\[.*\])$", header.group(1), re.M).group(1)
        assert json.loads(listed) == wanted
        assert '# requires-python = ">=3.10"' in header.group(1)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_file_names_its_licence_and_imports_only_what_is_promised(source):
    text = source.read_text()
    assert text.startswith("# SPDX-License-Identifier: MIT\n")
    allowed = {"torch", "torchvision", "numpy"} | set(sys.stdlib_module_names)
    allowed |= set() if source.name == "common.py" else {"common"}
    optional = {"tqdm", "scipy", "matplotlib", "sklearn"}       # imported where they are used
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or (top in optional and node.col_offset > 0), name


def test_ci_runs_the_readmes_test_command():
    section = README.split("## Tests")[1].split("\n## ")[0]
    assert re.search(r"^    (.*)$", section, re.M).group(1) == \
        "pip install -r requirements-dev.txt && python -m pytest"


def test_every_flag_of_a_method_is_explained():
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit) as stopped:
            script.parse_args(["--help"])
        assert stopped.value.code == 0
