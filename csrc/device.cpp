#include "device.h"

#include <cuda.h>

#include <stdexcept>

#include "check.h"

namespace moe_engine {
namespace {

int attribute(cudaDeviceAttr attr, int device) {
  int value = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&value, attr, device));
  return value;
}

// The runtime has no name for this attribute. The driver's function is looked up at run time, so
// that the module also loads where libcuda does not exist.
bool multicast_supported(int device) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuDeviceGetAttribute", &entry, 12010,
                                              cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess) return false;
  int value = 0;
  const auto get_attribute = reinterpret_cast<decltype(&cuDeviceGetAttribute)>(entry);
  const CUresult status = get_attribute(&value, CU_DEVICE_ATTRIBUTE_MULTICAST_SUPPORTED, device);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error("cuDeviceGetAttribute(MULTICAST_SUPPORTED) failed with CUresult " +
                             std::to_string(static_cast<int>(status)));
  }
  return value != 0;
}

}  // namespace

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    cudaGetLastError();  // the runtime keeps the error otherwise, and a later check would report it
    return 0;
  }
  check_cuda(status, "cudaGetDeviceCount(&count)");
  return count;
}

DeviceInfo device_info(int device) {
  cudaDeviceProp properties;
  CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
  DeviceInfo info;
  info.name = properties.name;
  info.num_sms = properties.multiProcessorCount;
  info.compute_major = properties.major;
  info.compute_minor = properties.minor;
  info.memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem);
  info.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  info.multicast = multicast_supported(device);
  return info;
}

LinkInfo link_info(int device, int peer) {
  if (device == peer) {
    throw std::invalid_argument("device and peer are both " + std::to_string(device) +
                                "; a link joins two different devices");
  }
  LinkInfo info;
  int value = 0;
  CHECK_CUDA(cudaDeviceCanAccessPeer(&value, device, peer));
  info.peer_access = value != 0;
  CHECK_CUDA(cudaDeviceGetP2PAttribute(&value, cudaDevP2PAttrNativeAtomicSupported, device, peer));
  info.native_atomics = value != 0;
  CHECK_CUDA(cudaDeviceGetP2PAttribute(&value, cudaDevP2PAttrPerformanceRank, device, peer));
  info.performance_rank = value;
  return info;
}

}  // namespace moe_engine
