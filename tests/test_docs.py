"""README and docs: what they say to type is accepted, what they point at is there, and what they name has that name.

Shell blocks go through the real parsers, YAML blocks through the real checks, and the Python of the README and of the
trainer's page is run on tiny models in place of those that it names.
"""

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from kit.official import OFFICIAL, save_official_model
from packaging.requirements import Requirement
from trl import DPOConfig

from epsdpo import EpsilonDPOConfig
from epsdpo.__main__ import main
from epsdpo.experiment import load_experiments
from epsdpo.experiment.keys import section_keys, train_keys
from epsdpo.experiment.sweep import parse_overrides
from epsdpo.methods.catalogue import METHODS

ROOT = Path(__file__).parents[1]
README, DOCS, CHANGES = ROOT / "README.md", ROOT / "docs", ROOT / "CHANGELOG.md"
BESIDE_CODE = [
    ROOT / folder / "README.md"
    for folder in ("configs", "configs/demo/gold", "configs/paper_mini/gold", "benchmarks", "tests/data")
]
PAGES = [README, ROOT / "CONTRIBUTING.md", CHANGES, *sorted(DOCS.glob("*.md")), *BESIDE_CODE]
# Of names: the change log tells former ones, and what extends the kit is not there yet.
NAMING = [page for page in PAGES if page not in (CHANGES, DOCS / "extending.md")]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
# Programs of others, whose arguments nobody here can check.
NOT_OURS = {".", "conda", "git", "pre-commit", "vllm", "llama-server"}
A_FILE = re.compile(
    r"(?<![\w/>.-])(?!runs/|their/)(?:[\w.-]+/)+[\w-]+\.(?:py|yaml|md|ipynb|png|csv|json|jsonl|js|smk|gz)"
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [block for found, block in FENCE.findall(text_of(page)) if found == language]


def prose(page: Path) -> str:
    return FENCE.sub("", text_of(page))


def spans(page: Path) -> list[str]:
    """What stands between backticks in the prose, on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page: the lines of its shell blocks, and whole commands within the prose."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in spans(page) if re.match(r"(make|python -m|pip install|accelerate launch) \S", span)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def named(pages: list[Path], of) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages if of(page)]


# -------------------------------------------------------------------------------------------------------- commands


class Accepted(Exception):
    """Arguments that a parser has taken; raised in place of the work."""


@pytest.fixture
def accepted(monkeypatch):
    """What a module or a script of ours makes of its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, arguments=None, namespace=None):
        raise Accepted(parse(parser, arguments, namespace))

    def options_of(run, name, arguments):
        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of modules that are imported already
            patched.setattr(argparse.ArgumentParser, "parse_args", stop)
            patched.setattr(sys, "argv", [name, *arguments])
            patched.syspath_prepend(Path(name).parent)  # a script finds its neighbours
            with pytest.raises(Accepted) as taken:
                run(name, run_name="__main__")
        return taken.value.args[0]

    return options_of


def assert_makes(words: list[str]) -> None:
    targets = [word for word in words if "=" not in word]
    assert targets and set(targets) <= {*TARGETS, ".venv/ready"}


def assert_installs(words: list[str]) -> None:
    for word in words:
        if word == "." or word.startswith(".["):
            assert Requirement("epsdpo" + word[1:]).extras <= EXTRAS.keys()
        elif not word.startswith("-"):
            assert "==" in word, f"{word}: a package without its version"


def assert_configs(options: argparse.Namespace, page: Path) -> None:
    """Configs that a command names are there, and can be loaded with the values that are set."""
    own = re.findall(r"^# ([\w.]+\.yaml)\b", "\n".join(blocks(page, "yaml")), re.MULTILINE)  # shown on the page itself
    configs = [path for path in options.config if not path.isupper() and path not in own]
    if configs:
        assert load_experiments([ROOT / path for path in configs], parse_overrides(options.overrides))
    for path in (getattr(options, name, "") for name in ("launch", "profile", "claims", "against")):
        assert not path or (ROOT / path).exists(), path


def assert_parameters(options: argparse.Namespace) -> None:
    """A stage's parameters are those of its notebook."""
    (notebook,) = (ROOT / "notebooks").glob(f"*_*{options.stage}*.ipynb")
    cells = [
        cell for cell in json.loads(text_of(notebook))["cells"] if "parameters" in cell["metadata"].get("tags", [])
    ]
    statements = [node for cell in cells for node in ast.parse("".join(cell["source"])).body]
    known = {node.target.id for node in statements if isinstance(node, ast.AnnAssign)}
    assert {name for name, _ in options.parameter} <= known


