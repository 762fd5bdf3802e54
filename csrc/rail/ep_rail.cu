// The rail between nodes: what a rank sends to the other nodes, over RDMA issued by the GPU.
// COMPILED AND LINKED AGAINST NCCL, NEVER EXECUTED: there was no network card to run it on.
//
// Two-level dispatch (cuda/kernels/ep_forward.cuh) sends a token once per node, to the rank there
// with the sender's place in its node. Where that rank's memory cannot be stored to, the sender
// lays its messages (row and record) out in its outbox, [node][message], and this kernel moves
// them into the inboxes, [copy][node][message]; forwarding then goes on from the inbox.
//
// Bound by the network card: 4096 tokens x 7168 bytes of FP8 to at most 3 other nodes are 88 MB,
// 1.8 ms at 50 GB/s; a put costs the card about 0.1 us, so messages travel in chunks.
//
// Nothing is ordered: every put raises a signal of the sender's node when it has landed, and a
// separate word says how many puts there have been since the beginning. An inbox is read as soon
// as both agree. Two copies: a sender fills a copy again in epoch e + 2, which it begins after it
// has this rank's messages of e + 1, and those were sent behind the forwarding of e in the stream.
#include <cuda_runtime.h>

#include "rail/nccl_gin.cuh"

namespace dsk::rail {

constexpr int kThreads = 256;

// Offsets are bytes in a window that every rank registered with the same size and layout.
struct EpRailParams {
  uint64_t epoch;       // 1, 2, ...
  int64_t wait_cycles;  // of one wait
  uint64_t outbox;      // [nodes][max_messages][message_bytes]
  uint64_t inbox;       // [2][nodes][max_messages][message_bytes]
  uint64_t totals;      // uint64 [2][nodes]: puts of that node since the beginning, as it says
  int64_t message_bytes;
  int64_t max_messages;
  int32_t ranks_per_node;
  int32_t chunk;          // messages of a put
  const int32_t* counts;  // [nodes]: our messages for each node
  uint64_t* sent;         // [nodes], zero at first: puts since the beginning; kept between calls
  int32_t* failed;        // 1 + node that stayed silent; 0: none
};

struct Place {
  int rank, node, nodes;
};

__device__ __forceinline__ int puts_for(const EpRailParams& p, int node) {
  return (p.counts[node] + p.chunk - 1) / p.chunk;
}

// The puts of all nodes are dealt to the CTAs' threads in turn.
__device__ __forceinline__ void send(const EpRailParams& p, const Place& at, const Gin& gin) {
  const uint64_t node_bytes = uint64_t(p.max_messages) * p.message_bytes;
  const uint64_t copy = p.epoch % 2;
  for (int node = 0; node < at.nodes; ++node) {
    if (node == at.node) continue;
    const int peer = node * p.ranks_per_node + at.rank % p.ranks_per_node;
    for (int put = blockIdx.x * kThreads + threadIdx.x; put < puts_for(p, node);
         put += gridDim.x * kThreads) {
      const int64_t first = int64_t(put) * p.chunk;
      const int64_t count = min(int64_t(p.chunk), p.counts[node] - first);
      gin.put(peer, p.inbox + (copy * at.nodes + at.node) * node_bytes + first * p.message_bytes,
              p.outbox + node * node_bytes + first * p.message_bytes, count * p.message_bytes,
              uint32_t(at.node));
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      p.sent[node] += puts_for(p, node);
      gin.put_value(peer, p.totals + (copy * at.nodes + at.node) * sizeof(uint64_t), p.sent[node],
                    uint32_t(at.nodes + at.node));
    }
  }
}

// By CTA 0; thread n waits for node n.
__device__ __forceinline__ void await_all(const EpRailParams& p, const Place& at, const Gin& gin) {
  const int node = threadIdx.x;
  if (node >= at.nodes || node == at.node) return;
  const uint64_t* total = gin.local(p.totals) + p.epoch % 2 * at.nodes + node;
  const bool there = gin.await(uint32_t(at.nodes + node), p.epoch, p.wait_cycles) &&
                     gin.await(uint32_t(node), *total, p.wait_cycles);
  if (!there) atomicCAS(p.failed, 0, 1 + node);
}

__global__ void __launch_bounds__(kThreads)
    ep_rail(ncclDevComm comm, ncclWindow_t window, EpRailParams p) {
  const Gin gin(comm, window);
  const Place at{comm.rank, comm.rank / p.ranks_per_node, comm.nRanks / p.ranks_per_node};
  send(p, at, gin);
  if (blockIdx.x == 0) await_all(p, at, gin);
  gin.flush();
}

// What a launch needs of NCCL, made by all ranks together.
struct EpRail {
  ncclComm_t comm;
  ncclWindow_t window;
  ncclDevComm device;
};

// What a caller in another language checks before its first call: see dskernels/ep/rail.py.
extern "C" int64_t ep_rail_fact(int index) {
  const int64_t facts[] = {sizeof(EpRailParams), sizeof(EpRail), NCCL_VERSION_CODE};
  return index >= 0 && index < 3 ? facts[index] : -1;
}

extern "C" ncclResult_t ep_rail_open(ncclComm_t comm, void* memory, size_t bytes, int nodes,
                                     EpRail* rail) {
  rail->comm = comm;
  ncclResult_t result =
      ncclCommWindowRegister(comm, memory, bytes, &rail->window, NCCL_WIN_COLL_SYMMETRIC);
  if (result != ncclSuccess) return result;
  ncclDevCommRequirements needs = NCCL_DEV_COMM_REQUIREMENTS_INITIALIZER;
  needs.ginSignalCount = 2 * nodes;
  needs.ginConnectionType = NCCL_GIN_CONNECTION_FULL;
  result = ncclDevCommCreate(comm, &needs, &rail->device);
  if (result != ncclSuccess) ncclCommWindowDeregister(comm, rail->window);
  return result;
}

extern "C" cudaError_t ep_rail_exchange(const EpRail* rail, const EpRailParams* params, int ctas,
                                        cudaStream_t stream) {
  ep_rail<<<ctas, kThreads, 0, stream>>>(rail->device, rail->window, *params);
  return cudaGetLastError();
}

extern "C" ncclResult_t ep_rail_close(EpRail* rail) {
  const ncclResult_t first = ncclDevCommDestroy(rail->comm, &rail->device);
  const ncclResult_t second = ncclCommWindowDeregister(rail->comm, rail->window);
  return first != ncclSuccess ? first : second;
}

}  // namespace dsk::rail
