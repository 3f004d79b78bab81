"""The app (`diffalign demo`, `python app.py`): one file per view, each a thin view over public functions. Needs the extra `app`.

`main()` serves it; importing this package loads nothing heavy.
"""

from __future__ import annotations


def main(host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves the app until Ctrl-C. ImportError with the remedy where gradio is not installed."""
    try:
        from diffalign.app import improve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError("the app needs gradio; install it with: pip install 'diffalign[app]'") from error
    improve.main(host=host, port=port)
