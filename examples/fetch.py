"""Public files of the examples: downloaded once with pip, checked against a hash, then kept.

pip is only the courier, so whatever index, proxy or certificate it is set up with is used here too.
Nothing is installed and nothing that is downloaded is executed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_jax"

# `pip download` of a source distribution runs its setup.py to learn what it depends on. The file
# alone is enough here: pip's own finder and session, in a process of their own, fetch just that.
SDIST = """
import sys
from pip._internal.commands import create_command
from tqdm import tqdm
requirement, filename, folder = sys.argv[1:]
command = create_command("download")
with command.main_context():
    options, _ = command.parse_args(["--no-binary=:all:", requirement])
    session = command.get_default_session(options)
    finder = command._build_package_finder(options, session)
    found = finder.find_all_candidates(requirement.split("==")[0])
    links = [c.link for c in found if c.link.filename == filename]
    if not links:
        sys.exit(f"no index that pip is set up with could be reached and has {filename}")
    response = session.get(links[0].url_without_fragment, headers={"Accept-Encoding": "identity"})
    response.raise_for_status()
    size = int(response.headers.get("Content-Length", 0)) or None
    bar = tqdm(total=size, desc=filename, unit="B", unit_scale=True, file=sys.stdout)
    with bar, open(f"{folder}/{filename}", "wb") as file:
        for chunk in response.iter_content(2**16):
            bar.update(file.write(chunk))
"""


class FetchError(SystemExit):
    """A file could not be had or is not the right one. Uncaught, it ends a script with its text."""


def wheel(requirement: str, filename: str, sha256: str, cache: Path = CACHE) -> Path:
    """The path of the wheel `filename` of `requirement` ("name==version"), in `cache`."""
    flags = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    command = ["-m", "pip", "download", *flags, requirement, "--dest"]
    return _fetch(command, requirement, filename, sha256, cache)


def sdist(requirement: str, filename: str, sha256: str, cache: Path = CACHE) -> Path:
    """The same for a source distribution."""
    return _fetch(["-c", SDIST, requirement, filename], requirement, filename, sha256, cache)


def _fetch(command, requirement, filename, sha256, cache):
    path = Path(cache).expanduser() / filename
    if path.exists() and _sha256(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        print(f"fetching {filename} into {path.parent}, once", file=sys.stderr)
        command = [sys.executable, "-P", *command, folder]  # -P: nothing from this folder
        # What it says, its bar as well, goes to our stderr; its own stderr is for the error below.
        pip = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
        fetched = Path(folder) / filename
        if not fetched.exists():
            raise FetchError(
                f"{filename} of {requirement} could not be fetched. The last that pip said:\n"
                + "\n".join("  " + line for line in pip.stderr.strip().splitlines()[-4:])
                + "\nSee that `python -m pip download` works for this Python and reaches an index,"
                f"\nor put the file itself into {path.parent}."
            )
        found = _sha256(fetched)
        if found != sha256:
            raise FetchError(
                f"{filename} of {requirement} is not the file expected, and was not kept.\n"
                f"  expected sha256 {sha256}\n  found    sha256 {found}\n"
                "Try again in case it was cut short; then look at `python -m pip config list`,"
                f"\nor put the file itself into {path.parent}."
            )
        os.replace(fetched, path)  # whole or not at all
    return path


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
