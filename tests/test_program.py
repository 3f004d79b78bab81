"""The `diffalign` program as the shell starts it."""

import os
import subprocess
import sys

from diffalign import __main__ as program
from tests.places import ROOT


def test_ctrl_c_while_the_command_line_is_being_imported_is_one_sentence(tmp_path):
    """An import that is interrupted: a module of that name raises what Ctrl-C raises."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'diffalign.cli':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "diffalign", "--help"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_program_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffalign", "bench", "geneval"])
    assert program.main() == 1
    assert "--pipeline is needed" in capsys.readouterr().err
