"""Where the weights of a reward lie: a folder, a file, a Hub repository, an address, or a folder inside the package.

package:shapes/weights/shapes-clip      inside the diffalign package
org/name        org/name:file.pt        a repository of the Hugging Face Hub; one file of it
https://...     https://...#sha256=...  one file, kept in torch.hub's folder; the hash is checked when it is downloaded
anything else                           a local folder, or one local file
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from diffalign.files import HUB_ID, PACKAGE, packaged_path
from diffalign.reward_models.spec import Spec

HUB = re.compile(rf"(?P<repository>{HUB_ID.pattern})(:(?P<file>.+))?")


class Source:
    """The files of one part of one reward. Nothing is looked up or downloaded before it is asked for."""

    def __init__(self, reward: str, part: str, where: str | Path) -> None:
        self.reward, self.part, self.where = reward, part, str(where)

    def __repr__(self) -> str:
        return f"{self.part} of reward {self.reward!r} ({self.where})"

    def file(self, *names: str) -> Path:
        """The first of these files that is there; a place that is one file is that file, whatever it is called.

        Raises FileNotFoundError naming what was looked for, OSError where the Hub or the address cannot be reached.
        """
        found = self.find(*names)
        if found is None:
            raise FileNotFoundError(f"reward {self.reward!r}: {self._describe(names)} is missing; {self._advice()}")
        return found

    def find(self, *names: str) -> Path | None:
        """As `file`, with None where none of them is there."""
        if self.where.startswith("https://"):
            return self._fetch()
        local = self._local()
        if local is not None and local.is_file():
            return local
        if local is not None:
            return next((local / name for name in names if (local / name).is_file()), None)
        match = HUB.fullmatch(self.where)
        if match is None:
            return None
        return self._download(match["repository"], (match["file"],) if match["file"] else names)

    def folder(self, *names: str) -> Path:
        """A folder that holds all of these files, for readers that want a folder (tokenizers). Raises as `file` does."""
        paths = [self.file(name) for name in names]  # every one of them, so that a download is whole
        return paths[0].parent

    def _local(self) -> Path | None:
        """The local path, None for a Hub repository. A local path wins over a repository of the same name."""
        packaged = packaged_path(self.where)
        if packaged is not None:
            return packaged
        path = Path(self.where).expanduser()
        return path if path.exists() or HUB.fullmatch(self.where) is None else None

    def _describe(self, names: tuple[str, ...]) -> str:
        local = self._local()
        places = [str(local / name) for name in names] if local is not None else [f"{name} of {self.where}" for name in names]
        return " or ".join(places) or self.where

    def _advice(self) -> str:
        if self.where.startswith(PACKAGE):
            return "train it with `python -m diffalign.shapes.train`, or say where it lies with source="
        return f"say where the {self.part} lies with source=: a folder, a file, or a Hub repository 'org/name'"

    def _download(self, repository: str, names: tuple[str, ...]) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        unreachable: OSError | None = None
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except LocalEntryNotFoundError as error:  # no connection, and not kept from before: another of the names may be
                unreachable = unreachable or self._unreachable(f"{name} of {repository}", error)
            except EntryNotFoundError:  # the base of the one above, yet this means that the repository has no such file
                continue
            except Exception as error:
                raise self._unreachable(f"{name} of {repository}", error) from error
        if unreachable is not None:
            raise unreachable
        return None

    def _fetch(self) -> Path:
        import torch

        address, _, sha256 = self.where.partition("#sha256=")
        target = Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(address, str(target), sha256 or None, progress=False)  # writes beside, then renames
            except Exception as error:
                raise self._unreachable(address, error) from error
        return target

    def _unreachable(self, what: str, error: Exception) -> OSError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return OSError(
            f"reward {self.reward!r}: could not download {what} ({reason}); check the connection and whether the model asks you to log in, "
            f"or {self._advice()}"
        )


def sources_of(spec: Spec, given: str | Path | Mapping[str, str | Path] | None) -> dict[str, Source]:
    """Every part's place: the one given, else the table's. One place alone is the main part's.

    Raises ValueError for a reward without weights and for parts it does not have, TypeError for anything that is no place.
    """
    if given is None:
        given = {}
    elif not spec.checkpoint:
        raise ValueError(f"reward {spec.name!r} has no weights to load; leave source away, got {given!r}")
    elif isinstance(given, (str, Path)):
        given = {next(iter(spec.checkpoint)): given}
    if not isinstance(given, Mapping) or not all(isinstance(place, (str, Path)) and str(place) for place in given.values()):
        raise TypeError(f"reward {spec.name!r}: source must be a path, a Hub repository, or a mapping from parts to them, got {given!r}")
    for part in given:
        if part not in spec.checkpoint:
            raise ValueError(f"reward {spec.name!r} has no part {part!r}; its parts are {', '.join(spec.checkpoint)}")
    return {part: Source(spec.name, part, given.get(part, where)) for part, where in spec.checkpoint.items()}
