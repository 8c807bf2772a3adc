// The entries for torch tensors, in the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace pybn {

void register_torch(pybind11::module_& m);

}  // namespace pybn
