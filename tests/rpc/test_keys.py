"""The file of API keys: what is in it, what is refused, and how a change is taken in."""

import errno
import os
from pathlib import Path

import pytest

from jaxserve.cli import main
from rpc.security.keys import KeyFile, KeyFileError, add_key, hash_of, read_keys
from rpc.security.principal import Principal


def test_a_key_is_printed_once_and_only_its_hash_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "keys"
    assert main(["add-key", str(file), "acme"]) == 0
    assert main(["add-key", str(file), "ops", "--admin"]) == 0
    acme, ops = capsys.readouterr().out.split()
    assert acme not in file.read_text() and ops not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    keys = KeyFile(file)
    assert keys.principal_of(acme) == Principal("acme")
    assert keys.principal_of(ops) == Principal("ops", is_admin=True)
    assert keys.principal_of(acme + "x") is None
    assert keys.principal_of("") is None


def test_a_tenant_may_have_two_keys_while_one_replaces_the_other(tmp_path: Path):
    file = tmp_path / "keys"
    old, new = add_key(file, "acme"), add_key(file, "acme")
    keys = KeyFile(file)
    assert keys.principal_of(old) == keys.principal_of(new) == Principal("acme")


def test_a_key_is_added_after_a_last_line_that_has_no_end(tmp_path: Path):
    file = tmp_path / "keys"
    old = add_key(file, "acme")
    file.write_text(file.read_text().removesuffix("\n"))
    new = add_key(file, "beta")
    keys = KeyFile(file)
    assert (keys.principal_of(old), keys.principal_of(new)) == (Principal("acme"), Principal("beta"))


@pytest.mark.parametrize(
    "line", ["acme", "acme 1234", "a/b " + 64 * "0", "acme " + 64 * "0" + " root", "acme " + 64 * "0" + " admin x"]
)
def test_a_line_that_is_wrong_is_named_and_not_quoted(tmp_path: Path, line: str):
    file = tmp_path / "keys"
    file.write_text(f"# keys\n\n{line}\n")
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match="line 3: must be") as raised:
        read_keys(file)
    assert line.split()[-1] not in str(raised.value).partition("line 3")[2] or line.split()[-1] in ("acme", "x")


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path):
    file = tmp_path / "keys"
    file.write_text(f"acme {hash_of('a').hex()}\nother {hash_of('a').hex()}\n")
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match="line 2: the key is in the file twice"):
        read_keys(file)


def test_a_file_that_others_may_write_or_that_is_missing_is_refused(tmp_path: Path):
    file = tmp_path / "keys"
    add_key(file, "acme")
    file.chmod(0o620)
    with pytest.raises(KeyFileError, match="others than its owner may write"):
        read_keys(file)
    with pytest.raises(KeyFileError, match="No such file"):
        read_keys(tmp_path / "none")


def test_a_change_is_taken_in_and_one_that_cannot_be_used_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "keys"
    old = add_key(file, "acme")
    keys = KeyFile(file)
    new = add_key(file, "acme")
    assert keys.principal_of(new) is None
    keys.refresh()
    assert keys.principal_of(new) == Principal("acme")
    file.write_text("nonsense\n")
    keys.refresh()
    assert "stay as they were" in caplog.text
    assert keys.principal_of(old) == Principal("acme")
    file.unlink()
    keys.refresh()
    assert keys.principal_of(old) == Principal("acme")
    replacement = tmp_path / "replacement"
    third = add_key(replacement, "acme")
    os.replace(replacement, file)
    keys.refresh()
    assert keys.principal_of(third) == Principal("acme") and keys.principal_of(old) is None
    fourth = add_key(replacement, "acme")
    replacement.chmod(0o664)
    os.replace(replacement, file)
    keys.refresh()
    assert keys.principal_of(fourth) is None
    file.chmod(0o600)
    keys.refresh()
    assert keys.principal_of(fourth) == Principal("acme") and keys.principal_of(third) is None


def test_a_change_that_cannot_be_read_for_want_of_a_descriptor_is_taken_in_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "keys"
    old = add_key(file, "acme")
    keys = KeyFile(file)
    new = add_key(tmp_path / "replacement", "acme")
    os.replace(tmp_path / "replacement", file)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as scarce:
        scarce.setattr("builtins.open", refuse)
        keys.refresh()
        keys.refresh()
    assert caplog.text.count("Too many open files") == 1
    assert keys.principal_of(old) == Principal("acme")
    keys.refresh()
    assert keys.principal_of(old) is None and keys.principal_of(new) == Principal("acme")
