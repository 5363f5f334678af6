"""Composition and refusal of parameters; what the run form is made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema
from pydantic import TypeAdapter, ValidationError

from flows import parameters
from flows.pipeline import pipeline
from moe_core.errors import ConfigError
from tests.flows.repository import make_repository, read_yaml


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("parameters"))


def test_preset_and_overrides_are_composed(repository: Path) -> None:
    parameters.compose(repository, "scenes", ["moe.top_k=4", "seed=7"])
    written = read_yaml(repository / "params.yaml")
    assert (written["experiment"], written["moe"]["top_k"], written["seed"]) == ("scenes", 4, 7)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("moe.topk=4", "topk"),
        ("moe.top_k=13", "top_k is 13, but there are 12 experts"),
        ("moe.shared_ratio=2", "they must be equal"),
        ("+moe.heads=3", "unknown parameter moe.heads"),
        ("seed=[1", "seed=[1"),
        ("kd=nonesuch", "nonesuch"),
        ("seed=many", "seed = 'many'"),
    ],
)
def test_a_bad_override_is_refused_with_what_is_wrong(repository: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parameters.compose(repository, "demo", [override])
    assert told in str(refused.value)
    assert override.split("=")[0].lstrip("+") in str(refused.value)


@pytest.mark.parametrize("value", ["moe.top_k", "=3", "moe top_k=3", "--help", "a;b=1"])
def test_what_is_no_override_does_not_pass_the_form(value: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(parameters.Override).validate_python(value)


@pytest.mark.parametrize("value", ["moe.top_k=4", "kd=scenes", "+mob.levels.M.single.groups=2", "data.path=/x y", "a="])
def test_an_override_passes_the_form(value: str) -> None:
    assert TypeAdapter(parameters.Override).validate_python(value) == value


@pytest.mark.parametrize("value", ["a b", "a..b", "-x", "a/b", ".hidden", "x" * 81, "a\n"])
def test_names_that_git_or_a_shell_would_trip_over_are_refused(value: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(parameters.RunName).validate_python(value)


def test_the_form_offers_the_presets_and_has_help_for_every_field() -> None:
    schema = parameter_schema(pipeline).model_dump()
    fields = schema["properties"]
    # `enum`, even of one value: Prefect's form shows a `const` as JSON.
    assert fields["experiment"]["enum"] == parameters.PRESETS
    assert fields["overrides"]["items"]["pattern"]
    for name in ("experiment", "overrides", "name", "commit", "again"):
        assert len(fields[name]["description"]) > 20, name
