"""API keys by tenant, from a file that holds their hashes.

    # tenant  sha256 of the key, in hexadecimal                                  role, where it is admin
    acme      9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    ops       60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752   admin

A line is a key; a tenant may have several, so that one can replace another. Keys are 256 random bits that
`jaxserve add-key` makes and shows once: nothing short enough to guess has to be protected by a slow hash, and a file
that is read by others gives nobody a key. One that others may write would, so it is refused.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from rpc.security.principal import Principal

logger = logging.getLogger(__name__)

KEY_PREFIX = "jxs_"
"""What every key starts with, so that scanners find one where it does not belong."""
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


class KeyFileError(ValueError):
    """The key file cannot be used; says why, with the line."""


def hash_of(key: str) -> bytes:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def read_keys(path: Path) -> Mapping[bytes, Principal]:
    """The principals by the hash of their keys. Raises KeyFileError."""
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise KeyFileError(f"{path}: others than its owner may write it (mode {stat.S_IMODE(mode):o})")
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path}: {error}") from error
    principals: dict[bytes, Principal] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        tenant, digest, role = (*words, "", "")[:3]
        if len(words) > 3 or not _TENANT.fullmatch(tenant) or not _HASH.fullmatch(digest) or role not in ("", "admin"):
            # The line is not quoted: it may hold a key that someone took for its hash.
            raise KeyFileError(
                f"{path}, line {number}: must be a tenant, a sha256 in hexadecimal, and admin or nothing"
            )
        hashed = bytes.fromhex(digest)
        if hashed in principals:
            raise KeyFileError(f"{path}, line {number}: the key is in the file twice")
        principals[hashed] = Principal(tenant, role == "admin")
    return principals


def add_key(path: Path, tenant: str, is_admin: bool = False) -> str:
    """Makes a key, adds its line to a file, which is made if need be, and returns the key. Raises KeyFileError."""
    if not _TENANT.fullmatch(tenant):
        raise KeyFileError(f"tenant: must be 1 to 64 letters, digits, dots, dashes or underscores, got {tenant!r}")
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    line = f"{tenant}  {hash_of(key).hex()}{'  admin' if is_admin else ''}\n"
    if path.exists():
        read_keys(path)
        if not path.read_bytes().endswith(b"\n"):
            line = "\n" + line  # an editor may leave the last line without its end
    try:
        with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise KeyFileError(f"{path}: {error}") from error
    return key


class KeyFile:
    """The keys of a file, as it is now: `refresh` reads it again where it has changed. Raises KeyFileError at first."""

    def __init__(self, path: Path):
        self._path = path
        self._seen = self._version()
        self._principals = read_keys(path)
        self._complaint = ""

    def _version(self) -> tuple[int, ...] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        # The time of change is of the mode as well, for which a file may have been refused.
        return found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size

    def refresh(self) -> None:
        """Takes in a file that has changed. One that cannot be used is logged, once, and the keys stay as they were; it
        is tried again each time, for what kept it from being read may be over.

        Calls that are open go on; their keys are not asked for again.
        """
        version = self._version()
        if version == self._seen:
            return
        try:
            self._principals = read_keys(self._path)
        except KeyFileError as error:
            if str(error) != self._complaint:
                logger.error("the API keys stay as they were: %s", error)
            self._complaint = str(error)
        else:
            self._seen, self._complaint = version, ""
            logger.info("the API keys were read again: %d", len(self._principals))

    def principal_of(self, key: str) -> Principal | None:
        """Whose key it is. Every line is compared, each in constant time, so that the time tells nothing."""
        hashed = hash_of(key)
        found = None
        for known, principal in self._principals.items():
            if hmac.compare_digest(known, hashed):
                found = principal
        return found
