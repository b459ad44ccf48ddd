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

# Behind the first column: the end of the table's name, the attack and the metric in its JSON.
COLUMNS = [("", "clustering shift PGD-10 eps 8/255", "R@1"),
           ("-worst", "clustering eps 2/255", "R@1"), ("-worst", "clustering eps 2/255",
                                                       "R@1_label_free"),
           ("", "clustering joint against vote curve of PGD-10 up to 16/255", "eps50_255"),
           ("-worst", "template eps 2/255", "R@1"),
           ("", "template impostor curve of PGD-10 up to 16/255", "eps50_255")]
ENSEMBLES = ("at-x3", "eat", "eat-nosplit", "eat-label", "fast-x3")


def shown(metric, mean, std):
    """A cell; one seed has no deviation, and below the first radius eps50 is not measured."""
    scale = 1 if metric == "eps50_255" else 100
    if metric == "eps50_255" and mean < 0.25:
        return "< 0.25"
    form = ".2f" if metric == "eps50_255" else ".1f"
    return " ± ".join(f"{scale * value:{form}}" for value in (mean, std) if value is not None)


def test_the_table_of_results_is_the_stored_one():
    name, table = re.search(r"<!-- from results/(\S+)\.json -->\n(.*?)\n\n", README, re.S).groups()
    stored = {end: {(row["name"], row["attack"]): row for row in json.loads(
        (ROOT / f"results/{name}{end}.json").read_text())["rows"]} for end in ("", "-worst")}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert 8 <= len(rows) <= 12
    for name, *cells in rows:
        defense, rule = name.split()[0].strip("`"), " vote" * (name.strip("`") in ENSEMBLES)
        found = [stored[end][f"arena-{defense}-grocery-convnet{rule}", attack]
                 for end, attack, _ in COLUMNS]
        assert cells == [shown("R@1", *found[0]["clean"]["R@1"]), *(
            shown(metric, *own["attacked"][metric]) for own, (*_, metric) in zip(found, COLUMNS)),
            found[0]["beside"]["seconds"]], defense
