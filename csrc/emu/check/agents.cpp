#include "emu/check/agents.hpp"

namespace dsk::emu::check {

const char* name_of(AsyncKind kind) {
  switch (kind) {
    case AsyncKind::CpAsync:
      return "cp.async";
    case AsyncKind::BulkLoad:
      return "bulk load";
    case AsyncKind::BulkStore:
      return "bulk store";
    case AsyncKind::BulkCluster:
      return "bulk copy to the cluster";
    case AsyncKind::BulkReduce:
      return "bulk reduction";
    case AsyncKind::TensorLoad:
      return "TMA load";
    case AsyncKind::TensorStore:
      return "TMA store";
    case AsyncKind::TensorReduce:
      return "TMA reduction";
    case AsyncKind::StAsync:
      return "st.async";
    case AsyncKind::Wgmma:
      return "wgmma";
  }
  return "asynchronous operation";
}

const char* kind_of(Conflict conflict) {
  switch (conflict) {
    case Conflict::Race:
      return "shared-race";
    case Conflict::UnfencedRead:
      return "formal-proxy-order";
    default:
      return "missing-proxy-fence";
  }
}
const char* explain(Conflict conflict) {
  switch (conflict) {
    case Conflict::Race:
      return " with nothing to order the two";
    case Conflict::UnfencedWrite:
      return " through the generic proxy: no fence.proxy.async between";
    case Conflict::DrainedWrite:
      return " through the generic proxy two barriers ago: no fence.proxy.async between";
    default:
      return " through the generic proxy: ordered by a barrier, but the memory model asks for a "
             "proxy fence as well";
  }
}

}  // namespace dsk::emu::check
