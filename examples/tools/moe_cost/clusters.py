"""What a GPU and its links can do. docs/cost-model.md has the source of each number."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    name: str
    peak_tflops: float  # dense bf16
    efficiency: float  # of that, what a GEMM of many rows reaches
    memory_gbs: float
    node_gbs: float  # what a GPU sends inside its node, one direction
    network_gbs: float  # what a GPU sends to other nodes, one direction
    latency_us: float = 5.0  # of an exchange, whatever its size
    message_us: float = 0.1  # of each message of an exchange
    launch_us: float = 3.0  # the least that a kernel takes in a stream

    @property
    def flops(self):
        """A GEMM's, a second."""
        return self.peak_tflops * 1e12 * self.efficiency


CLUSTERS = {
    c.name: c
    for c in (
        Cluster("a100", 312.0, 0.55, 2039.0, 225.0, 22.5),
        Cluster("h100", 989.0, 0.55, 3350.0, 337.0, 45.0),
        Cluster("h800", 989.0, 0.55, 3350.0, 155.0, 45.0),
    )
}
