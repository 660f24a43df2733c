"""What mkdocs finds of the project besides docs/.

These are README and its like, the codecs' specifications, files that pages link to, and the
reference, of whose names each must be explained where it is defined. A hook of mkdocs (mkdocs.yml).
Links on pages stay as they are in the repository, so that they work there, too.
"""

from __future__ import annotations

import itertools
import logging
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files, InclusionLevel

LOG = logging.getLogger("mkdocs.hooks.pages")
ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "build" / "installed"
"""The package as it is installed, where codecs/ and eval/ lie within kvzip."""
RENAMED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
OUTSIDE = ("*.md", "codecs/README.md", "codecs/*/spec.md", "kvzip/*/spec.md")
"""Pages that are not in docs/."""
CODE = {".py": "python", ".toml": "toml", ".cpp": "cpp", ".hpp": "cpp", ".cuh": "cuda"}
API = {
    "kvzip": "The library",
    "kvzip.store": "A store",
    "kvzip.load.hf": "transformers",
    "kvzip.load.vllm": "vLLM",
    "kvzip.load.lmcache": "LMCache",
    "kvzip.load.sglang": "SGLang",
    "kvzip.load.buffers": "Opaque buffers",
    "kvzip.load.llama_cpp": "llama.cpp",
    "kvzip.load.cancelling": "Cancellation",
    "kvzip.metrics": "Metrics",
    "kvzip.capture": "Capturing",
    "kvzip.models": "Models",
    "kvzip.entropy": "Entropy",
    "kvzip.choice.cost": "Costs",
    "kvzip.dtypes": "Formats of numbers",
    "kvzip.testing": "Tests",
}
"""Modules with a page of reference, and its title."""
ENGINES = ("kvzip.load.vllm", "kvzip.load.lmcache", "kvzip.load.sglang")
"""Where methods are what an engine calls, and are explained by the engine."""
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
ITEM = re.compile(r"(?:[-*]|\d+\.) ")


# --- where a file of the repository is on the site -----------------------------------------------


def place(path: str) -> str:
    """The site's name of a file or folder, given by its path in the repository."""
    if path in RENAMED:
        return RENAMED[path]
    if (ROOT / path).is_dir() or Path(path).suffix in CODE:
        return f"files/{path}.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(".md"):
        return path.replace("/README.md", "/index.md")
    return f"files/{path}"


def original(name: str) -> str:
    """The inverse of :func:`place`, for pages."""
    for path, renamed in RENAMED.items():
        if name == renamed:
            return path
    if name.startswith(("codecs/", "kvzip/")):
        return name.replace("/index.md", "/README.md")
    return f"docs/{name}"


def target(page: str, link: str) -> tuple[str, str]:
    """What a link on a page leads to, as a path in the repository, and its anchor."""
    path, _, anchor = link.partition("#")
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
    if (ROOT / found).is_dir() and (ROOT / found / "README.md").exists():
        found += "/README.md"
    return found, f"#{anchor}" if anchor else ""


def is_ours(link: str) -> bool:
    """Whether a link leads to a file of the repository."""
    return not re.match(r"[a-z]+:", link)


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """A page with `change` applied to all of it but blocks of code."""
    pieces = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(piece if i % 2 else change(piece) for i, piece in enumerate(pieces))


