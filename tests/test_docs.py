"""The teaching pages do what they say: references, quoted lines, commands, snippets, numbers."""

import ast
import json
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest
from test_readme import ROOT, SCRIPTS, commands

import eval as evaluator

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
METHODS = ["baselines.md", "eat.md", "evaluation.md", "hardness_manipulation.md", "panum_at.md"]
SECTIONS = ["The idea", "The equations", "Line by line", "What the log says",
            "How it fails, and how one sees it", "Fidelity", "Measured", "In your own loop",
            "Exercises"]
EVERY = [*PAGES, README]
REFERENCE = re.compile(r"`([\w/]+\.py):([^`\s]+)`")


def named(path):
    return path.name


def section(text, title):
    """What stands below a heading of the second level."""
    return re.split(r"^## ", text.split(f"\n## {title}\n", 1)[1], flags=re.M)[0]


@cache
def definitions(file):
    """{name: its source} of a file's functions, classes, methods and assignments."""
    text, found = (ROOT / file).read_text(), {}
    lines = text.split("\n")

    def visit(body, prefix=""):
        for node in body:
            names = []
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign):
                names = [name.id for target in node.targets for name in ast.walk(target)
                         if isinstance(name, ast.Name)]
            for name in names:
                found[prefix + name] = "\n".join(lines[node.lineno - 1:node.end_lineno])
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(ast.parse(text).body)
    return found


def source_of(reference):
    file, name = REFERENCE.fullmatch(reference).groups()
    assert (ROOT / file).exists(), f"{reference}: no such file"
    assert name in definitions(file), f"{reference}: not defined there"
    return definitions(file)[name]


def squeezed(text):
    return " ".join(text.split())


def tables(text, mark):
    """The tables below a comment `mark`: [(the mark's groups, head, rows)] of lists of cells."""
    for found in re.finditer(rf"^<!-- {mark} -->\n((?:\|.*\n)+)", text, re.M):
        *groups, body = found.groups()
        rows = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                for line in body.splitlines()]
        assert all(len(row) == len(rows[0]) for row in rows), f"{found.group(0)[:60]}: ragged table"
        yield groups, rows[0], rows[2:]


# ---- references and links

def test_there_is_a_page_for_every_method_and_the_evaluator():
    assert [page.name for page in PAGES] == METHODS


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_pages_have_the_same_sections_and_one_sitting(page):
    text = page.read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == SECTIONS
    assert len(text.splitlines()) <= 250
    idea = squeezed(section(text, "The idea"))
    assert len(re.findall(r"[.](?: |$)", idea)) == 5, "the idea takes five sentences"


@pytest.mark.parametrize("page", EVERY, ids=named)
def test_every_reference_resolves(page):
    text = page.read_text()
    for found in REFERENCE.finditer(text):
        source_of(found.group(0))
    for file in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / file).exists(), file
    assert not re.search(r"\.py[:#]L?\d", text), "a line number would rot: name the function"


@pytest.mark.parametrize("page", EVERY, ids=named)
def test_every_relative_link_leads_somewhere(page):
    headings = {}
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = page if not file else page.parent / file
        assert path.exists(), target
        if anchor:
            slugs = headings.setdefault(path, {
                re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-")
                for line in re.findall(r"^#+ (.*)$", path.read_text(), re.M)})
            assert anchor in slugs, target


def test_the_readme_links_every_page():
    for page in PAGES:
        assert f"](docs/{page.name}" in README.read_text()


# ---- quoted code

@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_quoted_line_stands_in_the_function_named_beside_it(page):
    found = list(tables(section(page.read_text(), "Line by line"), "lines"))
    assert found
    for _, _, rows in found:
        for *_, where, quoted in rows:
            source = squeezed(source_of(where))
            lines = re.findall(r"`([^`]+)`", quoted)
            assert 1 <= len(lines) <= 2, f"{where}: quote one or two lines"
            for line in lines:
                assert squeezed(line) in source, f"{where} has no line {line}"


CHANGE = re.compile(r"[Ii]n\s+(`[^`]+`),\s+change\s+`([^`]+)`\s+to\s+`([^`]+)`")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_exercise_says_what_to_change_and_what_to_expect(page):
    text = section(page.read_text(), "Exercises")
    items = re.split(r"^\d\. ", text, flags=re.M)[1:]
    assert len(items) == 3
    for item in items:
        assert "*Expect*" in item and (commands(item) or "```python" in item)
        said = re.findall(r",\s+change\s", item)
        assert len(CHANGE.findall(item)) == len(said), "write: in `where`, change `a` to `b`"
        for where, old, new in CHANGE.findall(item):
            file, source = REFERENCE.fullmatch(where).group(1), source_of(where)
            assert source.count(old) == 1, f"{where}: {old}"
            ast.parse((ROOT / file).read_text().replace(source, source.replace(old, new)))


