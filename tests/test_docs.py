"""README and docs: links, images and anchors exist, commands name real scripts and flags, code names real objects."""

import ast
import importlib
import re
import shlex
import textwrap
import typing
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

from training.config import ROOT

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, *sorted((ROOT / "results").glob("*/README.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def prose(page: Path) -> str:
    """The page without its code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


@cache
def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings: lower case, no punctuation, spaces to hyphens."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_images_and_anchors_exist(page):
    missing = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


def test_readme_is_short_and_links_every_page():
    assert README.read_text(encoding="utf-8").count("\n") < 150
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall(prose(README))}
    assert set(DOCS) <= linked


def test_pictures_are_small():
    assert all(picture.stat().st_size <= 300_000 for picture in (ROOT / "docs" / "images").iterdir())


# ---------------------------------------------------------------------------- commands


def commands(page: Path) -> list[list[str]]:
    """Every `python SCRIPT.py ...` of a page's shell blocks and code spans, split into words."""
    lines = [line for code in blocks(page, "bash") for line in code.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]*)`", FENCE.sub("", page.read_text(encoding="utf-8")))
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [shlex.split(part, comments=True)[1:] for part in parts if part.startswith("python ")]


@cache
def made_by(page: Path) -> set[str]:
    """What a page tells the reader to add: scripts, classes and functions, and the flags of new fields."""
    code = "\n".join(blocks(page, "python"))
    scripts = re.findall(r"Save this as `(\w+\.py)`", page.read_text(encoding="utf-8"))
    names = re.findall(r"^(?:class|def) (\w+)", code, re.MULTILINE)
    flags = [name.replace("_", "-") for name in re.findall(r"^ +(\w+): [\w\[\]| ]+ = ", code, re.MULTILINE)]
    return {*scripts, *names, *flags}


@every_page
def test_commands_name_scripts_and_flags_that_exist(page):
    made = made_by(page)
    problems = []
    for script, *words in commands(page):
        used = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
        if script in made or script.startswith("-"):
            continue
        if not (ROOT / script).is_file():
            problems.append(script)
        elif used:
            known = flags_of(script) | made | {"help"}
            problems += [f"{script} --{flag}" for flag in used if flag.removeprefix("no-") not in known]
    assert not problems


@cache
def flags_of(script: str) -> frozenset[str]:
    """Flags of a script, from the configs that make its command line, without starting it."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if hasattr(module, "EXPERIMENT"):
        experiment = module.EXPERIMENT
        parts = [type(experiment.model), type(experiment.train), type(experiment.options)]
        if "launch_sweep" in vars(module):
            parts.append(importlib.import_module("training.sweep").SweepOptions)
    else:
        parts = [hint for name, hint in typing.get_type_hints(module.main).items() if name != "return"]
    names = {field.name for part in parts if is_dataclass(part) for field in fields(part)}
    return frozenset(name.replace("_", "-") for name in names)


# ---------------------------------------------------------------------------- Python examples


@every_page
def test_python_examples_parse_and_import_what_exists(page):
    imports = [
        node
        for code in blocks(page, "python")
        for node in ast.walk(ast.parse(textwrap.dedent(code)))  # a piece of a class or function is indented
        if isinstance(node, ast.ImportFrom) and (ROOT / node.module.partition(".")[0]).is_dir()
    ]
    names = {(node.module, each.name) for node in imports for each in node.names if each.name not in made_by(page)}
    assert not [f"{module}.{name}" for module, name in sorted(names) if not is_there(module, name)]


def is_there(module: str, name: str) -> bool:
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False


def test_the_example_model_builds_and_runs():
    (code,) = [code for code in blocks(ROOT / "docs" / "extending.md", "python") if "class SmallConvConfig" in code]
    namespace: dict = {"__name__": __name__}
    exec(code, namespace)
    config = namespace["SmallConvConfig"](num_classes=7, width=2)
    assert config.build()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
