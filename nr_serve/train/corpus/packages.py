"""Packages on disk: downloaded, unpacked, kept until the run ends.

Knows apt and pip; knows nothing about the contents of packages. apt gets its own lists and caches in the working
folder, so it needs neither root nor the package lists of the machine's own `apt-get update`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from nr_serve.errors import DownloadFailed
from nr_serve.logs import say
from nr_serve.packages import pip_download, run_client

# apt settings of the machine that are replaced; its hooks after an update would change the machine's lists, as
# root.
REPLACED = ("Acquire::Languages", "Dir::Etc::parts", "Dir::Etc::main", "APT::Update::P")


class Packages:
    """Downloads each package once into `work`; `versions` holds the versions downloaded."""

    def __init__(self, work: Path, languages: Sequence[str] = ()) -> None:
        self.versions: dict[str, str] = {}
        self._work = work
        self._languages = languages  # languages of the translated descriptions that apt fetches
        self._unpacked: dict[str, Path] = {}
        self._environment: dict[str, str] | None = None

    def deb(self, name: str) -> Path:
        """The folder with the unpacked Debian package `name`; raises `DownloadFailed` if apt has none."""
        return self._unpacked.get(name) or self._fetch_deb(name)

    def pypi(self, requirement: str) -> Path:
        """The folder with the unpacked distribution `requirement` ("name==version") from PyPI."""
        return self._unpacked.get(requirement) or self._fetch_pypi(requirement)

    def descriptions(self, language: str) -> list[Path]:
        """apt's lists of package descriptions in `language`, updated once per run."""
        identify = ["Identifier: Translations", f"Language: {language}"]
        output = self._apt("indextargets", "--format", "$(FILENAME)", *identify)
        files = [path for path in map(Path, sorted(set(output.splitlines()))) if path.is_file()]
        if not files:
            raise DownloadFailed(f"apt has no translated package descriptions in {language!r}")
        for path in files:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            self.versions[path.name] = f"sha256:{digest}"
        return files

    def _fetch_deb(self, name: str) -> Path:
        folder = self._folder(name)
        say("corpus", f"downloading {name}")
        self._apt("download", name, cwd=folder)
        [file] = folder.glob("*.deb")
        _say_size(file)
        root = folder / "root"
        run_client(["dpkg-deb", "--extract", str(file), str(root)])
        self.versions[name] = run_client(["dpkg-deb", "--field", str(file), "Version"]).strip()
        file.unlink()
        self._unpacked[name] = root
        return root

    def _fetch_pypi(self, requirement: str) -> Path:
        folder = self._folder(requirement)
        say("corpus", f"downloading {requirement}")
        file = pip_download(requirement, folder, wheel_only=False)
        _say_size(file)
        root = folder / "root"
        _unpack(file, root)
        name, _, version = requirement.partition("==")
        self.versions[name] = version or file.name
        file.unlink()
        self._unpacked[requirement] = root
        return root

    def _folder(self, name: str) -> Path:
        folder = self._work / f"package-{len(self._unpacked)}-{name.replace('=', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _apt(self, *arguments: str, cwd: Path | None = None) -> str:
        if self._environment is None:
            self._environment = self._prepare_apt()
        return run_client(["apt-get", "--quiet", *arguments], cwd=cwd, env=self._environment)

    def _prepare_apt(self) -> dict[str, str]:
        """Make a separate configuration for apt, and fetch the package lists."""
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise DownloadFailed("sources of kind 'deb' and 'ddtp' need apt-get and dpkg-deb (Debian or Ubuntu)")
        folder = self._work / "apt"
        for part in ("lists/partial", "cache/archives/partial", "state", "parts"):
            (folder / part).mkdir(parents=True)
        settings = run_client(["apt-config", "dump"]).splitlines()
        kept = [line for line in settings if not line.startswith(REPLACED)]
        config = folder / "apt.conf"
        config.write_text("\n".join([*kept, *self._settings(folder)]) + "\n", encoding="utf-8")
        environment = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C.UTF-8"}
        say("corpus", "updating apt's lists in a temporary folder")
        run_client(["apt-get", "--quiet", "update"], env=environment)
        return environment

    def _settings(self, folder: Path) -> list[str]:
        own = {
            "Dir::Etc::parts": folder / "parts",  # already read: they are in the dump
            "Dir::Etc::main": folder / "none",
            "Dir::State": folder / "state",
            "Dir::State::lists": folder / "lists",
            "Dir::Cache": folder / "cache",
            "Acquire::GzipIndexes": "false",
            "APT::Sandbox::User": "root",  # apt's own user cannot access the temporary folder
        }
        languages = [f'Acquire::Languages:: "{language}";' for language in self._languages or ("none",)]
        return [f'{key} "{value}";' for key, value in own.items()] + languages


def _say_size(file: Path) -> None:
    say("corpus", f"unpacking {file.name}, {file.stat().st_size / 1e6:.1f} MB")


def _unpack(file: Path, root: Path) -> None:
    try:
        if file.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(file) as archive:
                archive.extractall(root)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(root, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise DownloadFailed(f"cannot unpack {file.name}: {error}") from error
