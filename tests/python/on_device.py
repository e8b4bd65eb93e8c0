"""Arrays on a GPU for tests, by the runtime that libmoe_cuda has loaded."""

import ctypes

import numpy as np

import moe


class There:
    """An array on the current device."""

    def __init__(self, values):
        self.values = np.ascontiguousarray(values)
        self.shape, self.size = self.values.shape, self.values.nbytes
        place = ctypes.c_void_p()
        self.runtime = moe.load_cuda()
        assert self.runtime.cudaMalloc(ctypes.byref(place), ctypes.c_size_t(self.size)) == 0
        self.address = place.value
        self.copy(self.address, self.values.ctypes.data)

    def copy(self, to, source):
        """After what is queued, before what will be: a copy to a GPU may return before its end."""
        size = ctypes.c_size_t(self.size)
        assert self.runtime.cudaDeviceSynchronize() == 0
        assert self.runtime.cudaMemcpy(ctypes.c_void_p(to), ctypes.c_void_p(source), size, 4) == 0
        assert self.runtime.cudaDeviceSynchronize() == 0

    def host(self):
        found = np.empty_like(self.values)
        self.copy(found.ctypes.data, self.address)
        return found

    @property
    def __cuda_array_interface__(self):
        return {"shape": self.shape, "typestr": self.values.dtype.str, "version": 3,
                "data": (self.address, False)}  # fmt: skip

    def __del__(self):
        self.runtime.cudaFree(ctypes.c_void_p(self.address))
