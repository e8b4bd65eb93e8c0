/* device_here.c - says which GPU there is; ends with 1 where there is none. */
#include <cuda_runtime_api.h>
#include <stdio.h>

int main(void)
{
    int count = 0, device = 0;
    struct cudaDeviceProp properties;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) error = cudaGetDevice(&device);
    if (error == cudaSuccess && count > 0) error = cudaGetDeviceProperties(&properties, device);
    if (error != cudaSuccess || count == 0) {
        printf("%s\n", error == cudaSuccess ? "no CUDA device" : cudaGetErrorString(error));
        return 1;
    }
    printf("device %d of %d: %s, compute capability %d.%d\n", device, count, properties.name,
           properties.major, properties.minor);
    return 0;
}
