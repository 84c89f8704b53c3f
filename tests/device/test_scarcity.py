"""A device side whose surroundings lack something: what can go on without it does, and what cannot says what it is."""

from pathlib import Path

import jax
import pytest

from jaxserve.device.errors import PlacementError
from jaxserve.device.model_runner import enable_compilation_cache
from jaxserve.device.sharding import Placement


def test_without_a_place_for_compiled_programs_they_are_compiled_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    enable_compilation_cache(str(tmp_path / "file" / "folder"))
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as of a user without a home
    enable_compilation_cache("~/.cache/xla")
    assert jax.config.jax_compilation_cache_dir == before
    assert [("file/folder" in text, "home" in text) for text in caplog.messages] == [(True, False), (False, True)]


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'tpu'"), AssertionError()])
def test_a_platform_that_jax_does_not_have_is_an_error_that_names_it(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    asked = repr(jax.config.jax_platforms)
    with pytest.raises(PlacementError, match=f"no device of the platforms {asked}: {str(error) or 'no plugin'}"):
        Placement.of_replica()
