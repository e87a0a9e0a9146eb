"""The frozen base model of a run, and its tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nr_serve.default_model import model_folder
from nr_serve.errors import BadRequest, UnsupportedBase, loading
from nr_serve.logs import quiet_hub, quiet_progress_bars
from nr_serve.names import base_name
from nr_serve.neutral import host
from nr_serve.neutral.format import Adapter, Base, naming, read_adapter
from nr_serve.train.digest import digest
from nr_serve.train.recipe import BadRecipe

_OF_NO_EFFECT = ("_name_or_path", "dtype", "transformers_version")
"""Keys of a configuration that say where a base came from, or how it was loaded."""


@dataclass(frozen=True)
class FrozenBase:
    """A causal language model in evaluation mode whose weights take no gradient."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    """What adapters' files know it by: a sample of it."""
    contents: str
    """Hash of all it computes with: configuration and every weight, as bfloat16, whatever it is loaded in."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(host.decoder_layers(self.model))

    @property
    def d(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def identity(self) -> Base:
        """What an adapter's file must name as its base to fit this one."""
        return Base(self.name, self.fingerprint, self.layers, self.d)

    @property
    def device(self) -> torch.device:
        """The device of the weights, where inputs must be too."""
        device: torch.device = self.model.device
        return device


def best_device() -> torch.device:
    """The first CUDA device, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_adapters(files: Sequence[Path], base: FrozenBase) -> dict[str, Adapter]:
    """Adapters for a base, by their file names.

    Raises BadRequest if two have the same name, BadAdapterFile for a file that does not fit the base.
    """
    names = [path.stem for path in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadRequest(f"two adapters have the same name: {', '.join(twice)}", param="adapters")
    adapters = {}
    for path in files:
        with naming(path):
            adapters[path.stem] = read_adapter(path, base.identity)
    return adapters


def load_base(base: str, dtype: str = "float32", device: torch.device | str = "cpu") -> FrozenBase:
    """Load `default`, a folder or a model hub's name. Raises UnsupportedBase with the reason."""
    from transformers import AutoTokenizer

    with _loading(base) as source:
        model = host.load_model(source, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(source)
    host.check_base(model)
    _check_tokens(model, tokenizer)
    model.requires_grad_(False)
    model.eval()
    fingerprint, contents = host.fingerprint(model, tokenizer), _contents(model)
    return FrozenBase(base_name(source), model.to(device), tokenizer, fingerprint, contents)


def _contents(model: Any) -> str:
    config = {key: value for key, value in model.config.to_dict().items() if key not in _OF_NO_EFFECT}
    weights = digest(tensor.to(torch.bfloat16) for _, tensor in sorted(model.state_dict().items()))
    return hashlib.sha256(f"{json.dumps(config, sort_keys=True, default=str)} {weights}".encode()).hexdigest()


def load_hf_tokenizer(base: str) -> Any:
    """A base's tokenizer from transformers, without loading the model. Raises UnsupportedBase with the reason."""
    from transformers import AutoTokenizer

    with _loading(base) as source:
        return AutoTokenizer.from_pretrained(source)


def check_window(base: str, tokens: int, name: str) -> None:
    """Raise BadRecipe, with the window's `name`, if the base does not read this many tokens at once.

    Reads the base's configuration alone. Raises UnsupportedBase with the reason.
    """
    from transformers import AutoConfig

    with _loading(base) as source:
        config = AutoConfig.from_pretrained(source).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and tokens > longest:
        raise BadRecipe(f"{name} is {tokens:,} tokens; the base reads at most {longest:,}")


def _check_tokens(model: Any, tokenizer: Any) -> None:
    """Raise UnsupportedBase for a tokenizer with tokens that the model does not know.

    Added tokens do not count: some models have one more than embeddings, and plain text holds none.
    """
    known = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > known:
        raise UnsupportedBase(f"the tokenizer has {tokenizer.vocab_size:,} tokens; the base knows {known:,}")


@contextmanager
def _loading(base: str) -> Iterator[str]:
    """The folder or hub name of a base, fetched if it is the default; errors of loading become UnsupportedBase."""
    source = str(model_folder(base))
    quiet_hub()
    quiet_progress_bars("info", "text")
    with loading(f"the base {source}"):
        yield source
