"""A page of another site cannot read this machine's server by having its own name point here."""

import pytest

from tests.fakes import serving

# Addresses, too: a probe's or a scraper's host is one, and no site can have one as its name.
OURS = ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "127.1.2.3"]
OURS += ["10.0.0.1", "10.0.0.1:8000", "[::2]:8000"]
FOREIGN = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", ""]
FOREIGN += ["evil.example:127.0.0.1", "[::1].evil.example", "localhost@evil.example", "10.0.0.1.evil.example"]


def status(served, host, path="/v1/models"):
    response = served.http.get(path, headers={"Host": host, "Authorization": "Bearer k"})
    if response.is_error:
        assert response.json()["error"]["param"] == "Host"
    return response.status_code


def test_without_a_key_a_server_of_this_machine_answers_under_its_own_names_alone():
    with serving() as served:
        assert {host: status(served, host) for host in OURS} == dict.fromkeys(OURS, 200)
        for path in ("/v1/models", "/metrics", "/", "/no/such"):
            assert {host: status(served, host, path) for host in FOREIGN} == dict.fromkeys(FOREIGN, 400)
        refused = served.http.post("/v1/completions", json={}, headers={"Host": "evil.example"})
        assert (refused.status_code, len(served.engine.submits)) == (400, 0)
        assert refused.headers["x-request-id"]


@pytest.mark.parametrize("keys", [{"api_key": "k"}, {"host": "0.0.0.0", "allow_no_key": True}])
def test_others_answer_under_any_name(keys):
    with serving(**keys) as served:
        assert {status(served, host) for host in OURS + FOREIGN} == {200}


@pytest.mark.parametrize("keys", [{}, {"api_key": "k"}, {"admin_key": "k"}])
def test_names_can_be_added(keys):
    with serving(allowed_host=["Models.Example"], **keys) as served:
        assert status(served, "models.example") == status(served, "models.example:443") == 200
        assert status(served, "localhost") == 200
        assert status(served, "evil.example") == 400
    with serving(allowed_host=["*"], **keys) as served:
        assert status(served, "evil.example") == 200