# ---- commands and snippets

COMMANDS = [(page, command) for page in PAGES for command in commands(page.read_text())]


@pytest.mark.parametrize("page,command", COMMANDS, ids=[" ".join(own) for _, own in COMMANDS])
def test_every_command_parses(page, command, tmp_path, monkeypatch):
    script, *flags = command
    monkeypatch.chdir(tmp_path)
    SCRIPTS[script].parse_args(flags)


SNIPPET = re.compile(r"^ *<!-- test: ([\w-]+) -->\n *```python\n(.*?)^ *```", re.S | re.M)
SNIPPETS = [(page, name, textwrap.dedent(snippet)) for page in EVERY
            for name, snippet in SNIPPET.findall(page.read_text())
            if name != "own-model"]                               # tests/test_readme.py runs that


@pytest.mark.parametrize("page,name,snippet", SNIPPETS, ids=[name for _, name, _ in SNIPPETS])
def test_every_snippet_is_short_and_runs(page, name, snippet, tmp_path, monkeypatch, capsys):
    assert len(snippet.splitlines()) <= 30 and max(map(len, snippet.splitlines())) <= 100
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, f"{page.name}: {name}", "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert shown and "nan" not in shown
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_page_has_a_snippet_and_runs_all_the_python_that_it_shows(page):
    text = page.read_text()
    assert "<!-- test: " in section(text, "In your own loop")
    assert text.count("```python") == len(re.findall(r"<!-- test: [\w-]+ -->\n *```python", text))


# ---- what runs and results say

def keys_of(file, function, variable=None):
    """The names of the numbers that a function hands over: the keys of its dicts; variable: of
    what is assigned to it."""
    tree = ast.parse(textwrap.dedent(definitions(file)[function]))
    roots = [tree] if variable is None else [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)
        and any(isinstance(target, ast.Name) and target.id == variable for target in node.targets)]
    return {key.value for root in roots for node in ast.walk(root) if isinstance(node, ast.Dict)
            for key in node.keys if isinstance(key, ast.Constant)}


LOGGED = {
    "eat.md": [("eat.py", "main", "record")],
    "baselines.md": [("baselines.py", "main", "record"), *(("baselines.py", name) for name in (
        "natural", "at", "mixup", "iat", "trades", "est", "act"))],
    "panum_at.md": [("panum_at.py", "main", "record"), ("panum_at.py", "robust_loss")],
    "hardness_manipulation.md": [("hardness_manipulation.py", "main", "record"),
                                 ("hardness_manipulation.py", "hm_loss")],
}


@pytest.mark.parametrize("page", LOGGED)
def test_every_logged_quantity_is_explained(page):
    told = section((ROOT / "docs" / page).read_text(), "What the log says")
    logged = set().union(*(keys_of(*where) for where in LOGGED[page]))
    assert "collapse" in logged and len(logged) > 6
    for key in logged | {"clean_R@1", "robust_R@1", "clean_mAP@R", "robust_mAP@R"}:
        assert f"`{key}`" in told, key


def test_every_field_of_an_attack_is_explained():
    told = section((ROOT / "docs/evaluation.md").read_text(), "What the log says")
    for key in keys_of("common.py", "Attack.entry"):
        assert f"`{key}`" in told, key


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_quoted_lines_of_logs_are_json(page):
    for block in re.findall(r"```json\n(.*?)```", page.read_text(), re.S):
        assert all(isinstance(json.loads(line), dict) for line in block.splitlines())


def results(name):
    """{row: {column: cell}} of a table in results/, which has to be that of its JSON."""
    content = json.loads((ROOT / name).with_suffix(".json").read_text())
    assert evaluator.table_markdown(content) == (ROOT / name).read_text()
    head, _, *lines = [line for line in (ROOT / name).read_text().splitlines()
                       if line.startswith("|")]
    columns, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in [head, *lines])
    return {re.sub(r" \[[\d, ]+\]| \(seeds: .*\)", "", row[0]): dict(zip(columns[1:], row[1:]))
            for row in rows}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_number_from_results_is_the_stored_one(page):
    text = page.read_text()
    assert re.search(r"^<!-- from results/", section(text, "Measured"), re.M)
    for (name,), head, rows in tables(text, r"from (results/\S+\.md)"):
        stored = results(name)
        assert f"{Path(name).name})" in text, f"link {name}"
        for row, *cells in rows:
            shown = {column: cell for column, cell in zip(head[1:], cells)}
            wanted = {column: stored[row.strip("`")][column] for column in shown}
            assert shown == wanted, f"{name}, {row}"
