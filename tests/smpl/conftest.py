"""Fixtures of the body's tests."""

import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def chumpy(monkeypatch) -> SimpleNamespace:
    """Stand-ins under chumpy's names, so that pickles of chumpy objects can be written without chumpy."""

    def fake(module, name):
        cls = type(name, (), {"__module__": module, "__qualname__": name})
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: cls}))

        def make(**state):
            thing = cls()
            # What `Ch.__getstate__` leaves in: all but `_parents` and `_cache`.
            thing.__dict__.update(_dirty_vars=set(), _itr=None, **state)
            return thing

        return make

    monkeypatch.setitem(sys.modules, "chumpy", SimpleNamespace())
    return SimpleNamespace(Ch=fake("chumpy.ch", "Ch"), Select=fake("chumpy.reordering", "Select"))