@pytest.mark.parametrize("page", named(PAGES, commands))
def test_every_command_is_accepted(page, accepted, capsys):
    for program, *words in commands(page):
        if program == "make":
            assert_makes(words)
        elif program == "pip":
            assert words[0] == "install"
            assert_installs(words[1:])
        elif program == "accelerate":
            from accelerate.commands.launch import launch_command_parser

            launch = launch_command_parser().parse_args(words[1:])
            assert words[0] == "launch" and launch.module and (ROOT / launch.config_file).exists()
            accepted(runpy.run_module, launch.training_script, launch.training_script_args)
        elif program == "python" and words[0] != "-m":
            accepted(runpy.run_path, str(ROOT / words[0]), words[1:])
        elif program == "python" and words[1].startswith("epsdpo"):
            _, module, *arguments = words
            if module == "epsdpo" and len(arguments) == 1 and not arguments[0].startswith("-"):
                # A command that is only mentioned: it tells what it takes.
                with pytest.raises(SystemExit, match="0"):
                    main([*arguments, "--help"])
                continue
            options = accepted(runpy.run_module, module, arguments)
            if getattr(options, "explain", None) is not None:
                assert main(arguments) == 0
            elif module == "epsdpo" and hasattr(options, "overrides"):
                assert_configs(options, page)
            elif module == "epsdpo" and hasattr(options, "parameter"):
                assert_parameters(options)
        else:
            assert program in NOT_OURS or (ROOT / program).is_file(), f"{program}: unknown"


def test_the_parser_of_commands_notices_mistakes(accepted, tmp_path):
    """The checks above are checks: each of these was a mistake."""
    page = tmp_path / "page.md"
    page.write_text("```bash\npython -m epsdpo run \\\n    configs/demo  # comment\n```\nand `make\nlab`, `make`\n")
    assert commands(page) == [["python", "-m", "epsdpo", "run", "configs/demo"], ["make", "lab"]]
    with pytest.raises(SystemExit):
        accepted(runpy.run_module, "epsdpo", ["run", "configs/demo", "--job", "x"])
    with pytest.raises(AssertionError):
        assert_makes(["tests"])
    with pytest.raises(AssertionError):
        assert_installs([".[nothing]"])
    with pytest.raises(AssertionError):
        assert_parameters(argparse.Namespace(stage="train", parameter=[("confg", "x")]))


# ---------------------------------------------------------------------------------------------------- Python and YAML


@pytest.mark.parametrize("page", named(PAGES, lambda page: blocks(page, "python")))
def test_python_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("page", named([README, DOCS / "trainer.md"], lambda page: True))
def test_the_trainer_in_ten_lines_trains(page, tmp_path, monkeypatch):
    """As it stands but for the model, the data, and how long it trains."""
    substitutes = {
        '"Qwen/Qwen2.5-0.5B-Instruct"': repr(str(save_official_model(tmp_path / "model"))),
        '"trl-lib/ultrafeedback_binarized"': f'"json", data_files={str(OFFICIAL / "pairs.jsonl")!r}',
        "learning_rate=7.0e-7": "learning_rate=7.0e-7, max_steps=2, per_device_train_batch_size=4, use_cpu=True",
    }
    monkeypatch.chdir(tmp_path)
    text = "\n".join(blocks(page, "python"))
    for shown, here in substitutes.items():
        assert text.count(shown) == 1, f"{shown} is not on the page"
        text = text.replace(shown, here)
    names = {}
    exec(compile(text, str(page), "exec"), names)
    assert len(names["steps"]) == 2 and len(names["pairs"]) == 8
    assert len(blocks(README, "python")[0].splitlines()) <= 12


@pytest.mark.parametrize("page", named([p for p in PAGES if p.name != "extending.md"], lambda p: blocks(p, "yaml")))
def test_yaml_is_a_config_or_a_section_of_one(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "yaml"):
        content = yaml.safe_load(block)
        if "method" not in content:
            content = {"extends": str(ROOT / "configs" / "demo" / "dpo.yaml"), **content}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        (experiment,) = load_experiments("mine.yaml")
        assert experiment.name == "mine"


