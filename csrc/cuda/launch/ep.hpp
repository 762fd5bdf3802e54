// Host launchers of the expert-parallel kernels. A call only queues, on the emulator too: the
// kernels of all ranks wait for each other, so nobody may wait for one before all are queued. On
// the emulator the caller has lent every address to it. `num_sms` bounds the grid; 0 means every
// SM. All throw DeviceError on anything the driver refuses.
#pragma once

#include "cuda/launch/context.hpp"
#include "cuda/params/ep.hpp"

namespace dsk::launch {

void ep_dispatch(const LaunchOn& on, const EpDispatchParams& params);
void ep_combine(const LaunchOn& on, const EpCombineParams& params);
void ep_low_send(const LaunchOn& on, const EpLowSendParams& params);
void ep_low_receive(const LaunchOn& on, const EpLowReceiveParams& params);
void ep_low_return(const LaunchOn& on, const EpLowReturnParams& params);
void ep_low_reduce(const LaunchOn& on, const EpLowReduceParams& params);

}  // namespace dsk::launch
