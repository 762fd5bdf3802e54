// What the rail needs of NCCL's device API, and the only file that knows it: puts from the GPU into
// a peer's window, signals that count the puts that have landed, and a wait with a deadline.
// NCCL 2.30.7 or newer; its device code is not binary compatible between versions, so whoever uses
// this compiles it against the NCCL found.
#pragma once

#include <nccl.h>
#include <nccl_device.h>

#include <cstdint>

static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 30, 7), "the rail needs NCCL 2.30.7 or newer");

namespace dsk::rail {

// One CTA's way to the peers. Ranks are those of the whole communicator.
class Gin {
 public:
  __device__ Gin(const ncclDevComm& comm, ncclWindow_t window)
      : gin_(comm, int(blockIdx.x % comm.ginContextCount)),
        world_(ncclTeamWorld(comm)),
        window_(window) {}

  // By one thread: `bytes` from our window into the peer's. When they have landed, and not before,
  // the peer's signal grows by one. Puts are not ordered among each other: the receiver counts.
  __device__ void put(int peer, size_t to, size_t from, size_t bytes, uint32_t signal) const {
    gin_.put(world_, peer, window_, to, window_, from, bytes, ncclGin_WeakSignalInc{signal});
  }
  __device__ void put_value(int peer, size_t to, uint64_t value, uint32_t signal) const {
    gin_.putValue(world_, peer, window_, to, value, ncclGin_WeakSignalInc{signal});
  }

  // By one thread. False after `cycles`; waits with a deadline of their own came with NCCL 2.31.
  __device__ bool await(uint32_t signal, uint64_t least, int64_t cycles) const {
    for (const int64_t begin = clock64(); gin_.readSignal(signal) < least;) {
      if (clock64() - begin > cycles) return false;
    }
    return true;
  }

  // By the whole CTA: what its puts read may be overwritten afterwards.
  __device__ void flush() const { gin_.flush(ncclCoopCta()); }

  __device__ const uint64_t* local(size_t offset) const {
    return static_cast<const uint64_t*>(ncclGetLocalPointer(window_, offset));
  }

 private:
  ncclGin gin_;
  ncclTeam world_;
  ncclWindow_t window_;
};

}  // namespace dsk::rail
