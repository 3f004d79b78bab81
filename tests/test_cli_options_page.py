"""docs/options.md is what the settings classes say today."""

from __future__ import annotations

from diffalign.cli.options_page import markdown
from diffalign.cli.table import COMMANDS
from diffalign.options import options_of
from tests.places import ROOT


def test_the_page_is_current():
    assert (ROOT / "docs" / "options.md").read_text() == markdown(), "python -m diffalign.cli.options_page > docs/options.md"


def test_it_has_every_option_of_every_command():
    sections = markdown().split("\n## ")[1:]
    assert len(sections) == len(COMMANDS)
    for section, row in zip(sections, COMMANDS, strict=True):
        found = list(options_of(type(row.takes), instance=row.takes))
        assert section.startswith(f"`diffalign {' '.join(row.words)}`")
        assert section.count("\n| `") == len(found)
        assert all(f"--{each.name.replace('_', '-')}" in section for each in found if not each.option.positional)
