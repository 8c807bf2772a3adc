// Which instruction set the kernels run with.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace pybn {

// The set in use: the best that this CPU supports, until select_instruction_set changes it.
const InstructionSet& instruction_set();

// Names of the compiled sets that this CPU supports, best first.
std::vector<std::string> available_instruction_sets();

// Returns false, and changes nothing, if no available set has that name.
bool select_instruction_set(const std::string& name);

// Whether this is one of AMD's processors, for which some things are done otherwise. Speed depends on it, bits do not;
// so that tests can see that, set_is_amd changes the answer.
bool is_amd();
void set_is_amd(bool is);

template <class T>
const KernelTable<T>& kernels();

template <>
inline const KernelTable<float>& kernels<float>() {
  return instruction_set().float32;
}
template <>
inline const KernelTable<double>& kernels<double>() {
  return instruction_set().float64;
}
template <>
inline const KernelTable<Float16>& kernels<Float16>() {
  return instruction_set().float16;
}
template <>
inline const KernelTable<BFloat16>& kernels<BFloat16>() {
  return instruction_set().bfloat16;
}

}  // namespace pybn
