"""Asks for the Triton kernels on CPU tensors without the interpreter, and prints the error.

Run by test_kernels.py.
"""

from gdrt_ds.errors import UserError
from gdrt_ds.loss import describe

try:
    describe("cpu", implementation="triton")
except UserError as error:
    print(error)
