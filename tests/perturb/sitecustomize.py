"""Imported by every Python whose PYTHONPATH names this folder: installs hook.py, then runs the next sitecustomize."""

import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.realpath(__file__))


def _run(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if os.environ.get("VLFM_TEST_PERTURB"):
    _run("vlfm_perturb_hook", os.path.join(_HERE, "hook.py")).install()

_others = [place for place in sys.path if os.path.realpath(place) != _HERE]
if (_next := importlib.machinery.PathFinder.find_spec("sitecustomize", _others)) is not None and _next.origin:
    _run("sitecustomize_of_the_environment", _next.origin)
