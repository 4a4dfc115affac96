"""A stranger's work in a process of its own: one for many questions, and whatever it does, this one goes on."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from probekit.errors import InputError
from probekit.foreign import bounded
from probekit.foreign.bounded import Bounded

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are of Linux")


@pytest.fixture
def forks(monkeypatch):
    """The processes that were made."""
    made, fork = [], os.fork

    def counted() -> int:
        child = fork()
        made.append(child)
        return child

    monkeypatch.setattr(os, "fork", counted)
    return made


def work(question):
    if question == "forever":
        while True:
            pass
    if question == "much":
        return "x" * 2**33
    if question == "long":
        return "x" * 11
    if question == "dies":
        os._exit(3)
    if question == "wrong":
        raise ValueError("so\nwrong.")
    return f"{question}, by {os.getpid()}"


def is_there(child: int) -> bool:
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_answers_all_questions_and_is_gone_behind_them(forks):
    with Bounded(work) as texts:
        said = {texts.text(f"\udc80 {number}", "It").split(", by ")[1] for number in range(50)}
    assert said == {str(child) for child in forks}
    assert len(said) == 1
    assert str(os.getpid()) not in said
    assert not is_there(forks[0])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("forever", "It takes more than 1 s or 1 GB"), ("much", "It takes more than 1 s or 1 GB"),
        ("dies", "It takes more than"), ("wrong", "It cannot be used: so wrong"), ("long", "makes a text of 11 char"),
    ],
)  # fmt: skip
def test_a_question_that_it_cannot_answer_costs_only_itself(question, message, forks, monkeypatch):
    monkeypatch.setattr(bounded, "MOST_SECONDS", 1)
    if question == "long":
        monkeypatch.setattr(bounded, "MOST_CHARACTERS", 10)
    with Bounded(work) as texts:
        with pytest.raises(InputError, match=message):
            texts.text(question, "It")
        if question != "long":
            assert texts.text("a", "It").startswith("a, by")
    assert not any(map(is_there, forks))


def test_what_earlier_questions_left_is_not_held_against_a_later_one(forks):
    """A process that dies of the second question may have died of the first: the second is asked once more."""
    asked = []

    def forgetful(question):
        asked.append(question)
        if len(asked) == 2:
            os._exit(0)
        return question

    with Bounded(forgetful) as texts:
        assert [texts.text(question, "It") for question in "abc"] == ["a", "b", "c"]
    assert len(forks) == 3  # each dies of its second question


def test_a_signal_while_it_is_waited_for_leaves_no_process(forks):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), Bounded(work) as texts:
            texts.text("forever", "It")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 4
    assert not is_there(forks[0])
