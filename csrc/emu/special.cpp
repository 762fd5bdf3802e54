// Special registers: names, and their values for one warp.
#include "emu/special.hpp"

#include "emu/system.hpp"

namespace dsk::emu {
namespace {

struct Row {
  const char* name;
  Special which;
  Type type;
};
constexpr Row kRows[] = {
    {"%tid.x", Special::TidX, Type::U32},
    {"%tid.y", Special::TidY, Type::U32},
    {"%tid.z", Special::TidZ, Type::U32},
    {"%ntid.x", Special::NtidX, Type::U32},
    {"%ntid.y", Special::NtidY, Type::U32},
    {"%ntid.z", Special::NtidZ, Type::U32},
    {"%ctaid.x", Special::CtaidX, Type::U32},
    {"%ctaid.y", Special::CtaidY, Type::U32},
    {"%ctaid.z", Special::CtaidZ, Type::U32},
    {"%nctaid.x", Special::NctaidX, Type::U32},
    {"%nctaid.y", Special::NctaidY, Type::U32},
    {"%nctaid.z", Special::NctaidZ, Type::U32},
    {"%laneid", Special::LaneId, Type::U32},
    {"%warpid", Special::WarpId, Type::U32},
    {"%nwarpid", Special::NwarpId, Type::U32},
    {"%smid", Special::SmId, Type::U32},
    {"%nsmid", Special::NsmId, Type::U32},
    {"%gridid", Special::GridId, Type::U64},
    {"%clusterid.x", Special::ClusterIdX, Type::U32},
    {"%clusterid.y", Special::ClusterIdY, Type::U32},
    {"%clusterid.z", Special::ClusterIdZ, Type::U32},
    {"%nclusterid.x", Special::NclusterIdX, Type::U32},
    {"%nclusterid.y", Special::NclusterIdY, Type::U32},
    {"%nclusterid.z", Special::NclusterIdZ, Type::U32},
    {"%cluster_ctaid.x", Special::ClusterCtaidX, Type::U32},
    {"%cluster_ctaid.y", Special::ClusterCtaidY, Type::U32},
    {"%cluster_ctaid.z", Special::ClusterCtaidZ, Type::U32},
    {"%cluster_nctaid.x", Special::ClusterNctaidX, Type::U32},
    {"%cluster_nctaid.y", Special::ClusterNctaidY, Type::U32},
    {"%cluster_nctaid.z", Special::ClusterNctaidZ, Type::U32},
    {"%cluster_ctarank", Special::ClusterCtarank, Type::U32},
    {"%cluster_nctarank", Special::ClusterNctarank, Type::U32},
    {"%is_explicit_cluster", Special::IsExplicitCluster, Type::Pred},
    {"%lanemask_eq", Special::LanemaskEq, Type::U32},
    {"%lanemask_le", Special::LanemaskLe, Type::U32},
    {"%lanemask_lt", Special::LanemaskLt, Type::U32},
    {"%lanemask_ge", Special::LanemaskGe, Type::U32},
    {"%lanemask_gt", Special::LanemaskGt, Type::U32},
    {"%dynamic_smem_size", Special::DynamicSmemSize, Type::U32},
    {"%total_smem_size", Special::TotalSmemSize, Type::U32},
    {"%aggr_smem_size", Special::AggrSmemSize, Type::U32},
    {"%envreg1", Special::Envreg1, Type::U32},
    {"%envreg2", Special::Envreg2, Type::U32},
    {"%clock", Special::Clock, Type::U32},
    {"%clock_hi", Special::ClockHi, Type::U32},
    {"%clock64", Special::Clock64, Type::U64},
    {"%globaltimer", Special::GlobalTimer, Type::U64},
    {"%globaltimer_lo", Special::GlobalTimerLo, Type::U32},
    {"%globaltimer_hi", Special::GlobalTimerHi, Type::U32},
};

}  // namespace

bool parse_special(std::string_view name, Special* which, Type* type) {
  for (const Row& r : kRows) {
    if (name != r.name) continue;
    *which = r.which;
    *type = r.type;
    return true;
  }
  return false;
}

u64 special_value(const Warp& w, Special which, u32 lane) {
  const Cta& cta = *w.cta;
  const Cluster& cluster = *cta.cluster;
  const Grid& grid = *cluster.grid;
  const Dim3 block = grid.config.block, dim = grid.config.grid, size = grid.config.cluster;
  const u32 tid = w.index * kLanes + lane;
  switch (which) {
    case Special::TidX:
      return tid % block.x;
    case Special::TidY:
      return tid / block.x % block.y;
    case Special::TidZ:
      return tid / block.x / block.y;
    case Special::NtidX:
      return block.x;
    case Special::NtidY:
      return block.y;
    case Special::NtidZ:
      return block.z;
    case Special::CtaidX:
      return cta.index.x;
    case Special::CtaidY:
      return cta.index.y;
    case Special::CtaidZ:
      return cta.index.z;
    case Special::NctaidX:
      return dim.x;
    case Special::NctaidY:
      return dim.y;
    case Special::NctaidZ:
      return dim.z;
    case Special::LaneId:
      return lane;
    case Special::WarpId:
      return w.index;
    case Special::NwarpId:
      return cta.warps.size();
    case Special::SmId:
      return cta.sm;
    case Special::NsmId:
      return grid.num_sms;
    case Special::GridId:
      return grid.id;
    case Special::ClusterIdX:
      return cta.index.x / size.x;
    case Special::ClusterIdY:
      return cta.index.y / size.y;
    case Special::ClusterIdZ:
      return cta.index.z / size.z;
    case Special::NclusterIdX:
      return dim.x / size.x;
    case Special::NclusterIdY:
      return dim.y / size.y;
    case Special::NclusterIdZ:
      return dim.z / size.z;
    case Special::ClusterCtaidX:
      return cta.index.x % size.x;
    case Special::ClusterCtaidY:
      return cta.index.y % size.y;
    case Special::ClusterCtaidZ:
      return cta.index.z % size.z;
    case Special::ClusterNctaidX:
      return size.x;
    case Special::ClusterNctaidY:
      return size.y;
    case Special::ClusterNctaidZ:
      return size.z;
    case Special::ClusterCtarank:
      return cta.rank;
    case Special::ClusterNctarank:
      return size.count();  // registers are filled in while the cluster is being assembled
    case Special::IsExplicitCluster:
      return size.count() > 1;
    case Special::LanemaskEq:
      return 1u << lane;
    case Special::LanemaskLe:
      return (u64{2} << lane) - 1;
    case Special::LanemaskLt:
      return (1u << lane) - 1;
    case Special::LanemaskGe:
      return kFullMask & ~((1u << lane) - 1);
    case Special::LanemaskGt:
      return kFullMask & ~((u64{2} << lane) - 1);
    case Special::DynamicSmemSize:
      return grid.config.dynamic_shared;
    case Special::TotalSmemSize:
      return cta.shared_bytes - kSharedReserved;
    case Special::AggrSmemSize:
      return cta.shared_bytes;
    case Special::Envreg1:
      return grid.workspace >> 32;
    case Special::Envreg2:
      return grid.workspace & 0xffffffff;
    default:
      return 0;  // clocks are read when executed
  }
}

}  // namespace dsk::emu
