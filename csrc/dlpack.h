// DLPack's C interface, version 1: the structs by which libraries pass tensors to one another (dmlc.github.io/dlpack).
// Only names and order of the fields matter; what pybn does not use is left out or kept as padding.
#pragma once

#include <cstdint>

namespace pybn::dlpack {

struct Version {
  std::uint32_t major, minor;
};

enum : std::int32_t { kCpu = 1 };

struct Device {
  std::int32_t type, id;
};

enum : std::uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t *shape, *strides;  // strides in elements
  std::uint64_t byte_offset;
};

// A tensor and who frees it.
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  std::uint64_t flags;
  Tensor tensor;
};

// The functions of a library, in a capsule of this name, which is its tensor type's `__dlpack_c_exchange_api__` (since
// version 1.3). Those that take or return a Python object return 0, or -1 with a Python error.
constexpr const char* kCapsule = "dlpack_exchange_api";

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* export_managed;
  int (*import_managed)(ManagedTensor*, void** object);  // takes the tensor, also when it fails
  int (*view)(void* object, Tensor*);                    // borrowed: valid while the object is
  void* current_stream;
};

}  // namespace pybn::dlpack