def linked(page: str) -> Iterator[str]:
    """The files and folders of the repository that a page links to."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return (target(page, link)[0] for link in LINK.findall(text) if is_ours(link))


def shown(path: str) -> str | bytes:
    """What the site has of a file or folder that is no page: code as a page, the rest as it is."""
    file = ROOT / path
    if file.is_dir():
        names = [f"- `{found.name}`" for found in sorted(file.iterdir()) if found.is_file()]
        return "\n".join([f"# {path}/", "", *names, ""])
    if language := CODE.get(file.suffix):
        return f"# {path}\n\n````{language}\n{file.read_text()}\n````\n"
    return file.read_bytes()


# --- the reference -------------------------------------------------------------------------------


def public(module: Any) -> list[Any]:
    """What a module offers: the names in its `__all__`, or the functions and classes that it
    defines under a public name."""
    if module.exports is not None:
        names = sorted((str(name) for name in module.exports), key=str.lower)
        return [module.members[name] for name in names if name != "__version__"]
    own = [one for name, one in module.members.items() if not name.startswith("_")]
    return [one for one in own if not one.is_alias and (one.is_function or one.is_class)]


def undocumented(one: Any) -> list[str]:
    """The public names at and below one that no docstring explains. The names of the contracts'
    tests are sentences."""
    if one.is_alias:  # what a package offers is defined in its modules
        one = one.final_target
    if one.path.startswith(ENGINES) and one.is_function and one.parent.is_class:
        return []
    found = [] if one.docstring or one.is_attribute else [one.path]
    if one.is_class:
        inherited = {name for base in one.mro() for name in base.members}  # is explained there
        for name, member in one.members.items():
            if not (name.startswith(("_", "test_")) or member.is_alias or name in inherited):
                found += undocumented(member)
    return found


def reference() -> dict[str, str]:
    """The pages of the modules. Warns of public names that nothing explains."""
    # By its path: Python finds the sources here first, without codecs and eval.
    package = griffe.load(INSTALLED / "kvzip", search_paths=[INSTALLED], resolve_aliases=True)
    pages = {}
    for module, title in API.items():
        below = module.removeprefix("kvzip").removeprefix(".")
        names = public(package[below] if below else package)
        for path in (path for one in names for path in undocumented(one)):
            LOG.warning("%s has no docstring", path)
        blocks = [f"::: {module}.{one.name}\n" for one in names]
        pages[module] = "\n".join([f"# {title}: `{module}`", "", *blocks])
    return pages


def commands() -> str:
    """Every command with its arguments, as the command line itself explains them."""
    from kvzip.cli.app import app

    contents = re.compile(r"^## Table of Contents.*?(?=^\*\*Commands)", re.MULTILINE | re.DOTALL)
    text = contents.sub("", app.generate_docs()).replace("# kvzip\n", "# Commands\n", 1)
    # The list names the anchor of a command; of one that is an option it has other dashes.
    return text.replace("(#kvzip-install-completion)", "(#kvzip---install-completion)")


# --- mkdocs' hooks -------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """The reference's pages and the codecs' go into the navigation."""
    pages = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    pages += [{title: f"api/{module}.md"} for module, title in API.items()]
    codecs = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("codecs/*/spec.md"))]
    pages += [{"Codecs": ["codecs/index.md", *({Path(c).parent.name: c} for c in codecs)]}]
    pages += [{"Grids": "kvzip/grids/spec.md"}]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/, and what is made here."""

    def add(name: str, content: str | bytes, in_menu: bool = True) -> None:
        level = InclusionLevel.INCLUDED if in_menu else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, content=content, inclusion=level))

    pages = [f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md")]
    for path in (str(p.relative_to(ROOT)) for under in OUTSIDE for p in sorted(ROOT.glob(under))):
        pages.append(path)
        add(place(path), (ROOT / path).read_text())
    for path in sorted({path for page in pages for path in linked(page)}):
        if files.get_file_from_path(place(path)) is None and (ROOT / path).exists():
            add(place(path), shown(path), in_menu=False)
    for module, text in reference().items():
        add(f"api/{module}.md", text)
    add("api/commands.md", commands())
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links lead to where files are on the site; a list begins after an empty line, for which
    Markdown asks here and not on GitHub."""
    here = page.file.src_uri
    if here.startswith(("api/", "files/")):
        return markdown
    source = original(here)

    def moved(match: re.Match[str]) -> str:
        if not is_ours(match[0]):
            return match[0]
        path, anchor = target(source, match[0])
        there = place(path)
        if there == here and anchor:
            return anchor
        return posixpath.relpath(there, posixpath.dirname(here) or ".") + anchor

    def changed(text: str) -> str:
        lines = LINK.sub(moved, text).split("\n")
        spaced = lines[:1]
        for before, line in itertools.pairwise(lines):
            in_list = ITEM.match(before.lstrip()) or before.startswith("  ")
            if ITEM.match(line) and before.strip() and not in_list:
                spaced.append("")
            spaced.append(line)
        return "\n".join(spaced)

    return outside_code(markdown, changed)
