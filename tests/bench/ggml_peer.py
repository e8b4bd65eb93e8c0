"""ggml_peer.py - ggml's mul_mat_id graph as a peer of bench: forward only, weights of f32.

    ggml_peer.py --shape T,D,F,E,K,relu|swiglu [--routing balanced|FILE] [--threads N] [--rounds N]
                 [--serve]

Options, line and turns are those of torch_peer.py. The library is that of the package
libggml-python, or the one that GGML_LIB names a folder of; its C functions are called by ctypes.
Weights are [out,in], as ggml multiplies; grouping is part of mul_mat_id.
"""

import ctypes
import os
import random
import statistics
import sys

import torch_peer

F32, I32 = 0, 26
BYTES_OF_OBJECTS = 64 << 20


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p),
                ("no_alloc", ctypes.c_bool)]  # fmt: skip


def load():
    """(base, cpu) libraries, or ends with a word about it."""
    folder = os.environ.get("GGML_LIB")
    if not folder:
        try:
            import libggml
        except ImportError:
            sys.exit("ggml: not installed")
        folder = os.path.join(os.path.dirname(libggml.__file__), "lib64")
    try:
        base = ctypes.CDLL(os.path.join(folder, "libggml-base.so"), ctypes.RTLD_GLOBAL)
        return base, ctypes.CDLL(os.path.join(folder, "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
    except OSError as error:
        sys.exit(f"ggml: {error}")


class Graph:
    def __init__(self, options):
        self.base, self.cpu = load()
        self.name, self.T, self.D, self.F, self.E, self.K, self.gated = options.shape
        self.declare()
        wide = 2 * self.F if self.gated else self.F
        rows = self.T * self.K
        floats = self.E * self.D * (wide + self.F)
        floats += rows * (2 * wide + 4 * self.D) + 4 * self.T * self.D
        self.context = self.base.ggml_init(InitParams(4 * floats + BYTES_OF_OBJECTS, None, False))
        w1 = self.tensor(F32, self.D, wide, self.E)
        w2 = self.tensor(F32, self.F, self.D, self.E)
        x, ids = self.tensor(F32, self.D, 1, self.T), self.tensor(I32, self.K, self.T, 1)
        gates = self.tensor(F32, 1, self.K, self.T)
        self.ids, self.calls = self.base.ggml_get_data(ids), 0
        self.routings = self.read_routings(options.routing)
        for tensor, count in ((w1, self.E * self.D * wide), (w2, self.E * self.D * self.F),
                              (x, self.T * self.D), (gates, rows)):  # fmt: skip
            self.fill(tensor, count)
        h = self.node("ggml_mul_mat_id", w1, x, ids)
        h = self.node("ggml_swiglu" if self.gated else "ggml_relu", h)
        z = self.node("ggml_mul", self.node("ggml_mul_mat_id", w2, h, ids), gates)
        y = None
        for k in range(self.K):  # the sum over experts as llama.cpp has it
            row = 4 * self.D
            view = self.base.ggml_view_2d(self.context, z, self.D, self.T, self.K * row, k * row)
            view = ctypes.c_void_p(view)
            y = view if y is None else self.node("ggml_add", y, view)
        self.graph = ctypes.c_void_p(self.base.ggml_new_graph(self.context))
        self.base.ggml_build_forward_expand(self.graph, y)
        self.start(options.threads or os.cpu_count())

    def declare(self):
        pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
        self.base.ggml_init.restype, self.base.ggml_init.argtypes = pointer, [InitParams]
        for name in ("ggml_get_data", "ggml_new_graph", "ggml_new_tensor_3d", "ggml_view_2d",
                     "ggml_mul_mat_id", "ggml_swiglu", "ggml_relu", "ggml_mul",
                     "ggml_add"):  # fmt: skip
            getattr(self.base, name).restype = pointer
        self.base.ggml_get_data.argtypes = self.base.ggml_new_graph.argtypes = [pointer]
        self.base.ggml_new_tensor_3d.argtypes = [pointer, ctypes.c_int, number, number, number]
        self.base.ggml_view_2d.argtypes = [pointer, pointer, number, number, size, size]
        self.base.ggml_build_forward_expand.argtypes = [pointer, pointer]
        self.base.ggml_backend_graph_compute.argtypes = [pointer, pointer]
        self.base.ggml_threadpool_params_init.argtypes = [pointer, ctypes.c_int]
        self.cpu.ggml_backend_cpu_init.restype = self.cpu.ggml_threadpool_new.restype = pointer
        self.cpu.ggml_threadpool_new.argtypes = [pointer]
        self.cpu.ggml_backend_cpu_set_n_threads.argtypes = [pointer, ctypes.c_int]
        self.cpu.ggml_backend_cpu_set_threadpool.argtypes = [pointer, pointer]
        if hasattr(self.base, "ggml_log_set"):
            kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)
            self.quiet = kind(lambda *_: None)
            self.base.ggml_log_set(self.quiet, None)

    def tensor(self, kind, *sizes):
        return ctypes.c_void_p(self.base.ggml_new_tensor_3d(self.context, kind, *sizes))

    def node(self, name, *inputs):
        function = getattr(self.base, name)
        function.argtypes = [ctypes.c_void_p] * (1 + len(inputs))
        return ctypes.c_void_p(function(self.context, *inputs))

    def fill(self, tensor, count):
        """Some thousand numbers, over and over."""
        source = random.Random(1)
        block = (ctypes.c_float * 65521)(*(0.05 * source.uniform(-1, 1) for _ in range(65521)))
        data = self.base.ggml_get_data(tensor)
        for begin in range(0, count, len(block)):
            ctypes.memmove(data + 4 * begin, block, 4 * min(len(block), count - begin))

    def read_routings(self, routing):
        if routing == "balanced":
            ids = [i % self.E for i in range(self.T * self.K)]
        else:
            with open(routing) as file:
                ids = [int(word) for line in file for word in line.split()]
        rows = self.T * self.K
        parts = [ids[i : i + rows] for i in range(0, len(ids), rows)]
        return [(ctypes.c_int32 * rows)(*part) for part in parts]

    def start(self, threads):
        parameters = ctypes.create_string_buffer(4096)
        self.base.ggml_threadpool_params_init(parameters, threads)
        self.backend = ctypes.c_void_p(self.cpu.ggml_backend_cpu_init())
        self.cpu.ggml_backend_cpu_set_n_threads(self.backend, threads)
        pool = ctypes.c_void_p(self.cpu.ggml_threadpool_new(parameters))
        self.cpu.ggml_backend_cpu_set_threadpool(self.backend, pool)

    def step(self):
        block = self.routings[self.calls % len(self.routings)]
        ctypes.memmove(self.ids, block, 4 * len(block))
        self.calls += 1
        begin = torch_peer.time.perf_counter()
        if self.base.ggml_backend_graph_compute(self.backend, self.graph) != 0:
            sys.exit("ggml: the graph failed")
        return torch_peer.time.perf_counter() - begin


def main():
    options = torch_peer.read_arguments()
    if options.direction != "fwd":
        sys.exit("ggml: no backward")
    graph = Graph(options)
    graph.step()
    if options.serve:
        torch_peer.serve(lambda: graph.step())
        return
    times = [1e3 * graph.step() for _ in range(options.rounds)]
    middle = statistics.median(times)
    flops = 2 * (3 if graph.gated else 2) * graph.T * graph.K * graph.D * graph.F
    print(f"ggml,{graph.name},{options.routing},fwd,{middle:.4f},{1e-6 * flops / middle:.2f},"
          f"{torch_peer.peak_mib():.1f},{min(times):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
