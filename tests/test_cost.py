"""Price profiles: what a file must hold, what it inherits, and that a bad one is told in one sentence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore.cost import COMMON, COMMON_PROFILE, SPREAD, Price, Profile, load_profile
from cvmcore.errors import InputError, ProfileError

BACKENDS = COMMON_PROFILE.parent / "backends"
HEAD = 'schema = 1\nunit = "ns"\n'
COMMON_HEAD = HEAD + 'extends = "common"\n[prices]\n'


def price(ns: object = 1, source: str = '"somebody"', confidence: str = '"low"') -> str:
    return f"{{ ns = {ns}, source = {source}, confidence = {confidence} }}\n"


def no_backend(name: str) -> Path:
    raise InputError(f"there is no backend {name!r} here")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Profile]:
    """Load a profile from text; `files` are the backends that it may extend."""

    def load(text: str, required: frozenset[str] = COMMON, **files: str) -> Profile:
        for name, content in (files | {"mine": text}).items():
            (tmp_path / f"{name}.toml").write_text(content)

        def resolve(name: str) -> Path:
            return tmp_path / f"{name}.toml" if name in (*files, "mine") else no_backend(name)

        return load_profile(tmp_path / "mine.toml", required=required, resolve=resolve)

    return load


@pytest.mark.parametrize("path", [COMMON_PROFILE, BACKENDS / "default.toml", BACKENDS / "swprot.toml"])
def test_shipped_profiles_price_what_the_core_charges(path: Path) -> None:
    profile = load_profile(path, required=COMMON, resolve=no_backend)

    assert profile.prices.keys() == COMMON
    assert profile.name == path.stem
    assert all(price.source for price in profile.prices.values())


def test_prices_override_what_they_extend(load: Callable[..., Profile]) -> None:
    profile = load(
        HEAD + 'extends = "vendor"\n[prices]\nvm_exit = ' + price(3.5),
        COMMON | {"seal"},
        vendor=COMMON_HEAD + "seal = " + price(7) + "vm_exit = " + price(9),
    )

    assert profile.prices["vm_exit"] == Price(3.5, "somebody", "low")
    assert profile.ns_by_item()["seal"] == 7
    assert profile.ns_by_item()["page_clear_4k"] == 299


def test_items_of_an_extended_profile_are_known(load: Callable[..., Profile]) -> None:
    """Whoever extends another backend may reprice its items, also those that this run does not charge."""
    vendor = COMMON_HEAD + "seal = " + price(7)

    profile = load(HEAD + 'extends = "vendor"\n[prices]\nseal = ' + price(8), vendor=vendor)

    assert profile.ns_by_item()["seal"] == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (COMMON_HEAD + "vm_exit = " + price(-1), "prices['vm_exit'].ns must be from 0 to 1e+15 ns, not -1"),
        (COMMON_HEAD + "vm_exit = " + price("inf"), "prices['vm_exit'].ns must be a number of ns, not inf"),
        (COMMON_HEAD + "vm_exit = " + price("nan"), "prices['vm_exit'].ns must be a number of ns, not nan"),
        (COMMON_HEAD + "vm_exit = " + price("true"), "prices['vm_exit'].ns must be a number of ns, not True"),
        (COMMON_HEAD + "vm_exit = " + price('"1"'), "prices['vm_exit'].ns must be a number of ns, not '1'"),
        (COMMON_HEAD + "vm_exit = " + price(10**16), "prices['vm_exit'].ns must be from 0 to 1e+15 ns"),
        (COMMON_HEAD + "vm_exit = " + price(source='""'), "prices['vm_exit'].source must be a text, not ''"),
        (COMMON_HEAD + "vm_exit = " + price(confidence='"sure"'), "must be 'high' or 'medium' or 'low'"),
        (COMMON_HEAD + 'vm_exit = { ns = 1, source = "a" }', "prices['vm_exit'].confidence is missing"),
        (COMMON_HEAD + "vm_exit = 3", "prices['vm_exit'] must be a table"),
        (COMMON_HEAD + "vm_exit.foo = 3", "prices['vm_exit'].ns is missing"),
        (COMMON_HEAD + "vm_exti = " + price(), "price of 'vm_exti', which nothing charges"),
        (COMMON_HEAD + '"a\\nb" = ' + price(), r"price of 'a\nb', which nothing charges"),
        (HEAD + "[prices]\nvm_exit = " + price(), "no price of 'attributes_4k' and of 26 others"),
        (HEAD + "prices = 3", "prices must be a table"),
        (HEAD, "prices is missing"),
        (HEAD + "colour = 3\n[prices]", "the profile has no field 'colour'"),
        (HEAD + 'extends = "nobody"\n[prices]', "extends 'nobody', which is no backend: there is no backend 'nobody'"),
        (HEAD + 'extends = "a\\nb"\n[prices]', r"extends 'a\nb', which is no backend"),
        (HEAD + 'extends = "mine"\n[prices]', "extends 'mine', and so extends itself"),
        (HEAD + "extends = 3\n[prices]", "extends must be a text, not 3"),
        ('schema = 2\nunit = "ns"\n[prices]', "schema must be 1, not 2"),
        ('schema = true\nunit = "ns"\n[prices]', "schema must be 1, not True"),
        ('schema = 1\nunit = "us"\n[prices]', "unit must be 'ns', not 'us'"),
        ("schema = ", "is not TOML: "),
        ("a = " + "[" * 5000, "is not TOML: "),
    ],
    ids=map(str, itertools.count()),
)
def test_bad_profile_is_told_in_one_sentence(load: Callable[..., Profile], text: str, says: str) -> None:
    with pytest.raises(ProfileError) as caught:
        load(text)

    assert says in str(caught.value)
    assert "mine.toml: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cycle_of_profiles_is_told(load: Callable[..., Profile]) -> None:
    other = HEAD + 'extends = "mine"\n[prices]'
    with pytest.raises(ProfileError, match=r"other.toml: extends 'mine', and so extends itself"):
        load(HEAD + 'extends = "other"\n[prices]', other=other)


@pytest.mark.parametrize(("path", "says"), [("nowhere.toml", "No such file"), (".", "directory"), ("a\0b", "null")])
def test_unreadable_profile_is_told(tmp_path: Path, path: str, says: str) -> None:
    with pytest.raises(ProfileError, match=f"cannot be read: .*{says}"):
        load_profile(tmp_path / path, required=COMMON, resolve=no_backend)


def test_resampled_prices_stay_in_their_band() -> None:
    profile = Profile("p", {kind: Price(1000, "s", kind) for kind in SPREAD})  # type: ignore[arg-type]
    rng = np.random.default_rng(1)

    samples = [profile.resampled(rng).ns_by_item() for _ in range(2000)]

    for kind, low, high in [("high", 900, 1100), ("medium", 700, 1300), ("low", 500, 2000), ("fitted", 900, 1100)]:
        values = np.array([sample[kind] for sample in samples])
        assert low <= values.min() < low * 1.02
        assert high * 0.98 < values.max() <= high
        assert np.median(values) == pytest.approx(1000, rel=0.06)


def test_resampling_repeats_with_the_seed() -> None:
    profile = load_profile(COMMON_PROFILE, required=COMMON, resolve=no_backend)

    assert profile.resampled(np.random.default_rng(7)) == profile.resampled(np.random.default_rng(7))
    assert profile.resampled(np.random.default_rng(7)) != profile.resampled(np.random.default_rng(8))


FIELDS = ["ns", "source", "confidence", "schema", "unit", "extends", "prices"]
NAMES = st.sampled_from([*sorted(COMMON)[:4], *FIELDS, "x"])
SCALARS = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.sampled_from(["ns", "low", "common", "mine", "1", ""]),
    st.text(st.characters(exclude_categories=["C"]), max_size=3),
)


def as_toml(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case dict():
            return "{" + ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(as_toml, value)) + "]"
        case _:
            return str(value)


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=8,
)
TABLES = st.dictionaries(NAMES, VALUES, max_size=5).map(
    lambda table: "".join(f"{key} = {as_toml(value)}\n" for key, value in table.items())
)
TEXTS = st.one_of(
    st.binary(max_size=60),
    TABLES.map(str.encode),
    TABLES.map(lambda table: (HEAD + table).encode()),
    TABLES.map(lambda table: (COMMON_HEAD + table).encode()),
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=TEXTS)
def test_any_file_is_a_profile_or_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "fuzz.toml"
    path.write_bytes(content)

    try:
        profile = load_profile(path, required=COMMON, resolve={"mine": path}.__getitem__)
    except ProfileError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
    else:
        assert profile.prices.keys() >= COMMON
