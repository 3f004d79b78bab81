"""`diffalign demo`: the app in a browser."""

from __future__ import annotations

from diffalign import app
from diffalign.cli.commands import Demo


def run(options: Demo, command: str) -> int:
    app.main(host=options.host, port=options.port)
    return 0
