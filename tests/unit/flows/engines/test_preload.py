"""What a process of stages imports before its first job."""

import subprocess
import sys

import pytest

from flows.engines.preload import HIDDEN, PRELOAD

pytestmark = pytest.mark.slow

SCRIPT = f"""
import importlib.util, sys
from flows.engines.preload import preload
preload({("no_such_package", *PRELOAD)})
print([name for name in {HIDDEN} if name in sys.modules])
import scipy.optimize, sklearn.metrics
from transformers.utils import is_scipy_available, is_sklearn_available
print(is_scipy_available(), is_sklearn_available())
from peft.import_utils import is_bnb_available
print(is_bnb_available() == (importlib.util.find_spec("bitsandbytes") is not None))
"""


def test_packages_that_no_stage_uses_are_left_out_and_can_be_imported_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True True", "True"]
    assert "cannot preload no_such_package" in done.stderr
