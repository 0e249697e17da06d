// What the machine's GPUs are and how they are linked.
#pragma once

#include <cstdint>
#include <string>

namespace moe_engine {

struct DeviceInfo {
  std::string name;
  int num_sms;
  int compute_major;
  int compute_minor;
  std::int64_t memory_bytes;
  std::int64_t l2_bytes;
  // The device says that its fabric can broadcast and reduce in the network (NVLink SHARP).
  bool multicast;
};

// How `device` sees the memory of `peer`.
struct LinkInfo {
  bool peer_access;
  bool native_atomics;
  // The driver's relative rank of the link; 0 is the fastest kind on the machine.
  int performance_rank;
};

// 0 if there is no GPU or no driver; any other failure throws.
int device_count();

DeviceInfo device_info(int device);

// Throws std::invalid_argument if both are the same device.
LinkInfo link_info(int device, int peer);

}  // namespace moe_engine
