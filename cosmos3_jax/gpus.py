"""What named GPUs can do at most, as NVIDIA publishes it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class GPU:
    """Peaks of one device: matrix products without sparsity, memory, and links to its neighbours."""

    name: str
    bfloat16: float  # FLOP/s of tensor cores, dense; the papers that print it "with sparsity" are halved
    float32: float  # FLOP/s of CUDA cores: float32 requests do not use TF32
    memory: float  # bytes, of 10^9 a GB
    bandwidth: float  # bytes/s of the memory
    link: float  # bytes/s in each direction: NVLink, or PCIe where there is none
    source: str


GPUS = (
    GPU("A100", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, "NVIDIA A100 80 GB SXM, data sheet 1758950"),
    GPU("H100", 989e12, 67e12, 80e9, 3.35e12, 450e9, "NVIDIA H100 SXM, data sheet; 1,979 TFLOP/s with sparsity"),
    GPU("H200", 989e12, 67e12, 141e9, 4.8e12, 450e9, "NVIDIA H200 SXM, data sheet; 1,979 TFLOP/s with sparsity"),
    GPU("B200", 2250e12, 75e12, 180e9, 7.7e12, 900e9, "NVIDIA HGX B200, data sheet 3384703; 4.5 PFLOP/s with sparsity"),
    GPU("L40S", 362e12, 91.6e12, 48e9, 0.864e12, 32e9, "NVIDIA L40S, data sheet; PCIe 4.0 x16"),
    GPU("RTX PRO 6000", 503.8e12, 125e12, 96e9, 1.792e12, 64e9, "NVIDIA RTX Blackwell PRO, architecture 1.1; PCIe 5.0 x16"),
)


def named(device: str) -> GPU | None:
    """The GPU whose name is in what JAX calls a device; none of another."""
    return next((gpu for gpu in GPUS if gpu.name in device), None)
