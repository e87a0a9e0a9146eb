"""Globs of files in a folder: the one place where they are matched. Torch-free."""

from __future__ import annotations

from pathlib import Path

from nr_serve.train.recipe import BadRecipe


def match_files(folder: Path, glob: str) -> list[Path]:
    """Files below `folder` that match a glob, unordered. Raises BadRecipe for what is not a relative glob."""
    try:
        return [path for path in folder.glob(glob) if path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise BadRecipe(f"{glob!r} is not a glob of files in {folder}: {error}") from error
    except (IndexError, AttributeError) as error:  # what pathlib raises for ".", "./" and the like
        raise BadRecipe(f"{glob!r} is not a glob of files in {folder}: it names a folder") from error
