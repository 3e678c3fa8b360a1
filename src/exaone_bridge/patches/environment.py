"""Mends the environment: a user name, a home, locks in it, tokenizers after a fork. No torch.

torch, Megatron-Bridge and Transformers expect a passwd entry (`getpass.getuser`), a home folder for
their caches, and `flock` in it, and raise where one is missing. Each replacement is made only then,
in this process and its children.

Megatron-Bridge makes tokenizers parallel after a fork too, where their threads are missing.
"""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

__all__ = [
    "let_tokenizers_notice_forks",
    "provide_lock_folder",
    "provide_user_and_home",
    "warn_once",
]

_USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # those that getpass reads
_LOCK_FOLDER = "MEGATRON_CONFIG_LOCK_DIR"  # Megatron-Bridge 0.6.2, safe_config_loader.py
_warned: set[str] = set()


def provide_user_and_home() -> None:
    """Set USER and HOME where there is neither the variable nor a passwd entry."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not any(os.environ.get(name) for name in _USER_VARIABLES):
            os.environ["USER"] = f"uid{os.getuid()}"
        if not os.environ.get("HOME"):
            os.environ["HOME"] = str(_private_folder())
            warn_once(
                f"no home folder: caches are in {os.environ['HOME']}; set HOME to name another"
            )


def provide_lock_folder() -> None:
    """Have Megatron-Bridge lock in a temporary folder where it cannot lock in the home folder."""
    if os.environ.get(_LOCK_FOLDER):
        return
    folder = Path.home() / ".cache" / "huggingface"
    import fcntl
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.environ[_LOCK_FOLDER] = str(_private_folder())
        warn_once(
            f"{folder} takes no locks ({error.strerror}): those of this machine are in "
            f"{os.environ[_LOCK_FOLDER]}; set {_LOCK_FOLDER} to name another folder"
        )


def let_tokenizers_notice_forks() -> None:
    """Undo `os.putenv("TOKENIZERS_PARALLELISM", "True")` (Megatron-Bridge 0.6.2, gpt_sft.py).

    Without the variable tokenizers are parallel until a fork and sequential after it. With it the
    first batch in a forked process, as of a data loader, waits forever for threads of its parent.
    """
    if "TOKENIZERS_PARALLELISM" not in os.environ:  # putenv does not change os.environ
        os.unsetenv("TOKENIZERS_PARALLELISM")


def _private_folder() -> Path:
    """Return this user's folder in the folder for temporary files, the same in every process."""
    import tempfile  # imported late: it takes longer than `import exaone_bridge`

    folder = Path(tempfile.gettempdir()) / f"exaone_bridge-uid{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid():  # somebody else has made it
        return Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    return folder


def warn_once(text: str) -> None:
    """Print that a guarantee is weaker here: rank 0, once, also where logging is disabled."""
    if text in _warned:
        return
    _warned.add(text)
    if os.environ.get("RANK", "0") == "0":
        print(f"exaone-bridge: {text}.", file=sys.stderr)
