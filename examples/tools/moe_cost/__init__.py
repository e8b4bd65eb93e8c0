"""What a MoE layer costs on a cluster, from closed forms: the parts of the command moe-cost.

routing   how many nodes and ranks a token visits
clusters  what a GPU and its links can do, by name
models    sizes of published models, and what the library says of them
kernels   arithmetic and bytes of each kernel
cost      times of a layer: kernels, exchanges, gradients
published figures that others published, and the model's beside them
report    text and CSV
picture   communication over GEMM time against the number of GPUs (needs matplotlib)
command   the command line

docs/cost-model.md has the formulas. Nothing but `picture` needs more than Python and libmoe.
"""
