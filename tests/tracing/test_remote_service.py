"""A model that a service runs: the same numbers, a service that fails is asked again, and a cut run goes on."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from tracing.jobs import TEXTS, bits, unlike

import probekit
from probekit.errors import InputError, ResourceError
from probekit.hooks.sites import open_hooks
from probekit.tracing import remote_service
from probekit.tracing.backends import check_backend, open_backend
from probekit.tracing.prompts import Prompt
from probekit.tracing.remote_service import TRIES, WAITS, Service, asked_again

pytestmark = pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is not installed")
ASKED = {"max_new_tokens": 6, "batch_size": 2}
REMOTE = {**ASKED, "backend": "nnsight:local"}


class RemoteError(Exception):
    """By its name, nnsight's own, which is imported only when it is asked for."""


class Answer(Exception):  # noqa: N818 - as httpx has it, an error with a response
    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.response = type("Response", (), {"status_code": status})()


def refused(status: int) -> RemoteError:
    error = RemoteError(f"Failed to send request: HTTP {status}")
    error.__cause__ = Answer(status)
    return error


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits between tries, which are not waited for."""
    waited: list[float] = []
    monkeypatch.setattr(remote_service.time, "sleep", waited.append)
    return waited


@pytest.fixture
def service(monkeypatch):
    """nnsight's simulation of a service, which fails with what is in the list, a pass each; None: it does not."""
    mounted, backward = "save" in vars(object), torch.Tensor.backward
    from nnsight.intervention.backends.local import LocalSimulationBackend

    torch.Tensor.backward = backward
    if not mounted and "save" in vars(object):  # nnsight mounts it on every object when it is imported
        sys.modules["nnsight._c"].unmount("save")
    failures: list[Exception | None] = []
    run = LocalSimulationBackend.__call__

    def call(self, tracer):
        if failures and (failure := failures.pop(0)) is not None:
            raise failure
        return run(self, tracer)

    monkeypatch.setattr(LocalSimulationBackend, "__call__", call)
    return failures


def test_a_simulated_service_gives_the_trace_of_the_hooks(tiny, tmp_path) -> None:
    """The passes go through nnsight's serialisation, without this package's modules, and come back as they were."""
    path, entries = list(sys.path), [set(module.__dict__) for module in tiny.model.modules()]
    here = probekit.trace(tiny, TEXTS[:3], **ASKED)
    there = probekit.trace(tiny, TEXTS[:3], tmp_path / "run", **REMOTE)
    assert there.manifest.settings.backend == "nnsight:local"
    assert there.layers.equals(here.layers) and there.tokens.equals(here.tokens)
    assert sys.path == path and not hasattr(object(), "save")
    assert open_hooks(tiny.model) == [] and [set(module.__dict__) for module in tiny.model.modules()] == entries
    logged = [
        Prompt(number, ids=tuple(here.prompt_ids(number).tolist()), response_ids=tuple(here.outputs(number).tolist()))
        for number in range(3)
    ]
    read = probekit.trace(tiny, logged, backend="nnsight:local", logged=True, batch_size=2)
    assert read.layers["argmax"].equals(here.layers["argmax"])


def test_a_service_that_fails_is_asked_again(tiny, service, waits, tmp_path) -> None:
    expected = probekit.trace(tiny, TEXTS, **ASKED)
    service += [ConnectionError("reset by peer"), refused(503), RemoteError("evicted"), None, refused(429)]
    found = probekit.trace(tiny, TEXTS, tmp_path / "run", **REMOTE)
    assert found.layers.equals(expected.layers)
    assert waits == [*WAITS[:3], WAITS[0]]
    assert service == []


def test_a_run_that_a_service_cuts_goes_on(tiny, service, waits, tmp_path) -> None:
    whole = tmp_path / "whole"
    probekit.trace(tiny, TEXTS, whole, **REMOTE)
    folder = tmp_path / "run"
    service += [None, None, None, *[RemoteError("a traceback\n\nRuntimeError: the model was evicted")] * TRIES]
    with pytest.raises(ResourceError, match=rf"failed {TRIES} times, .*the model was evicted .*--resume"):
        probekit.trace(tiny, TEXTS, folder, **REMOTE)
    assert waits == list(WAITS)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}
    assert kept
    with pytest.raises(InputError, match="nnsight:local"):
        probekit.trace(tiny, TEXTS, folder, resume=True, **ASKED)  # by hooks: another way to read
    probekit.trace(tiny, TEXTS, folder, resume=True, **REMOTE)
    assert unlike(bits(folder), bits(whole)) == []
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_a_service_refuses_is_said_at_once(tiny, service, waits, status, tmp_path) -> None:
    service.append(refused(status))
    with pytest.raises(InputError, match=rf"the service does not run tiny: Failed to send request: HTTP {status}"):
        probekit.trace(tiny, TEXTS, tmp_path / "run", **REMOTE)
    assert waits == []
    assert not (tmp_path / "run").exists()


def test_faults_of_our_own_are_not_the_services(waits) -> None:
    def wrong():
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        asked_again(wrong, "tiny")
    assert waits == []


def test_where_models_may_run() -> None:
    assert Service.of("local").remote == "local"
    assert Service.of("ndif").remote is True
    assert Service.of("https://models.example").remote == "https://models.example"
    for name in ("nnsight:", "nnsight:here", "hooks:local", "nnsight:ftp://x"):
        with pytest.raises(InputError):
            check_backend(name)


def test_a_service_knows_models_of_the_hub_only(tiny) -> None:
    with pytest.raises(InputError, match="by their ids on Hugging Face, and tiny is not one of those"):
        open_backend("nnsight:ndif", tiny)
    hub = replace(tiny, reference="owner/name@main", revision="abc123")
    assert Service.of("ndif").identity(hub) == ("owner/name", "main")
    with open_backend("nnsight:ndif", hub) as backend:
        assert (backend._wrapped.repo_id, backend._wrapped.revision) == ("owner/name", "main")


def test_a_service_keeps_no_cache(tiny) -> None:
    from transformers import DynamicCache

    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long), "past_key_values": DynamicCache(), "use_cache": True}
    with open_backend("nnsight:local", tiny) as backend, pytest.raises(InputError, match="keeps no cache"):
        backend.read(inputs, torch.ones(1, 4, dtype=torch.bool))
