"""The parts of gpu_suite.py, in the order of what they are worth."""

from benchmarks.gpu.kernels import attention, convolutions, peaks
from benchmarks.gpu.programs import flags, layers, trace
from benchmarks.gpu.requests import diffusers, inexact, requests
from benchmarks.gpu.setting import Part

# A further part is a function that yields rows, and its line here.
PARTS = {
    "peaks": Part(peaks, 15),
    "attention": Part(attention, 40),
    "requests": Part(requests, 150),
    "trace": Part(trace, 30),
    "options": Part(inexact, 45),
    "convolutions": Part(convolutions, 40),
    "layers": Part(layers, 45),
    "flags": Part(flags, 40),
    "diffusers": Part(diffusers, 45, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}),  # the GPU's memory is for both
}
