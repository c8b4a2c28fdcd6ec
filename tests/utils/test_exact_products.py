"""Products inside :func:`exact_products` are float32's, and the settings come back."""

import subprocess
import sys

PROGRAM = """
import torch
from aqdet.utils.exact_products import exact_products

matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

def check(state, off):
    before = state()
    for failure in (None, ZeroDivisionError):
        try:
            with exact_products():
                assert state() == off, state()
                if failure:
                    raise failure
        except ZeroDivisionError:
            pass
        assert state() == before

for on in (None, True, False):
    if on is not None:
        matmul.allow_tf32 = cudnn.allow_tf32 = on
    check(lambda: (matmul.allow_tf32, cudnn.allow_tf32), (False, False))
if hasattr(matmul, "fp32_precision"):
    matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32"
    check(lambda: (matmul.fp32_precision, cudnn.conv.fp32_precision), ("ieee", "ieee"))
"""


def test_float32_inside_and_as_before_outside():
    # In a process of its own: torch does not forget by which of its names it was set.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
