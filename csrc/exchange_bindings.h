// The part of moe_engine._C that is about the exchange.
#pragma once

#include <pybind11/pybind11.h>

namespace moe_engine {

void bind_exchange(pybind11::module_& module);

}  // namespace moe_engine
