#include "emu/types.hpp"

#include <cstddef>

namespace dsk::emu {
namespace {

struct TypeRow {
  const char* name;
  int size;
  bool is_float;
  bool is_signed;
};

constexpr TypeRow kTypes[] = {
    {"", 0, false, false},       {"pred", 0, false, false},  {"b8", 1, false, false},
    {"u8", 1, false, false},     {"s8", 1, false, true},     {"b16", 2, false, false},
    {"u16", 2, false, false},    {"s16", 2, false, true},    {"b32", 4, false, false},
    {"u32", 4, false, false},    {"s32", 4, false, true},    {"b64", 8, false, false},
    {"u64", 8, false, false},    {"s64", 8, false, true},    {"b128", 16, false, false},
    {"f16", 2, true, false},     {"bf16", 2, true, false},   {"f32", 4, true, false},
    {"f64", 8, true, false},     {"tf32", 4, true, false},   {"f16x2", 4, true, false},
    {"bf16x2", 4, true, false},  {"e4m3", 1, true, false},   {"e5m2", 1, true, false},
    {"e4m3x2", 2, true, false},  {"e5m2x2", 2, true, false}, {"e2m1x2", 1, true, false},
    {"ue8m0x2", 2, true, false},
};

const TypeRow& row(Type t) { return kTypes[static_cast<std::size_t>(t)]; }

}  // namespace

int type_size(Type t) { return row(t).size; }
bool is_float(Type t) { return row(t).is_float; }
bool is_signed(Type t) { return row(t).is_signed; }
const char* type_name(Type t) { return row(t).name; }

Type parse_type(std::string_view name) {
  for (std::size_t k = 1; k < sizeof(kTypes) / sizeof(kTypes[0]); ++k) {
    if (name == kTypes[k].name) return static_cast<Type>(k);
  }
  return Type::None;
}

}  // namespace dsk::emu
