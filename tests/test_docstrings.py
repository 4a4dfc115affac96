"""`help()` of every public name has an example, and the examples do what they show."""

from __future__ import annotations

import doctest
import inspect

import pytest

import probekit

LONG = {"batch_invariant", "export", "probe", "run_study", "validate", "validate_ways"}
NAMES = [pytest.param(name, marks=pytest.mark.second if name in LONG else ()) for name in sorted(probekit.__all__)]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    shown = getattr(probekit, name)
    [test] = doctest.DocTestFinder(recurse=False).find(shown, name, globs={})
    assert test.examples, f"help(probekit.{name}) has no example"
    said: list[str] = []
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert found.failed == 0, "".join(said)


@pytest.mark.parametrize("name", sorted(probekit.__all__))
def test_help_says_what_it_takes(name):
    shown = getattr(probekit, name)
    text = inspect.getdoc(shown) or ""
    assert len(text.splitlines()) > 2, f"help(probekit.{name}) is {text!r}"
