"""The command line: `diffalign generate | bench | train | score | rewards | demo`.

Arguments are read and checked before torch or diffusers is imported, so --help and a mistyped name answer at once. Exit codes: 0 done,
1 failed with one sentence, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from diffalign import __version__
from diffalign.commands import bench, calibrate, config, generate, options, pairs, rewards, score, train
from diffalign.files import remove_empty


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. `argv` is what follows the program's name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        args = build_parser().parse_args(config.expand(argv))
        args.argv = argv
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
        code = args.run(args)
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


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="diffalign",
        description="Align text-to-image diffusion models, and judge every method by the same benchmarks.",
        epilog="Each command explains itself: diffalign generate --help",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffalign {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    generate.add_parser(subparsers)
    bench.add_parser(subparsers)
    train.add_parser(subparsers)
    pairs.add_parser(subparsers)
    score.add_parser(subparsers)
    rewards.add_parser(subparsers)
    calibrate.add_parser(subparsers)
    demo = subparsers.add_parser("demo", help="open the app in a browser", allow_abbrev=False)
    demo.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default: %(default)s)")
    demo.add_argument("--port", type=options.port, metavar="N", help="port (default: the first free one from 7860)")
    demo.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    demo.set_defaults(run=_demo)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what to do in one line; the whole usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _demo(args: argparse.Namespace) -> int:
    from diffalign import app

    app.main(host=args.host, port=args.port)
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
