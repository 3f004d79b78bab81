"""docs/options.md, made from the settings classes: `python -m diffalign.cli.options_page > docs/options.md`."""

from __future__ import annotations

from itertools import groupby

from diffalign.cli.arguments import default_in_words
from diffalign.cli.table import COMMANDS, Command
from diffalign.options import Found, dashed, options_of

HEAD = """# All options

Made from the classes that the command line, YAML files and Python share, by `python -m diffalign.cli.options_page > docs/options.md`; a
test says where it is not current. Every command also takes `--config FILE.yaml`, a file of the names below with `_` or `-` in them, which
what is typed overrides; `--no-NAME` takes back a flag of such a file. *Advanced* ones are shown by `--help-advanced` alone.
Commands that take the same stand together.
"""


def markdown() -> str:
    """The whole page."""
    alike = groupby(COMMANDS, lambda row: list(options_of(type(row.takes), instance=row.takes)))
    return "\n".join([HEAD, *(_section(list(rows), found) for found, rows in alike)])


def heading(rows: list[Command]) -> str:
    """`diffalign score`; `diffalign train` `dpo`, `inpo`."""
    if len(rows[0].words) == 1:
        return ", ".join(f"`diffalign {row.words[0]}`" for row in rows)
    return f"`diffalign {rows[0].words[0]}` {', '.join(f'`{row.words[1]}`' for row in rows)}"


def _section(rows: list[Command], found: list[Found]) -> str:
    """Of neighbours in the table that take the same options."""
    lines = [f"## {heading(rows)}", ""]
    what = [f"{row.summary[0].upper()}{row.summary[1:]}." for row in rows]
    lines += [*(what if len(rows) == 1 else [f"- `{row.words[-1]}`: {each}" for row, each in zip(rows, what, strict=True)]), ""]
    if found:
        lines += ["| option | group | what it is |", "|---|---|---|", *map(_line, found), ""]
    return "\n".join(lines)


def _line(each: Found) -> str:
    option = each.option
    word = "" if isinstance(each.default, bool) else f" {option.metavar or 'NAME'}{' ...' * option.many}"
    name = word.strip() if option.positional else f"--{dashed(each.name)}{word}"
    choices = f"; one of {', '.join(option.choices)}" if option.choices and option.choices[0] not in option.help else ""
    text = f"{option.help}{choices}{default_in_words(each)}".replace("|", "\\|")
    return f"| `{name}` | {'*advanced*' if option.advanced else each.group} | {text} |"


if __name__ == "__main__":
    print(markdown(), end="")
