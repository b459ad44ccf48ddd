"""The pages do what they say: snippets run, flags are explained, defaults are the parsers'."""

import re
import textwrap

import pytest
from test_readme import PAGES, README, ROOT, TEXTS, script

METHODS = ("eat", "baselines", "panum_at", "hardness_manipulation")
SECTIONS = ["The idea", "The equations", "Fidelity", "In your own loop", "Exercise"]


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_page_that_readme_links(name):
    assert [title for title in re.findall(r"^## (.*)$", page(name), re.M)
            if title in SECTIONS] == SECTIONS


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_read_in_one_sitting_and_linked(path):
    assert len(path.read_text().splitlines()) <= 250
    assert f"](docs/{path.name}" in README


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_function_that_is_named_exists(path):
    text = path.read_text()
    for file, _, name in re.findall(r"`([\w/]+\.py)(:(\w+))?`", text):
        assert (ROOT / file).exists(), file
        assert not name or hasattr(script(file), name), f"{file}:{name}"
    assert not re.search(r"\.py[:#]L?\d", text), "a line number would rot: name the function"


SNIPPET = re.compile(r"^ *<!-- test: ([\w-]+) -->\n *```python\n(.*?)^ *```", re.S | re.M)
SNIPPETS = [(name, textwrap.dedent(snippet)) for path in PAGES
            for name, snippet in SNIPPET.findall(path.read_text())]


def test_all_python_that_a_page_shows_is_run():
    assert len(SNIPPETS) == sum(path.read_text().count("```python") for path in PAGES) == 6


@pytest.mark.parametrize("name,snippet", SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_every_snippet_is_short_and_runs(name, snippet, tmp_path, monkeypatch, capsys):
    assert len(snippet.splitlines()) <= 30 and max(map(len, snippet.splitlines())) <= 110
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert printed and "nan" not in printed
    assert not any(tmp_path.iterdir())


# ---- flags and defaults

def flags_of(name, capsys, group=""):
    """The flags that a script's --help lists below a heading."""
    with pytest.raises(SystemExit, match="0"):
        script(name).parse_args(["--help"])
    text = capsys.readouterr().out.split(f"\n{group or 'options'}:\n")[1]
    text = text.split("\n\n")[0] if group else text
    return set(re.findall(r"^  (?:-\w, )?--([a-z-]+)", text, re.M))


@pytest.mark.parametrize("name", METHODS)
def test_every_flag_of_a_method_is_explained_on_its_page(name, capsys):
    flags = flags_of(f"{name}.py", capsys, "method")
    assert len(flags) >= 3
    for flag in flags:
        assert re.search(rf"--{flag}\b", page(name)), flag


def test_every_flag_of_the_evaluator_is_explained(capsys):
    machine = {"help", "data-root", "batch-size", "workers", "device"}
    for flag in flags_of("eval.py", capsys) - machine:
        assert re.search(rf"--{flag}\b", page("evaluation") + README), flag


def defaults():
    """[(page, method, flag, the value that the fidelity table says it has here)]."""
    for name in METHODS:
        for row in re.findall(r"^\|(.*)\|$", page(name).split("\n## Fidelity\n")[1], re.M):
            question, *_, here, _ = (cell.strip() for cell in row.split("|"))
            flags = re.findall(r"`--([a-z-]+)`", question)
            values = re.split(r"\s*[;:(]", here)[0].split(", ")          # they begin the cell
            if flags:
                method = re.match(r"`(\w+)`", question)
                for flag, value in zip(flags, values, strict=True):
                    yield name, method.group(1) if method else None, flag, value


DEFAULTS = list(defaults())


def number(text):
    top, _, bottom = str(text).partition("/")
    return float(top) / float(bottom or 1)


@pytest.mark.parametrize("name,method,flag,said", DEFAULTS,
                         ids=[f"{name} {flag} {said}" for name, _, flag, said in DEFAULTS])
def test_the_defaults_of_a_fidelity_table_are_the_parsers(name, method, flag, said):
    args = script(f"{name}.py").parse_args(
        ["--dataset", "cub", *(["--method", method] if method else [])])
    value = getattr(args, flag.replace("-", "_"))
    if isinstance(value, bool):
        assert said == ("on" if value else "off")
    elif isinstance(value, str):
        assert said == value
    else:
        assert number(said) == pytest.approx(value)


def test_the_fidelity_tables_state_the_recipes():
    stated = {(name, flag) for name, _, flag, _ in DEFAULTS}
    for name in METHODS:
        assert {"lr", "weight-decay", "epochs", "batch-size", "eps"} <= \
            {flag for owner, flag in stated if owner == name}, name
