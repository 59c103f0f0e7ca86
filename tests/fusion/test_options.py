"""Which options are flashfuse's, which are Inductor's, and what a wrong one is told."""

from __future__ import annotations

import pytest

from flashfuse.options import Options, misspelt, parse


def test_defaults() -> None:
    assert parse(None) == Options(inner="inductor", verify=False, strict=False, inductor={})


def test_keys_are_split_by_prefix() -> None:
    options = parse(
        {"flashfuse.inner": "eager", "flashfuse.strict": True, "max_autotune": True, "triton.cudagraphs": False}
    )
    assert options == Options(inner="eager", strict=True, inductor={"max_autotune": True, "triton.cudagraphs": False})


@pytest.mark.parametrize("key", ["flashfuse.strct", "flashfuse.Strict", "flashfuse.stict"])
def test_unknown_key_lists_the_valid_ones_and_the_closest(key: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'flashfuse.strict'") as caught:
        parse({key: True})
    for name in ("flashfuse.inner", "flashfuse.verify", "flashfuse.strict"):
        assert name in str(caught.value)


def test_unknown_key_far_from_all_others_gets_the_list_only() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'flashfuse.window'; valid options are"):
        parse({"flashfuse.window": 3})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("flashfuse.inner", "indutcor", "did you mean 'inductor'"),
        ("flashfuse.inner", None, "'inductor' or 'aot_eager' or 'eager', got None"),
        ("flashfuse.verify", 1, "False or True, got 1"),
        ("flashfuse.strict", "yes", "False or True, got 'yes'"),
    ],
)
def test_wrong_value_says_what_is_right(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse({key: value})


@pytest.mark.parametrize("key", ["verify", "flashfuse_verify", "flashfuze.verify", "flashfuse-verify"])
def test_hint_for_an_inductor_key_that_was_meant_for_flashfuse(key: str) -> None:
    assert "did you mean 'flashfuse.verify'" in (misspelt({"max_autotune": True, key: True}) or "")


def test_no_hint_for_other_keys() -> None:
    assert misspelt({"max_autotune": True, "epilogue_fusion": True, "nonsense": 1}) is None
