"""The root and results/ on the import path, torch on one thread, and errors that are one line."""

import gc
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
torch.set_num_threads(1)


@pytest.fixture
def fails(capsys, monkeypatch):
    """fails(words, module, flags...): the exit code; stderr is one line with these words."""
    from common import run_script

    def check(words, module, *arguments):
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)   # restored later
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_script(lambda: module.parse_args(list(map(str, arguments))), module.main)
        error, code = capsys.readouterr().err, stop.value.code
        del stop
        gc.collect()                             # the dead run's frame holds its lock
        assert error.count("\n") == 1 and error.endswith("\n") and "error: " in error, error
        assert all(word in error for word in words), error
        return code
    return check
