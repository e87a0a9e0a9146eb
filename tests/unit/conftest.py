"""What tests share: small banks, a tiny base on disk, and a corpus of three made-up languages."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from nr_serve.disk import cache_folder
from nr_serve.neutral.bank import Bank
from nr_serve.neutral.torch_bank import TorchBank
from tests import banks, tiny


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep the tokenised text of tests out of the user's cache. Compiled operators go by their content: shared."""
    cache, operators = tmp_path_factory.mktemp("cache"), cache_folder() / "operators"
    operators.mkdir(parents=True, exist_ok=True)
    (cache / "operators").symlink_to(operators)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NR_CACHE", str(cache))
        yield


@pytest.fixture(params=[TorchBank, banks.cpu_bank], ids=["torch's operators", "one operator"])
def bank(request) -> Callable[..., Bank]:
    """Makes small banks, of torch's operators or of the compiled one."""
    return partial(banks.small, request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return tiny.save(tiny.model(), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for language, letters in {"hu": "őűáé", "en": "the ", "da": "æøå "}.items():
        g = torch.Generator().manual_seed(len(letters) + ord(letters[0]))
        for part, lines in {"train": 60, "heldout": 20}.items():
            picks = torch.randint(0, 4, (lines, 40), generator=g).tolist()
            text = "\n\n".join("".join(letters[i] for i in row) for row in picks)
            (folder / f"{language}.a.{part}.txt").write_text(text, encoding="utf-8")
    (folder / "en.b.heldout.txt").write_text((folder / "en.a.heldout.txt").read_text())
    return folder
