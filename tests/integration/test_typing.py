"""The types as a user's type checker sees them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gradext

pytestmark = pytest.mark.medium

pytest.importorskip("mypy", reason="mypy is not installed")
USER = Path(__file__).resolve().parent / "typing_public.py"


def test_the_public_interface_is_typed_for_its_users(tmp_path):
    package = Path(gradext.__file__).resolve().parent
    assert (package / "py.typed").is_file()
    # An installed package is found by itself; a source folder, as in an editable install, has to be named.
    installed = package.parent.name in ("site-packages", "dist-packages")
    path = {} if installed else {"MYPYPATH": str(package.parent)}
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", str(USER)],
        cwd=tmp_path,
        env={**os.environ, **path},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert result.returncode == 0, result.stdout + result.stderr
