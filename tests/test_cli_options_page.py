"""docs/options.md is what the settings classes say today."""

from __future__ import annotations

from diffalign.cli.options_page import markdown
from diffalign.cli.table import COMMANDS
from diffalign.options import options_of
from tests.places import ROOT


def test_the_page_is_current():
    assert (ROOT / "docs" / "options.md").read_text() == markdown(), "python -m diffalign.cli.options_page > docs/options.md"


def test_it_has_every_option_of_every_command():
    """Every command stands in one heading, with each of its options below."""
    sections = {text.partition("\n")[0]: text for text in markdown().split("\n## ")[1:]}
    for row in COMMANDS:
        first = f"`diffalign {row.words[0]}`"
        (section,) = (
            text for head, text in sections.items() if head.startswith(first) and (len(row.words) == 1 or f" `{row.words[1]}`" in head)
        )
        for each in options_of(type(row.takes), instance=row.takes):
            assert f"| `{each.option.metavar or 'NAME'}" in section or f"`--{each.name.replace('_', '-')}" in section
            assert each.option.help.replace("|", "\\|") in section
