"""A real server process with the real base model, shared by the tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nr_serve.client import Client
from nr_serve.default_model import fetch_model
from nr_serve.neutral.format import AdapterInfo, Block, write_adapter
from nr_serve.server_process import local_server

ADAPTER = Path(__file__).parents[2] / "adapters" / "hu" / "hu.safetensors"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """URL of a running server with no adapter loaded."""
    fetch_model()
    with local_server("--max-batch-tokens", "64", "--dtype", "float32") as client:
        yield client.url


@pytest.fixture
def client(url) -> Iterator[Client]:
    """A client; whatever adapters a test leaves behind are unloaded after it."""
    with Client(url) as client:
        yield client
        for adapter in client.adapters():
            client.unload(adapter["name"])


@pytest.fixture
def base(client) -> dict:
    """The base as /v1/models shows it."""
    return client.models()[0]


@pytest.fixture
def random_adapter(base, tmp_path):
    """A function that writes an adapter of random blocks whose gates open on about half the tokens."""

    def write(name: str, seed: int, *, fingerprint: str = base["fingerprint"], h: int = 16) -> Path:
        g = torch.Generator().manual_seed(seed)
        layers, d = 30, 576
        blocks = tuple(
            Block(
                gate=torch.randn(d, generator=g) / d**0.5,
                bias=torch.zeros(()),
                w_in=torch.randn(h, d, generator=g) / d**0.5,
                w_gate=torch.randn(h, d, generator=g) / d**0.5,
                w_out=torch.randn(d, h, generator=g) / h**0.5,
            )
            for _ in range(layers)
        )
        info = AdapterInfo(base=base["id"], base_fingerprint=fingerprint, layers=layers, d=d, carry=0.5)
        write_adapter(tmp_path / f"{name}.safetensors", info, blocks)
        return tmp_path / f"{name}.safetensors"

    return write
