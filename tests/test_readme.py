"""README does what it says: commands parse, snippets run, its one table is the stored one."""

import builtins
import dis
import importlib
import inspect
import json
import re
import shlex
import types
from pathlib import Path

import pytest

import baselines
import common

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES, ROOT / "results/README.md"]
SCRIPTS = ("eat.py", "baselines.py", "panum_at.py", "hardness_manipulation.py", "eval.py")


def script(name):
    """The module of `eat.py`, `results/table.py` ..."""
    return importlib.import_module(Path(name).stem)


def parse(file, flags):
    """Parse a command; of a script without flags there is nothing to parse."""
    if hasattr(script(file), "parse_args"):
        return script(file).parse_args(flags)
    assert not flags


def commands(text):
    """The command lines of a text that run one of our scripts, as lists of words."""
    lines = re.findall(r"(?:^ {4,}|`|&& )(?:uv run|python) ((?:results/)?\w+\.py[^`\n]*)", text,
                       re.M)
    return [shlex.split(re.split(r"   #| > | \| ", line)[0]) for line in lines]


COMMANDS = [(text.name, command) for text in TEXTS if text.exists()
            for command in commands(text.read_text())]


@pytest.mark.parametrize("name,command", COMMANDS, ids=[" ".join(own) for _, own in COMMANDS])
def test_every_command_of_the_documents_parses(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse(command[0], command[1:])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_of_a_docstring_parse(name):
    for file, *flags in commands(script(name).__doc__):
        parse(file, flags)


def test_the_command_of_ci_stands_in_the_readme():
    section = README.split("\n## Tests\n")[1].split("\n## ")[0]
    assert re.search(r"^    (.*)$", section, re.M).group(1) == \
        "pip install -r requirements-dev.txt && python -m pytest"


@pytest.mark.parametrize("page", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if anchor else []
        assert not anchor or anchor in {
            re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in headings}


# ---- your own model, copy a function

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
    owner |= {name: baselines for name in ("at", "trades", "shift_attack", "label_attack")}
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


# ---- the table of results

# Behind the first column: attack and metric in the JSON. Rows that have another name there.
COLUMNS = [("clustering shift PGD-10 eps 8/255", "R@1"),
           ("clustering worst PGD-10 eps 8/255", "R@1"),
           ("clustering worst PGD-10 eps 8/255", "R@1_free"),
           ("clustering joint curve of PGD-10 up to 64/255", "eps50_255"),
           ("template neighbour PGD-10 eps 8/255", "R@1"), ("ers ERS PGD-32 eps 8/255", "ERS")]
STORED = {"at-x3": "ensemble"}
ENSEMBLES = ("at-x3", "eat", "eat-nosplit")


def shown(metric, mean, std):
    """A cell; eps50 below the first radius, 1/255, is not measured."""
    if metric == "eps50_255":
        return f"{mean:.2f} ± {std:.2f}" if mean >= 1 else "< 1"
    scale = 1 if metric == "ERS" else 100
    return f"{scale * mean:.1f} ± {scale * std:.1f}"


def test_the_table_of_results_is_the_stored_one():
    file, table = re.search(r"<!-- from (results/\S+\.json) -->\n(.*?)\n\n", README, re.S).groups()
    content = json.loads((ROOT / file).read_text())
    stored = {(row["name"], row["attack"]): row for row in content["rows"]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == 11 and f"at commit {content['commit'][:7]}" in README
    for name, *cells in rows:
        name = name.strip("`")
        row = f"matched-{STORED.get(name, name)}-glyphs-convnet"
        rules = [" vote", " distance"] if name in ENSEMBLES else ["", ""]
        found = [stored[row + rules[metric == "ERS"], attack] for attack, metric in COLUMNS]
        assert cells == [shown("R@1", *found[0]["clean"]["R@1"]), *(
            shown(metric, *own["attacked"][metric])
            for own, (_, metric) in zip(found, COLUMNS))], name
