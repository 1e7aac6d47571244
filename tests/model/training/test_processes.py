"""The processes of a training run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ENDING = """
import atexit
from model.training.processes import end_program

class AtTeardown:
    def __del__(self):
        print("taken down")

held = AtTeardown()
atexit.register(print, "closed")
print("done")
end_program(75)
"""


@pytest.mark.parametrize(("world", "told"), [("1", "done closed taken down"), ("2", "done closed")])
def test_one_of_several_processes_ends_without_taking_the_interpreter_down(world: str, told: str) -> None:
    """What gloo's threads still hold would abort it there (model.training.processes.end_program)."""
    environment = {**os.environ, "WORLD_SIZE": world}
    done = subprocess.run([sys.executable, "-c", ENDING], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (75, told.split())