def test_data_of_ones_own_are_checked_as_the_readme_says(tmp_path, monkeypatch, capsys):
    """`check` on the README's config, with the judge's section in it, and pairs in the file that it names."""
    own, judge = map(yaml.safe_load, blocks(README, "yaml"))
    own["model"]["name_or_path"] = str(save_official_model(tmp_path / "model"))
    (tmp_path / "pairs.jsonl").write_bytes((OFFICIAL / "pairs.jsonl").read_bytes())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**own, **judge}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(judge["evaluate"]["judge"]["api_key_env"], "a key")
    assert main(["check", "mine.yaml"]) == 0, capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- what tables say


def rows_of(page: Path, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    below = text_of(page).split(f"\n## {heading}\n", 1)[1]
    lines = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n)+)", below, re.MULTILINE)[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_trainers_own_keys_stand_in_its_table():
    ours = {field.name: field for field in fields(EpsilonDPOConfig)}
    shown = {row[0].strip("`"): row[1].strip("`") for row in rows_of(DOCS / "trainer.md", "Keys of its own")}
    assert shown.keys() == ours.keys() - {field.name for field in fields(DPOConfig)}
    in_words = {"epsilon": None, "TRL's": None}  # defaults that follow from elsewhere
    for name, default in shown.items():
        assert ours[name].default == (in_words[default] if default in in_words else ast.literal_eval(default)), name


def test_every_method_stands_in_the_table():
    shown = [
        name
        for row in rows_of(DOCS / "trainer.md", "Other methods, one record")
        for name in re.findall("`(.*?)`", row[0])
    ]
    assert sorted(shown) == sorted(METHODS)
    assert len(shown) == 21 and "twenty other methods" in text_of(README)


