// The only launch, and what an entry needs around it: the device and the error code. An entry is written
//   OnDevice here(device);
//   return launch(kernel<float>, {blocks}, 128, pool_bytes, stream, arguments...);
// and returns 0 or a code that maskdiff_cuda_error_text explains. Nothing here waits for the device.
#pragma once
#include "ptx.cuh"

namespace maskdiff {

constexpr int kCudaError = 1000; // + cudaError_t: what an entry returns where CUDA fails

#if MASKDIFF_EMULATED

using emulator::Grid;
struct OnDevice {
  explicit OnDevice(int) {}
};
template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, unsigned threads, size_t pool_bytes, void*, A... arguments) {
  return emulator::launch(kernel, grid, threads, pool_bytes, arguments...) ? kCudaError : 0;
}
inline const char* cuda_error_text(int) { return emulator::error.c_str(); }

#else

struct Grid {
  unsigned x, y = 1;
};

class OnDevice { // makes a device current while it lives
 public:
  explicit OnDevice(int device) {
    cudaGetDevice(&before_);
    if (before_ != device) cudaSetDevice(device);
    else before_ = -1;
  }
  ~OnDevice() {
    if (before_ >= 0) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

// Launches `grid` blocks of `threads` threads with pool_bytes of dynamic shared memory. The launch alone is reported: a
// fault inside the kernel shows at a later call.
template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, unsigned threads, size_t pool_bytes, void* stream, A... arguments) {
  cudaError_t status = cudaSuccess;
  if (pool_bytes > 48 * 1024) // more than a kernel gets unasked
    status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(pool_bytes));
  if (status == cudaSuccess) {
    kernel<<<dim3(grid.x, grid.y), threads, pool_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? 0 : kCudaError + static_cast<int>(status);
}
inline const char* cuda_error_text(int code) {
  return code == 0 ? "no error" : cudaGetErrorString(static_cast<cudaError_t>(code - kCudaError));
}

#endif

} // namespace maskdiff
