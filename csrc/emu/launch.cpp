#include "emu/launch.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "emu/special.hpp"

namespace dsk::emu {
namespace {

std::string dim_text(const Dim3& d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

template <class T>
void broadcast(u8* regs, u32 offset, u64 value) {
  T* d = reinterpret_cast<T*>(regs + offset);
  for (int l = 0; l < kLanes; ++l) d[l] = static_cast<T>(value);
}

void fill(u8* regs, u32 offset, int size, u64 value) {
  switch (size) {
    case 0:
      *reinterpret_cast<u32*>(regs + offset) = value ? kFullMask : 0;
      break;
    case 1:
      broadcast<u8>(regs, offset, value);
      break;
    case 2:
      broadcast<u16>(regs, offset, value);
      break;
    case 4:
      broadcast<u32>(regs, offset, value);
      break;
    default:
      broadcast<u64>(regs, offset, value);
      break;
  }
}

void fill_constants(Warp& w, const Grid& grid) {
  const Cta& cta = *w.cta;
  for (const ConstantReg& c : grid.program->constants) {
    u64 value = c.value;
    switch (c.base) {
      case ConstantReg::Base::SharedStatic:
        value += cta.shared_base + kSharedReserved;
        break;
      case ConstantReg::Base::SharedDynamic:
        value += cta.shared_base + cta.dynamic_offset;
        break;
      case ConstantReg::Base::Symbol:
        value += grid.symbol_addresses[c.symbol];
        break;
      default:
        break;
    }
    fill(w.regs, c.offset, c.size, value);
  }
}

void fill_specials(Warp& w, const Grid& grid) {
  for (const SpecialReg& s : grid.program->specials) {
    for (u32 l = 0; l < kLanes; ++l) {
      const u64 v = special_value(w, s.which, l);
      if (s.size == 8)
        w.reg<u64>(s.offset)[l] = v;
      else if (s.size == 4)
        w.reg<u32>(s.offset)[l] = static_cast<u32>(v);
      else
        fill(w.regs, s.offset, 0, v);
    }
  }
}

struct Freed {
  void operator()(void* p) const { std::free(p); }
};

std::shared_ptr<void> aligned_memory(std::size_t align, std::size_t bytes) {
  const std::size_t rounded = (std::max<std::size_t>(bytes, 1) + align - 1) / align * align;
  void* p = std::aligned_alloc(align, rounded);
  if (p == nullptr) throw Error("out of memory: " + std::to_string(rounded) + " bytes");
  std::memset(p, 0xff, rounded);  // NaN in every format: reading before writing shows
  return {p, Freed{}};
}

void make_warps(Cta& cta, const Grid& grid) {
  const Program& p = *grid.program;
  const u32 threads = static_cast<u32>(grid.config.block.count());
  const u32 num_warps = (threads + kLanes - 1) / kLanes;
  auto registers = aligned_memory(64, std::size_t{p.register_bytes} * num_warps);
  cta.storage.push_back(registers);
  for (u32 k = 0; k < num_warps; ++k) {
    cta.warps.push_back(std::make_unique<Warp>());
    Warp& w = *cta.warps.back();
    w.cta = &cta;
    w.index = k;
    w.regs = static_cast<u8*>(registers.get()) + std::size_t{k} * p.register_bytes;
    const u32 lanes = std::min<u32>(kLanes, threads - k * kLanes);
    w.live = lanes == kLanes ? kFullMask : (1u << lanes) - 1;
    Split start;
    start.mask = w.live;
    w.splits.push_back(start);
    w.local_stride = p.local_bytes;
    if (p.local_bytes != 0) w.local.reset(new u8[std::size_t{p.local_bytes} * kLanes]());
    if (p.uses_wgmma) {
      w.wgmma.dirty.assign(p.num_virtual, 0);
      w.wgmma.pending.assign(p.num_virtual, 0);
      w.wgmma.reading.assign(p.num_virtual, 0);
    }
  }
  for (auto& w : cta.warps) {  // once all exist: %nwarpid counts them
    fill_constants(*w, grid);
    fill_specials(*w, grid);
  }
}

std::unique_ptr<Cta> make_cta(Cluster& cluster, Grid& grid, u32 rank) {
  const Program& p = *grid.program;
  const Dim3 size = grid.config.cluster, dim = grid.config.grid;
  const Dim3 count{dim.x / size.x, dim.y / size.y, dim.z / size.z};
  auto cta = std::make_unique<Cta>();
  cta->cluster = &cluster;
  cta->rank = rank;
  const Dim3 in{rank % size.x, rank / size.x % size.y, rank / size.x / size.y};
  const u32 c = cluster.linear;
  cta->index = {c % count.x * size.x + in.x, c / count.x % count.y * size.y + in.y,
                c / count.x / count.y * size.z + in.z};
  cta->linear = (cta->index.z * dim.y + cta->index.y) * dim.x + cta->index.x;
  cta->sm = (cluster.linear * static_cast<u32>(size.count()) + rank) % grid.num_sms;
  cta->shared_base = rank << kRankShift;
  const u32 align = std::max<u32>(16, p.dynamic_align);
  cta->dynamic_offset = (kSharedReserved + p.static_shared + align - 1) / align * align;
  cta->shared_bytes = cta->dynamic_offset + grid.config.dynamic_shared;
  auto shared = aligned_memory(1024, cta->shared_bytes);
  cta->storage.push_back(shared);
  cta->shared = static_cast<u8*>(shared.get());
  make_warps(*cta, grid);
  return cta;
}

}  // namespace

Grid::~Grid() {
  if (workspace != 0) AddressSpace::instance().release(workspace);
}

u32 Grid::shared_bytes() const { return program->static_shared + config.dynamic_shared; }

void check_launch(const Program& p, const LaunchConfig& c, std::size_t param_bytes,
                  const DeviceProperties& device) {
  const auto refuse = [&](const std::string& what) {
    throw Error("launch of '" + p.name + "': " + what);
  };
  for (const Dim3& d : {c.grid, c.block, c.cluster}) {
    if (d.count() == 0) refuse("a dimension of grid, block or cluster is 0");
  }
  if (c.grid.x > 0x7fffffffu || c.grid.y > 65535 || c.grid.z > 65535 ||
      c.grid.count() > 0x7fffffffu) {
    refuse("grid " + dim_text(c.grid) + " is too large");
  }
  if (c.block.x > 1024 || c.block.y > 1024 || c.block.z > 64 || c.block.count() > 1024) {
    refuse("block " + dim_text(c.block) + " exceeds 1024 threads");
  }
  if (p.max_threads != 0 && c.block.count() > p.max_threads) {
    refuse("block " + dim_text(c.block) + " exceeds the kernel's .maxntid of " +
           std::to_string(p.max_threads));
  }
  if (c.cluster.count() > device.max_cluster) {
    refuse("cluster " + dim_text(c.cluster) + " exceeds " + std::to_string(device.max_cluster));
  }
  if (c.grid.x % c.cluster.x != 0 || c.grid.y % c.cluster.y != 0 || c.grid.z % c.cluster.z != 0) {
    refuse("grid " + dim_text(c.grid) + " is not a multiple of cluster " + dim_text(c.cluster));
  }
  const Dim3 r = p.required_cluster;
  if (r.count() != 0 && (r.x != c.cluster.x || r.y != c.cluster.y || r.z != c.cluster.z)) {
    refuse("the kernel requires cluster " + dim_text(r) + ", got " + dim_text(c.cluster));
  }
  if (u64{p.static_shared} + c.dynamic_shared > device.max_shared_per_block) {
    refuse("shared memory " + std::to_string(p.static_shared) + " static + " +
           std::to_string(c.dynamic_shared) + " dynamic exceeds " +
           std::to_string(device.max_shared_per_block));
  }
  if (param_bytes != p.param_bytes) {
    refuse("expected " + std::to_string(p.param_bytes) + " bytes of parameters, got " +
           std::to_string(param_bytes));
  }
}

std::unique_ptr<Cluster> make_cluster(Grid& grid, u32 linear) {
  auto cluster = std::make_unique<Cluster>();
  cluster->grid = &grid;
  cluster->linear = linear;
  cluster->check = grid.config.check;
  if (grid.config.seed != 0) {
    cluster->rng = (grid.config.seed * 0x9e3779b97f4a7c15ull + linear * 0xbf58476d1ce4e5b9ull) | 1;
  }
  const u32 n = static_cast<u32>(grid.config.cluster.count());
  for (u32 r = 0; r < n; ++r) cluster->ctas.push_back(make_cta(*cluster, grid, r));
  for (const auto& observer : grid.config.observers) {
    auto o = observer->on_cluster(*cluster);
    if (!o) continue;  // this cluster need not be watched
    cluster->watch_instructions |= observer->wants_instructions();
    cluster->observers.push_back(std::move(o));
  }
  return cluster;
}

u32 resident_clusters(const Grid& grid, const DeviceProperties& device) {
  const u32 threads = (static_cast<u32>(grid.config.block.count()) + 31) / 32 * 32;
  u32 per_sm = std::min(device.max_blocks_per_sm, device.max_threads_per_sm / threads);
  per_sm = std::min(per_sm, device.shared_per_sm / (grid.shared_bytes() + kSharedReserved));
  const u32 ctas = std::max(1u, per_sm) * device.num_sms;
  return std::max<u32>(1, ctas / static_cast<u32>(grid.config.cluster.count()));
}

void account(Grid& grid, const Cluster& cluster) {
  const std::lock_guard lock(grid.mutex);
  for (const auto& cta : cluster.ctas) {
    for (const auto& w : cta->warps) {
      grid.stats.warp_instructions += w->instructions;
      grid.stats.thread_instructions += w->thread_instructions;
      grid.stats.wgmma += w->wgmma.completed;
    }
    if (!cta->launched_dependents) ++grid.ctas_launched_dependents;
  }
  grid.stats.async_operations += cluster.next_async_id - 1;
}

}  // namespace dsk::emu
