"""What mkdocs needs to turn docs/ into the site: pages of the repository's root, links out of docs/, formulas as MathML.

The pages are written for a reader of the repository, where `../diffalign/rules.py` is a link; the site holds no source, so there the words
stay and the link goes. A link to a file that does not exist is a warning, and so an error of `mkdocs build --strict`.
"""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ON_THE_SITE = {**FROM_ROOT, "README.md": "index.md"}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>', re.S)

log = logging.getLogger("mkdocs.hooks.diffalign")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the repository's root, their links turned to where the site has them."""
    for source, page in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links that leave docs/ to the site's own pages, or to plain words."""

    def turned(link: re.Match[str]) -> str:
        target = link["target"]
        if not target.startswith("../"):
            return link[0]
        path = target.removeprefix("../")
        if path in ON_THE_SITE:
            return f"[{link['text']}]({ON_THE_SITE[path]}{link['anchor'] or ''})"
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_path, target)
        return link["text"]

    return LINK.sub(turned, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns formulas into MathML, which browsers draw by themselves."""

    def drawn(formula: re.Match[str]) -> str:
        block = formula["block"] is not None
        return convert(html.unescape(formula["block"] if block else formula["inline"]), display="block" if block else "inline")

    content = FORMULA.sub(drawn, content)
    if 'class="arithmatex"' in content:
        log.warning("%s has a formula that was not turned into MathML", page.file.src_path)
    return content
