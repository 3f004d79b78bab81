"""Prompt lists at an address: fetched once, kept on the disk, read from there; a server on this machine counts what it is asked for."""

import errno
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffalign.benchmarks import sources
from diffalign.benchmarks.sources import cache_folder, read_source

PATHS = ("prompts.txt", "lists/prompts.txt")


class Counting(SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder, the address that serves it, and the paths it was asked for; the cache is empty and elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "site" / "lists").mkdir(parents=True)
    (tmp_path / "site" / "lists" / "prompts.txt").write_text("a red cup\n")
    asked: list[str] = []
    handler = type("Handler", (Counting,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path / "site"))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    sources._read.cache_clear()
    yield tmp_path / "site", f"http://127.0.0.1:{server.server_port}", asked, server
    server.shutdown()
    thread.join()
    server.server_close()


def anew(address):
    """As another process reads it."""
    sources._read.cache_clear()
    return read_source(address, PATHS, "nowhere")


def test_an_address_is_asked_once_and_the_disk_afterwards(site, caplog):
    _, address, asked, server = site
    with caplog.at_level(logging.INFO, "diffalign"):
        assert anew(address) == "a red cup\n"
    assert asked == ["/prompts.txt", "/lists/prompts.txt"]
    (kept,) = cache_folder().iterdir()
    assert str(kept) in caplog.text
    server.shutdown()  # no network at all
    server.server_close()
    assert anew(address) == "a red cup\n"
    assert asked == ["/prompts.txt", "/lists/prompts.txt"]


def test_the_address_of_the_file_itself_is_kept_too(site):
    _, address, asked, _ = site
    for _ in range(2):
        assert anew(f"{address}/lists/prompts.txt") == "a red cup\n"
    assert asked == ["/lists/prompts.txt"]


def test_what_was_kept_is_known_by_its_digest_and_damage_is_fetched_again(site):
    folder, address, asked, _ = site
    anew(address)
    (kept,) = cache_folder().iterdir()
    kept.write_text("a re")
    (folder / "lists" / "prompts.txt").write_text("a blue cup\n")
    assert anew(address) == "a blue cup\n"
    assert len(asked) == 4
    assert anew(address) == "a blue cup\n"
    assert len(asked) == 4


def test_nothing_is_kept_of_an_address_that_has_nothing(site):
    folder, address, asked, _ = site
    with pytest.raises(FileNotFoundError, match=r"404.*nor at.*missing/lists"):
        anew(f"{address}/missing")
    assert not cache_folder().exists()
    (folder / "missing").mkdir()
    (folder / "missing" / "prompts.txt").write_text("a green cup\n")
    assert anew(f"{address}/missing") == "a green cup\n"
    assert len(asked) == 3


def test_a_copy_that_is_not_finished_is_not_kept(site, monkeypatch, caplog):
    """A full disk: the prompts are used all the same, and it is said that they were not kept."""
    _, address, asked, _ = site
    write = Path.write_bytes

    def full(path, data):
        write(path, data[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert anew(address) == "a red cup\n"
    assert "not kept" in caplog.text
    assert list(cache_folder().iterdir()) == []
    assert anew(address) == "a red cup\n"
    assert len(asked) == 4


def test_files_of_this_machine_are_not_copied(site):
    folder, _, asked, _ = site
    assert anew(folder) == "a red cup\n"
    assert anew(folder.as_uri()) == "a red cup\n"
    assert not asked
    assert not cache_folder().exists()


def test_the_cache_lies_where_the_user_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "diffalign" / "prompts"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "diffalign" / "prompts"
