// Values of the special registers that do not change while a warp runs.
#pragma once

#include "emu/machine.hpp"

namespace dsk::emu {
u64 special_value(const Warp& w, Special which, u32 lane);
}
