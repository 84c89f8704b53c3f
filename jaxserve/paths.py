"""Names of files, as people give them."""

import errno
from pathlib import Path


def user_path(name: str | Path) -> Path:
    """The path of a name, which may begin with `~` or `~user`. Raises FileNotFoundError where nobody knows that home
    folder."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "its home folder is not known", str(name)) from None
