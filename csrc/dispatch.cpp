#include "dispatch.h"

#include <atomic>

namespace pybn {

// Defined by kernels_isa.cpp, once per set and type.
#define PYBN_INSTRUCTION_SET(name)                                                                      \
  extern const KernelTable<float> float_kernels_##name;                                                 \
  extern const KernelTable<double> double_kernels_##name;                                               \
  extern const KernelTable<Float16> Float16_kernels_##name;                                             \
  extern const KernelTable<BFloat16> BFloat16_kernels_##name;                                           \
  const InstructionSet name{#name, float_kernels_##name, double_kernels_##name, Float16_kernels_##name, \
                            BFloat16_kernels_##name};

PYBN_INSTRUCTION_SET(baseline)
#if defined(PYBN_HAVE_AVX2)
PYBN_INSTRUCTION_SET(avx2)
#endif
#if defined(PYBN_HAVE_AVX512)
PYBN_INSTRUCTION_SET(avx512)
#endif

namespace {

// The compiled sets that this CPU supports, best first. __builtin_cpu_supports also asks whether the operating system
// saves the registers.
std::vector<const InstructionSet*> detect() {
  std::vector<const InstructionSet*> sets;
#if defined(PYBN_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma"))
    sets.push_back(&avx512);
#endif
#if defined(PYBN_HAVE_AVX2)
  // F16C, which Clang 14 cannot ask for, came before AVX2 in every line of CPUs.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(&avx2);
#endif
  sets.push_back(&baseline);
  return sets;
}

const std::vector<const InstructionSet*>& detected() {
  static const std::vector<const InstructionSet*> sets = detect();
  return sets;
}

std::atomic<const InstructionSet*>& selected() {
  static std::atomic<const InstructionSet*> set{detected().front()};
  return set;
}

bool detect_amd() {
#if defined(__x86_64__) || defined(__i386__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

std::atomic<bool>& amd() {
  static std::atomic<bool> is{detect_amd()};
  return is;
}

}  // namespace

bool is_amd() {
  return amd().load(std::memory_order_relaxed);
}

void set_is_amd(bool is) {
  amd() = is;
}

const InstructionSet& instruction_set() {
  return *selected().load(std::memory_order_acquire);
}

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : detected()) names.emplace_back(set->name);
  return names;
}

bool select_instruction_set(const std::string& name) {
  for (const InstructionSet* set : detected())
    if (name == set->name) {
      selected().store(set, std::memory_order_release);
      return true;
    }
  return false;
}

}  // namespace pybn