def test_every_number_of_a_score_stands_in_the_table(tmp_path, capsys):
    rows = [
        {"instruction": text, "generator_1": "a", "generator_2": "b", "len_1": 9, "len_2": length, "preference": liked}
        for text, length, liked in [("one", 5, 1.0), ("two", 12, 2.0), ("three", 20, 1.5), ("four", 3, 2.0)]
    ]
    (tmp_path / "annotations.json").write_text(json.dumps(rows), encoding="utf-8")
    assert main(["winrate", str(tmp_path / "annotations.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    shown = []
    for row in rows_of(DOCS / "scores.md", "What is printed"):
        first, *others = re.findall("`(.*?)`", row[0])
        shown += [first, *(first + name if name.startswith("_") else name for name in others)]
    assert sorted(shown) == sorted(printed)


@pytest.mark.parametrize(("folder", "number"), [("paper", 85), ("small", 63)])
def test_the_papers_experiments_are_as_many_as_is_said(folder, number):
    folders = sorted(path for path in (ROOT / "configs" / folder).iterdir() if path.is_dir())
    assert number == sum(len(load_experiments(path)) for path in folders)
    assert re.search(rf"\b{number}\b", text_of(DOCS / "configs.md"))


# ----------------------------------------------------------------------------------------------------- links and names


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if not re.match(r"https?://", link)]


@pytest.mark.parametrize("page", named(PAGES, lambda page: True))
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_linked_from_both_beginnings_and_says_what_it_answers():
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert pages == {link for link in links(DOCS / "README.md") if "/" not in link}
    assert pages <= {link.removeprefix("docs/") for link in links(README)}
    for name in pages:
        title, blank, first, *_ = text_of(DOCS / name).splitlines()
        assert title.startswith("# ") and not blank and first[0].isupper(), f"{name} begins with something else"


def test_the_readme_can_be_read_in_a_minute():
    assert len(text_of(README).splitlines()) <= 150
    assert len(re.findall(r"!\[", text_of(README))) == 2


def test_every_figure_is_used_by_one_page():
    shown = [(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(".png")]
    lying = {path.resolve() for folder in ("docs", "benchmarks") for path in (ROOT / folder).rglob("*.png")}
    assert set(shown) == lying


@pytest.mark.parametrize("page", named(NAMING, lambda page: True))
def test_modules_and_files_have_the_names_that_are_given(page):
    for name in re.findall(r"\bepsdpo(?:\.\w+)+", text_of(page)):
        assert_is_ours(name)
    for path in {path for span in spans(page) for path in A_FILE.findall(span)}:
        assert any((base / path).exists() for base in (ROOT, ROOT / "epsdpo", page.parent)), f"{path}: no such file"
    for folder in {span for span in spans(page) if re.fullmatch(r"(configs|docs|tests|epsdpo)/[\w/]+", span)}:
        assert (ROOT / folder).exists(), f"{folder}: no such folder"
    for notebook in {span for span in spans(page) if re.fullmatch(r"0\d\w?_\w+", span)}:
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").exists(), f"{notebook}: no such notebook"


def test_the_change_log_says_where_things_are_now():
    rows = re.findall(r"^\| `epsdpo.*\|(.*)\|$", text_of(CHANGES), re.MULTILINE)
    assert len(rows) > 20
    for name in (name for row in rows for name in re.findall(r"`([\w.]+)`", row)):
        assert_is_ours(name)


def assert_is_ours(name: str) -> None:
    """A module of the package, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            assert hasattr(found, part), f"{name}: no such module, and nothing of that name in {found.__name__}"
            found = getattr(found, part)
        return
    raise AssertionError(f"{name}: no such module")


@pytest.mark.parametrize("page", named(NAMING, lambda page: True))
def test_keys_of_configs_are_known(page):
    known = {**section_keys(), **train_keys()}
    for span in spans(page):
        key = re.match(r"(?:data|model|train|evaluate|judge)\.[a-z_][a-z_.]*[a-z]", span)
        if key and not span.endswith(".py"):
            name = key[0]
            assert name in known or f"evaluate.{name}" in known or name.startswith("train.evaluate"), f"{name}: unknown"


def test_code_and_configs_point_at_pages_that_are_there():
    files = [
        path
        for folder in ("epsdpo", "configs", "notebooks", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
    ]
    texts = [path for path in (*files, ROOT / "Makefile") if path.suffix in (".py", ".yaml", ".ipynb", ".md", "")]
    for path in (path for path in texts if path.is_file()):
        for page, anchor in re.findall(r"\b((?:docs/\w+|README|CONTRIBUTING)\.md)(#[\w-]+)?", text_of(path)):
            target = ROOT / page
            assert target.exists(), f"{path.relative_to(ROOT)} points at {page}"
            assert not anchor or anchor[1:] in anchors(target), f"{path.relative_to(ROOT)} points at {page}{anchor}"


# ------------------------------------------------------------------------------------------------------- the tree


def shown_tree(page: Path) -> dict[str, set[str]]:
    """Folder -> what it holds, from the tree of the page: rooms at two spaces, rooms in them at four, names further in.

    An entry's own text begins after two spaces.
    """
    first, *lines = next(block for block in blocks(page, "") if block.startswith("epsdpo/\n")).splitlines()
    tree, folder, room = {"": set()}, "", ""
    for line in lines:
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        if depth > 4:
            assert folder, f"{name} stands below no folder"
            tree[folder] |= set(line.split())
            continue
        parent = "" if depth == 2 else room
        tree[parent].add(name)
        folder = parent + name if name.endswith("/") else ""
        tree.setdefault(folder, set())
        room = folder if depth == 2 else room
    return tree


def real_tree() -> dict[str, set[str]]:
    tree = {}
    package = ROOT / "epsdpo"
    for path in (package, *(path for path in package.rglob("*") if path.is_dir() and path.name != "__pycache__")):
        inner = [entry for entry in path.iterdir() if entry.name != "__pycache__"]
        files = [entry.name for entry in inner if entry.is_file()]
        if path == package:
            names = set(files)
        elif not files:
            continue  # what a former commit left
        else:
            names = {name.removesuffix(".py") for name in files if name != "__init__.py"}
        folders = {f"{entry.name}/" for entry in inner if entry.is_dir() and any(entry.rglob("*.py"))}
        tree["" if path == package else f"{path.relative_to(package)}/"] = names | folders
    return tree


def test_the_tree_of_the_page_is_that_of_the_package():
    shown, real = shown_tree(DOCS / "architecture.md"), real_tree()
    wrong = {
        folder or "epsdpo/": {"not on the page": real.get(folder, set()) - shown.get(folder, set())}
        | {"only on the page": shown.get(folder, set()) - real.get(folder, set())}
        for folder in shown.keys() | real.keys()
        if shown.get(folder) != real.get(folder)
    }
    assert not wrong
