"""The keys of configuration files are described where a user looks for them."""

from __future__ import annotations

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from adapterlab import yaml_text
from adapterlab.cli import build, main
from adapterlab.compare.config import CompareConfig
from adapterlab.errors import ConfigError
from adapterlab.serve.http.limits import ServerSettings
from adapterlab.serve.load import Load
from adapterlab.settings import keys
from adapterlab.train.config import TrainConfig


@pytest.mark.parametrize("cls", [TrainConfig, CompareConfig, Load, ServerSettings])
def test_every_key_says_what_it_is(cls: type[BaseModel]) -> None:
    faults = {}
    for key in keys(cls):
        assert key.meaning, key.name
        assert key.values, key.name
        assert not key.example.endswith(("=null", "={}", "=[]", "=")), f"{key.name} has an empty example"
        try:
            cls(**yaml_text.overrides([key.example]))
        except ConfigError as error:  # other keys are missing, or stand against the example
            faults[key.name] = str(error)
    assert not {name: fault for name, fault in faults.items() if f"{name} " in fault or f"{name}=" in fault}


@pytest.mark.parametrize("verb", ["train", "compare"])
def test_the_keys_are_listed_without_a_file_at_80_columns(verb: str) -> None:
    result = CliRunner().invoke(build(), [verb, "--help-config"])
    assert result.exit_code == 0
    assert "data.max_length  (whole number ≥ 2; default: 1024)" in result.output
    meanings = [line for line in result.output.splitlines() if line.startswith("    ")]
    assert max(map(len, meanings)) < 80


def test_an_unknown_key_says_where_all_are() -> None:
    with pytest.raises(ConfigError, match=r"'modle'.*Nearest: model.*--help-config"):
        TrainConfig(modle="x", data={"task": "chain_sum"})


@pytest.mark.parametrize("verb", ["train", "compare", "serve", "bench"])
def test_a_setting_that_is_written_as_an_option_is_told_how_settings_are_written(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "x", "--some.thing=5"])
    assert caught.value.code == 2
    assert "without dashes: some.thing=VALUE" in " ".join(capsys.readouterr().err.replace("│", " ").split())
