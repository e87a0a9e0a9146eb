"""Every bad adapter file gets a 4xx that says what is wrong, through a real server, and nothing changes."""

import pickle
import struct

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

PROMPT = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


def _lasting(adapter):
    """What of an adapter's view only a change of the adapter changes."""
    return {k: v for k, v in adapter.items() if k not in ("gates", "fired_by_selected")}


def _wrong_shape(good, path):
    tensors = load_file(good)
    tensors["layers.3.w_in"] = tensors["layers.3.w_in"][:, :-1].contiguous()
    return _save(tensors, good, path)


def _nan(good, path):
    tensors = load_file(good)
    tensors["layers.7.w_out"][0, 0] = torch.nan
    return _save(tensors, good, path)


def _save(tensors, good, path):
    from safetensors import safe_open

    with safe_open(good, "pt") as file:
        save_file(tensors, path, file.metadata())
    return path.read_bytes()


def _pickle(good, path):
    return pickle.dumps({"layers.0.w_in": [0.0]})


def _truncated(good, path):
    return good.read_bytes()[:-1000]


def _ten_gigabytes_of_header(good, path):
    return struct.pack("<Q", 10 * 2**30) + good.read_bytes()[8:]


def _ten_gigabytes_of_tensor(good, path):
    header = b'{"layers.0.w_in":{"dtype":"F32","shape":[50000,50000],"data_offsets":[0,10000000000]}}'
    return struct.pack("<Q", len(header)) + header + bytes(1000)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_wrong_shape, "layers.3.w_in has shape"),
        (_nan, "layers.7.w_out holds NaN"),
        (_pickle, "pickle"),
        (_truncated, "not a whole safetensors file"),
        (_ten_gigabytes_of_header, "not a whole safetensors file"),
        (_ten_gigabytes_of_tensor, "not a whole safetensors file"),
        (lambda good, path: b"", "the body is empty"),
    ],
)
def test_a_bad_file_is_refused_and_changes_nothing(url, client, base, random_adapter, tmp_path, spoil, message):
    good = random_adapter("good", 1)
    client.load(good, "x")
    before = client.adapters()
    answer_before = client.complete(model="x", **PROMPT)["choices"]
    body = spoil(good, tmp_path / "bad.safetensors")
    refused = httpx.put(f"{url}/v1/adapters/x", params={"replace": "true"}, content=body)
    assert 400 <= refused.status_code < 500
    assert message in refused.json()["error"]["message"]
    assert [_lasting(a) for a in client.adapters()] == [_lasting(a) for a in before]
    assert client.complete(model="x", **PROMPT)["choices"] == answer_before


def test_an_adapter_for_another_base_is_refused(url, client, random_adapter):
    other = random_adapter("other", 1, fingerprint="0123456789abcdef")
    refused = httpx.put(f"{url}/v1/adapters/other", content=other.read_bytes())
    assert refused.status_code == 400
    assert "made for another base" in refused.json()["error"]["message"]
    assert client.adapters() == []


def test_a_taken_name_needs_replace(client, url, random_adapter):
    file = random_adapter("x", 1)
    client.load(file, "x")
    assert httpx.put(f"{url}/v1/adapters/x", content=file.read_bytes()).status_code == 409
