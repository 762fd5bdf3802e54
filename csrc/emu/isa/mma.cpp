// mma.sync, and moving matrix fragments between shared memory and registers.
#include "emu/isa/common.hpp"
#include "emu/num/fragments.hpp"
#include "emu/num/tensorcore.hpp"

namespace dsk::emu {
namespace {

num::MmaType mma_type(Type t) {
  switch (t) {
    case Type::F16:
      return num::MmaType::f16;
    case Type::BF16:
      return num::MmaType::bf16;
    case Type::TF32:
      return num::MmaType::tf32;
    case Type::E4M3:
      return num::MmaType::e4m3;
    case Type::E5M2:
      return num::MmaType::e5m2;
    case Type::S8:
      return num::MmaType::s8;
    default:
      return num::MmaType::u8;
  }
}

// m16n8k*: D = A * B + C. Ext: regs D, regs2 A then B then C; v: 0 A registers, 1 B registers,
// 2 k; op accumulator type.
void mma_m16n8(Warp& w, const Inst& i, u32 mask) {
  const Ext& x = *i.ext;
  const int a_count = static_cast<int>(x.v[0]), b_count = static_cast<int>(x.v[1]);
  num::MmaKind kind;
  kind.a = mma_type(x.type);
  kind.b = mma_type(x.type2);
  kind.d = static_cast<num::AccType>(i.op);
  kind.k = static_cast<int>(x.v[2]);
  kind.unit = num::MmaUnit::mma_sync;
  kind.saturate = i.sub != 0;
  kind.mode = w.cta->cluster->grid->config.numerics == Numerics::Fast ? num::MmaMode::fast
                                                                      : num::MmaMode::exact;
  const u32* sources[16];
  for (std::size_t k = 0; k < x.regs2.size(); ++k) sources[k] = w.reg<u32>(x.regs2[k]);
  const std::size_t pitch = num::row_bytes(kind);
  u8 a[16 * 64], b[8 * 64];
  alignas(64) u8 dense[16 * 8 * 4];
  num::unpack_a(sources, a_count, a, static_cast<int>(pitch));
  num::unpack_b(sources + a_count, b_count, b, static_cast<int>(pitch));
  num::load_accumulator(sources + a_count + b_count, 8, kind.d, dense, 8);
  static thread_local num::BPanel panel;
  panel.load(kind, b, pitch, 8);
  num::mma(panel, a, pitch, 16, dense, 8, true);
  u32* dest[4];
  u32 result[4][kLanes];  // D may be the same registers as A, B or C
  for (std::size_t k = 0; k < x.regs.size(); ++k) dest[k] = result[k];
  num::store_accumulator(dest, 8, kind.d, dense, 8);
  for (std::size_t k = 0; k < x.regs.size(); ++k) {
    if (x.regs[k] != kNoReg) std::memcpy(w.reg<u32>(x.regs[k]), result[k], sizeof result[k]);
  }
}

void bind_mma(Decoder& d, Inst& i) {
  d.arity(4);
  Ext& x = d.ext(i);
  int m = 0, n = 0, k = 0;
  for (const std::string& s : d.in().modifiers) {
    if (s[0] == 'm' && std::sscanf(s.c_str(), "m%dn%dk%d", &m, &n, &k) == 3) break;
  }
  const Type acc = d.type(0);
  x.type = d.type(1), x.type2 = d.type(2);
  const int bits = x.type == Type::TF32 ? 32 : 8 * type_size(x.type);
  x.v[0] = 16 * k * bits / 1024;
  x.v[1] = 8 * k * bits / 1024;
  x.v[2] = k;
  i.op = static_cast<u8>(acc == Type::F32   ? num::AccType::f32
                         : acc == Type::F16 ? num::AccType::f16
                                            : num::AccType::s32);
  i.sub = d.has("satfinite");
  const std::size_t c_count = acc == Type::F16 ? 2 : 4;
  const auto list = [&](std::size_t at, std::size_t want) -> std::vector<ptx::Operand> {
    const ptx::Operand& o = d.operand(at);
    const std::vector<ptx::Operand> regs =
        o.kind == ptx::Operand::Kind::Vector ? o.list : std::vector<ptx::Operand>{o};
    if (regs.size() != want) {
      d.fail("operand " + std::to_string(at + 1) + " takes " + std::to_string(want) +
             " registers, got " + std::to_string(regs.size()));
    }
    return regs;
  };
  for (const auto& o : list(0, c_count)) x.regs.push_back(d.dst(o, 4));
  for (const auto& o : list(1, static_cast<std::size_t>(x.v[0]))) x.regs2.push_back(d.src(o, 4));
  for (const auto& o : list(2, static_cast<std::size_t>(x.v[1]))) x.regs2.push_back(d.src(o, 4));
  for (const auto& o : list(3, c_count)) x.regs2.push_back(d.src(o, 4));
  i.flags |= kAligned;
  i.fn = mma_m16n8;
}

// --- ldmatrix, stmatrix: lane 8i + r addresses row r of matrix i
void matrix_rows(Warp& w, const Inst& i, bool write, Place* places) {
  const int lanes = 8 * i.count;
  for (int l = 0; l < lanes; ++l) {
    const u64 address = lane_address(w, i, l);
    places[l] = resolve(w, i.space, address, l, 16, write);
    if (places[l].space != Space::Shared) {
      fail(w, 1u << l, "shared-out-of-bounds", "the row address is not in shared memory");
    }
  }
  if (watched(w)) {
    const u32 mask = lanes == 32 ? kFullMask : (1u << lanes) - 1;
    observe(w, i, mask, write ? AccessKind::Write : AccessKind::Read, 16, places, false);
  }
}
void ldmatrix(Warp& w, const Inst& i, u32 mask) {
  Place places[kLanes];
  matrix_rows(w, i, false, places);
  u8 rows[4][8][16];
  for (int m = 0; m < i.count; ++m) {
    for (int r = 0; r < 8; ++r) std::memcpy(rows[m][r], places[8 * m + r].host, 16);
  }
  u32 scratch[4][kLanes];
  u32* regs[4] = {scratch[0], scratch[1], scratch[2], scratch[3]};
  num::ldmatrix(rows, i.count, i.op != 0, regs);
  for (int m = 0; m < i.count; ++m) {
    const u32 reg = i.ext->regs[static_cast<std::size_t>(m)];
    if (reg != kNoReg) std::memcpy(w.reg<u32>(reg), scratch[m], sizeof scratch[m]);
  }
}
void stmatrix(Warp& w, const Inst& i, u32 mask) {
  Place places[kLanes];
  matrix_rows(w, i, true, places);
  const u32* regs[4];
  for (int m = 0; m < i.count; ++m) regs[m] = w.reg<u32>(i.ext->regs[static_cast<std::size_t>(m)]);
  u8 rows[4][8][16];
  num::stmatrix(regs, i.count, i.op != 0, rows);
  for (int m = 0; m < i.count; ++m) {
    for (int r = 0; r < 8; ++r) std::memcpy(places[8 * m + r].host, rows[m][r], 16);
  }
  ++w.cta->cluster->changes;
}
void bind_matrix(Decoder& d, Inst& i) {
  d.arity(2);
  const bool load = d.in().opcode == "ldmatrix";
  bind_space(d, i);
  const std::size_t n = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  const ptx::Operand& o = d.operand(load ? 0 : 1);
  const std::vector<ptx::Operand> regs =
      o.kind == ptx::Operand::Kind::Vector ? o.list : std::vector<ptx::Operand>{o};
  if (regs.size() != n) d.fail("expected " + std::to_string(n) + " registers");
  Ext& x = d.ext(i);
  for (const auto& r : regs) x.regs.push_back(load ? d.dst(r, 4) : d.src(r, 4));
  d.address(load ? 1 : 0, i);
  i.count = static_cast<u8>(n);
  i.op = d.has("trans");
  i.flags |= kAligned;
  i.fn = load ? ldmatrix : stmatrix;
}

void movmatrix(Warp& w, const Inst& i, u32 mask) {
  u16 source[8][8];
  const u32* a = w.reg<u32>(i.a);
  for (int l = 0; l < kLanes; ++l) {
    for (int h = 0; h < 2; ++h) {
      const num::Coord c = num::matrix_element(l, h, false);
      source[c.row][c.col] = static_cast<u16>(a[l] >> (16 * h));
    }
  }
  u32* d = w.reg<u32>(i.d);
  for (int l = 0; l < kLanes; ++l) {
    const num::Coord lo = num::matrix_element(l, 0, true), hi = num::matrix_element(l, 1, true);
    d[l] = source[lo.row][lo.col] | u32{source[hi.row][hi.col]} << 16;
  }
}
void bind_movmatrix(Decoder& d, Inst& i) {
  d.arity(2);
  i.d = d.dst(0, 4);
  i.a = d.src(1, 4);
  i.flags |= kAligned;
  i.fn = movmatrix;
}

constexpr Entry kEntries[] = {
    {"mma.sync.aligned.m16n8k8|m16n8k16.row.col.f32.f16.f16.f32", bind_mma, "D = A * B + C", 80},
    {"mma.sync.aligned.m16n8k8|m16n8k16.row.col.f16.f16.f16.f16", bind_mma, "D = A * B + C", 80},
    {"mma.sync.aligned.m16n8k8|m16n8k16.row.col.f32.bf16.bf16.f32", bind_mma, "D = A * B + C", 80},
    {"mma.sync.aligned.m16n8k4|m16n8k8.row.col.f32.tf32.tf32.f32", bind_mma, "D = A * B + C", 80},
    {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3|e5m2.e4m3|e5m2.f32", bind_mma, "D = A * B + C",
     89},
    {"mma.sync.aligned.m16n8k16|m16n8k32.row.col.satfinite?.s32.s8|u8.s8|u8.s32", bind_mma,
     "D = A * B + C", 80},
    {"ldmatrix.sync.aligned.m8n8.x1|x2|x4.trans?.shared|shared::cta?.b16", bind_matrix,
     "8x8 matrices from shared memory", 75},
    {"stmatrix.sync.aligned.m8n8.x1|x2|x4.trans?.shared|shared::cta?.b16", bind_matrix,
     "8x8 matrices to shared memory", 90},
    {"stmatrix.sync.aligned.x1|x2|x4.trans?.m8n8.shared|shared::cta?.b16", bind_matrix,
     "8x8 matrices to shared memory", 90},
    {"ldmatrix.sync.aligned.x1|x2|x4.trans?.m8n8.shared|shared::cta?.b16", bind_matrix,
     "8x8 matrices from shared memory", 75},
    {"stmatrix.sync.aligned.x1|x2|x4.m8n8.shared|shared::cta?.b16.trans", bind_matrix,
     "8x8 matrices to shared memory", 90},
    {"ldmatrix.sync.aligned.x1|x2|x4.m8n8.shared|shared::cta?.b16.trans", bind_matrix,
     "8x8 matrices from shared memory", 75},
    {"movmatrix.sync.aligned.m8n8.trans.b16", bind_movmatrix, "transposes an 8x8 matrix", 75},
};

}  // namespace

std::span<const Entry> mma_entries() { return kEntries; }

}  // namespace dsk::emu
