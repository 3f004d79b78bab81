"""The command line: reads arguments, checks them, runs a command. table.py says which there are.

Exit codes: 0 done, 1 failed with one sentence, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence

from diffalign import __version__
from diffalign.benchmarks.table import owners
from diffalign.cli.arguments import ADVANCED_HELP, Formatter, Parser, add_options, read
from diffalign.cli.table import COMMANDS, GROUPS, Checked, Command
from diffalign.files import remove_empty
from diffalign.options import Needed, options_of


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. `argv` is what follows the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = parse_words(argv)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        code = start(args, argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted; nothing is left half-written, and the same command starts again", 130, debug)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
        return 141  # 128 + SIGPIPE, as a shell reports it
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        return _fail(_sentence(error), 1, debug)
    except RuntimeError as error:
        # torch's own class is not imported here for its name alone.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail(f"out of memory: {_sentence(error)}; a smaller --batch-size or --dtype float16 needs less", 1, debug)


def start(args: argparse.Namespace, argv: Sequence[str]) -> int:
    try:
        options = read(args.row.takes, args)
    except Needed as lacking:
        args.parser.error(str(lacking))
    options.check()
    return args.row.run(options, shlex.join(["diffalign", *argv]))


def parse(argv: Sequence[str]) -> tuple[Command, Checked]:
    """A command line as the command that it names and its settings, not yet checked. Exits with 2 where words are wrong."""
    args = parse_words(argv)
    return args.row, read(args.row.takes, args)


def parse_words(argv: Sequence[str]) -> argparse.Namespace:
    parser = build_parser(advanced=ADVANCED_HELP in argv)
    if list(argv[:2]) == ["bench", "compare"]:
        parser.error(f"bench compare is compare now: write diffalign compare {shlex.join(argv[2:])}")
    args, strange = parser.parse_known_args(argv)
    if strange:
        args.parser.error(unrecognised(args.parser.prog, strange))
    return args


def build_parser(advanced: bool = False) -> Parser:
    """advanced: help shows rarely needed options too."""
    parser = Parser(
        prog="diffalign",
        description="Align text-to-image diffusion models, and judge every method by the same benchmarks.",
        epilog="Each command explains itself: diffalign generate --help",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    parser.set_defaults(parser=parser)
    top = parser.add_subparsers(metavar="COMMAND", required=True)
    below: dict[str, argparse._SubParsersAction[Parser]] = {}
    for row in COMMANDS:
        place = top
        if len(row.words) > 1:
            first = row.words[0]
            if first not in below:
                group = GROUPS[first]
                facts = {"help": group.summary, "description": group.summary.capitalize() + ".", "epilog": group.epilog}
                parser_of_group = top.add_parser(first, formatter_class=Formatter, allow_abbrev=False, **facts)
                below[first] = parser_of_group.add_subparsers(metavar=group.metavar, required=True)
            place = below[first]
        own = place.add_parser(
            row.words[-1],
            help=row.summary,
            description=row.description,
            epilog=row.epilog,
            usage=f"diffalign {' '.join(row.words)}{_positionals(row.takes)} [options]",
            formatter_class=Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        add_options(own, row.takes, advanced)
        own.set_defaults(row=row, parser=own)
    return parser


def _positionals(takes: object) -> str:
    found = [each for each in options_of(type(takes), instance=takes) if each.option.positional]
    return "".join(f" {each.option.metavar or each.name.upper()}{' ...' * each.option.many}" for each in found)


def unrecognised(prog: str, words: Sequence[str]) -> str:
    """What to say of words that a command does not take; an option of another benchmark is said to be one."""
    option = words[0].partition("=")[0]
    known = owners(option.removeprefix("--").replace("-", "_")) if option.startswith("--") else ()
    if known and prog.startswith("diffalign bench "):
        return f"{option} belongs to {' and '.join(known)}, not to {prog.rpartition(' ')[2]}"
    return f"unrecognized arguments: {' '.join(words)}"


def _sentence(error: BaseException) -> str:
    """The error's message on one line; for a failed file operation, which file and why."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    remove_empty()
    print(f"diffalign: {message}", file=sys.stderr)
    return code
