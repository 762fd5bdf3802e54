"""Mutants of the expert-parallel kernels that no test can catch; see cuda_survivors.py.

The reason first, then (file, source line, mutated line) of all it holds for.
"""

REASONS: dict[str, list[tuple[str, str, str]]] = {
    (
        "The mask of the living has no bit behind the last rank, and is asked bef"
        "ore anything is read or written."
    ): [
        (
            "cuda/kernels/ep_combine.cuh",
            "if (peer < g.shape.ranks && proto::is_alive(now.alive, peer)) {",
            "if (peer <= g.shape.ranks && proto::is_alive(now.alive, peer)) {",
        ),
        (
            "cuda/kernels/ep_combine.cuh",
            "return peer < p.group.shape.ranks && proto::is_alive(now.alive, peer) &&",
            ("return peer <= p.group.shape.ranks && proto::is_alive(now.alive, peer) &&"),
        ),
        (
            "cuda/kernels/ep_combine.cuh",
            "for (int owner = 0; owner < g.shape.ranks; ++owner) {",
            "for (int owner = 0; owner <= g.shape.ranks; ++owner) {",
        ),
        (
            "cuda/kernels/ep_combine.cuh",
            "for (int peer = threadIdx.x; peer < g.shape.ranks; peer += blockDim.x) {",
            ("for (int peer = threadIdx.x; peer <= g.shape.ranks; peer += blockDim.x) {"),
        ),
        (
            "cuda/kernels/ep_dispatch.cuh",
            "for (int peer = threadIdx.x; peer < g.shape.ranks; peer += blockDim.x) {",
            ("for (int peer = threadIdx.x; peer <= g.shape.ranks; peer += blockDim.x) {"),
        ),
        (
            "cuda/kernels/ep_dispatch.cuh",
            "for (int peer = 0; peer < g.shape.ranks; ++peer) {",
            "for (int peer = 0; peer <= g.shape.ranks; ++peer) {",
        ),
        (
            "cuda/kernels/ep_dispatch.cuh",
            "for (int source = 0; source < g.shape.ranks; ++source) {",
            "for (int source = 0; source <= g.shape.ranks; ++source) {",
        ),
        (
            "cuda/kernels/ep_forward.cuh",
            "if (peer >= g.shape.ranks || !proto::is_alive(now.alive, peer)) return;",
            "if (peer > g.shape.ranks || !proto::is_alive(now.alive, peer)) return;",
        ),
        (
            "cuda/kernels/ep_forward.cuh",
            "if (peer >= g.shape.ranks || !proto::is_alive(now.alive, peer) ||",
            "if (peer > g.shape.ranks || !proto::is_alive(now.alive, peer) ||",
        ),
        (
            "cuda/kernels/ep_forward.cuh",
            "if (mine < g.shape.ranks && forwards_for(p, now, mine)) {",
            "if (mine <= g.shape.ranks && forwards_for(p, now, mine)) {",
        ),
        (
            "cuda/kernels/ep_forward.cuh",
            ("if (blockIdx.x == 0 && mine < g.shape.ranks && forwards_for(p, now, mine)) {"),
            ("if (blockIdx.x == 0 && mine <= g.shape.ranks && forwards_for(p, now, mine)) {"),
        ),
        (
            "cuda/kernels/ep_forward.cuh",
            "for (int source = 0; source < g.shape.ranks; ++source) {",
            "for (int source = 0; source <= g.shape.ranks; ++source) {",
        ),
        (
            "cuda/tile/ep_signals.cuh",
            "if (peer < g.shape.ranks && proto::is_alive(now.alive, peer)) {",
            "if (peer <= g.shape.ranks && proto::is_alive(now.alive, peer)) {",
        ),
        (
            "cuda/tile/ep_signals.cuh",
            "if (source < g.shape.ranks && proto::is_alive(now.alive, source)) {",
            "if (source <= g.shape.ranks && proto::is_alive(now.alive, source)) {",
        ),
    ],
    ("One more turn, in which nothing is there: no load, no sum."): [
        (
            "cuda/kernels/ep_combine.cuh",
            "for (int begin = 0; begin < ranks; begin += kEpInFlight) {",
            "for (int begin = 0; begin <= ranks; begin += kEpInFlight) {",
        ),
        (
            "cuda/kernels/ep_low_latency.cuh",
            "for (int first = 0; first < p.topk; first += kEpInFlight) {",
            "for (int first = 0; first <= p.topk; first += kEpInFlight) {",
        ),
        (
            "cuda/kernels/ep_low_latency.cuh",
            "for (int first = 0; first < runs; first += kEpWarp) {",
            "for (int first = 0; first <= runs; first += kEpWarp) {",
        ),
        (
            "cuda/tile/ep_signals.cuh",
            (
                "for (int64_t first = threadIdx.x % kEpWarp * 16; first < bytes; first +="
                " kEpInFlight * kEpChunk) {"
            ),
            (
                "for (int64_t first = threadIdx.x % kEpWarp * 16; first <= bytes; first +"
                "= kEpInFlight * kEpChunk) {"
            ),
        ),
    ],
    (
        "One more turn when the tokens are a multiple of 32, in which no lane has"
        " one: no vote, no store."
    ): [
        (
            "cuda/kernels/ep_dispatch.cuh",
            "for (int begin = 0; begin < p.tokens; begin += kEpWarp) {",
            "for (int begin = 0; begin <= p.tokens; begin += kEpWarp) {",
        ),
        (
            "cuda/kernels/ep_forward.cuh",
            "for (int begin = 0; begin < p.tokens; begin += kEpWarp) {",
            "for (int begin = 0; begin <= p.tokens; begin += kEpWarp) {",
        ),
    ],
    ("One more look before giving up."): [
        (
            "cuda/tile/ep_signals.cuh",
            "for (uint32_t poll = 0; poll < g.max_polls; ++poll) {",
            "for (uint32_t poll = 0; poll <= g.max_polls; ++poll) {",
        ),
    ],
    ("Rank 0's experts begin at 0, as do all."): [
        (
            "cuda/kernels/ep_forward.cuh",
            "const int64_t low = peer < 0 ? 0 : g.experts.begin[peer];",
            "const int64_t low = peer <= 0 ? 0 : g.experts.begin[peer];",
        ),
    ],
    (
        "The word behind the last rank's is read by nobody; with 64 ranks it is t"
        "he padding behind them."
    ): [
        (
            "cuda/kernels/ep_dispatch.cuh",
            "for (int r = threadIdx.x; r < g.shape.ranks; r += blockDim.x) {",
            "for (int r = threadIdx.x; r <= g.shape.ranks; r += blockDim.x) {",
        ),
    ],
    (
        "Regions are laid out for scales beside the widest rows, which no call ha"
        "s: one record more lies inside, and is nobody's."
    ): [
        (
            "cuda/kernels/ep_dispatch.cuh",
            (
                "for (int64_t i = rows * p.row.topk + blockIdx.x * blockDim.x + threadIdx"
                ".x; i < slots;"
            ),
            (
                "for (int64_t i = rows * p.row.topk + blockIdx.x * blockDim.x + threadIdx"
                ".x; i <= slots;"
            ),
        ),
    ],
    ("Parts behind the row's end hold no column and no byte: slower, the same stores."): [
        (
            "cuda/kernels/ep_low_latency.cuh",
            (
                "const int pieces = p.row.scale_bytes > 0 ? (p.elements + kQuantGroup - 1"
                ") / kQuantGroup"
            ),
            (
                "const int pieces = p.row.scale_bytes >= 0 ? (p.elements + kQuantGroup - "
                "1) / kQuantGroup"
            ),
        ),
        (
            "cuda/kernels/ep_low_latency.cuh",
            (
                "const int pieces = p.row.scale_bytes > 0 ? (p.elements + kQuantGroup - 1"
                ") / kQuantGroup"
            ),
            (
                "const int pieces = p.row.scale_bytes > 0 ? (p.elements + kQuantGroup + 1"
                ") / kQuantGroup"
            ),
        ),
        (
            "cuda/kernels/ep_low_latency.cuh",
            (
                "const int pieces = p.row.scale_bytes > 0 ? (p.elements + kQuantGroup - 1"
                ") / kQuantGroup"
            ),
            (
                "const int pieces = p.row.scale_bytes > 0 ? (p.elements + kQuantGroup - 1"
                ") * kQuantGroup"
            ),
        ),
    ],
    (
        "Slots hold bf16 rows, which are twice as long as those that are cast: th"
        "e word behind the end is nobody's."
    ): [
        (
            "cuda/kernels/ep_low_latency.cuh",
            ("if (column < p.elements) *reinterpret_cast<uint32_t*>(data + column) = word[i];"),
            ("if (column <= p.elements) *reinterpret_cast<uint32_t*>(data + column) = word[i];"),
        ),
    ],
}
