import logging

import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import ImplementationError, Registry


@pytest.fixture
def registry():
    made = Registry("some_op", platform_order={"tpu": ("tpu", "xla"), "*": ("fast", "xla")})
    for name in ("tpu", "fast", "xla", "reference"):
        made.add(name, name.upper())
    return made


def accepts(*members):
    return lambda member: None if member in members else f"{member} needs another shape"


def test_a_named_implementation_is_taken_even_when_another_is_preferred(registry):
    assert registry.choose("reference", accepts("FAST", "REFERENCE")) == ("reference", "REFERENCE")


def test_a_named_implementation_that_refuses_fails_with_its_reason(registry):
    with pytest.raises(
        ImplementationError, match="some_op: implementation 'tpu' cannot serve: TPU needs another shape"
    ):
        registry.choose("tpu", accepts("XLA"))


def test_an_unknown_name_lists_the_known_ones(registry):
    with pytest.raises(
        ImplementationError, match=r"unknown implementation 'gpu'.*'fast', 'reference', 'tpu', 'xla'"
    ):
        registry.choose("gpu", accepts("XLA"))


def test_automatic_choice_takes_the_first_that_can_and_says_so_once(registry, caplog):
    dispatch._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="pallas_kernels.dispatch"):
        assert registry.choose("auto", accepts("FAST", "XLA")) == ("fast", "FAST")
        assert not caplog.messages
        for _ in range(3):
            assert registry.choose("auto", accepts("XLA")) == ("xla", "XLA")
    assert caplog.messages == ["some_op: using 'xla' instead of 'fast': FAST needs another shape"]


def test_automatic_choice_follows_the_platform(registry, monkeypatch):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    assert registry.choose("auto", accepts("FAST", "TPU")) == ("tpu", "TPU")


def test_automatic_choice_with_nothing_left_tells_every_reason(registry):
    with pytest.raises(
        ImplementationError, match="fast: FAST needs another shape; xla: XLA needs another shape"
    ):
        registry.choose("auto", accepts("REFERENCE"))


def test_a_name_is_registered_once(registry):
    with pytest.raises(ValueError, match="'xla' is taken"):
        registry.add("xla", "again")
