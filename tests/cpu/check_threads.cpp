// The thread pool and kernels on it, for ThreadSanitizer: several callers at once, nested calls,
// pools that grow, results that must not depend on any of it. Prints "ok" or what went wrong.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/kernels.hpp"
#include "cpu/packed.hpp"
#include "cpu/threads.hpp"

namespace dsk::cpu::portable {
extern const Kernels kTable;
}

namespace {

using namespace dsk;
using namespace dsk::cpu;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

// ---- tasks ----

struct Count {
  std::vector<int64_t> done;  // written without atomics: each task has its own element
  std::atomic<int> wrong_thread{0};
  int threads = 1;
};

void count_task(void* context, int64_t task, int thread) {
  Count& count = *static_cast<Count*>(context);
  if (thread < 0 || thread >= count.threads) ++count.wrong_thread;
  ++count.done[static_cast<size_t>(task)];
  static_cast<char*>(scratch(0, 4096))[0] = static_cast<char>(task);
}

void count_once(int64_t tasks, int threads) {
  Count count;
  count.done.assign(static_cast<size_t>(tasks), 0);
  count.threads = threads;
  run_tasks(tasks, threads, count_task, &count);
  for (int64_t times : count.done) expect(times == 1, "a task runs once");
  expect(count.wrong_thread == 0, "thread numbers are below the number of threads");
}

void nested_task(void*, int64_t, int) { count_once(5, 4); }

// ---- kernels ----

struct Product {
  int64_t m, n, k;
  std::vector<float> x, scale;
  std::vector<uint8_t> packed, marks;

  Product(int64_t rows, int64_t columns, int64_t depth) : m(rows), n(columns), k(depth) {
    const PackedShape shape{n, k};
    std::vector<uint8_t> codes(static_cast<size_t>(n * k));
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 37 % 120);
    packed.resize(static_cast<size_t>(shape.bytes()));
    marks.resize(static_cast<size_t>(shape.panels() * shape.blocks()));
    pack(codes.data(), k, shape, packed.data(), marks.data(), 3);
    for (int64_t i = 0; i < m * k; ++i) x.push_back(static_cast<float>(i % 17) - 8);
    scale.assign(static_cast<size_t>((n + 127) / 128 * shape.blocks()), 0.5f);
  }

  std::vector<float> run(int threads) {
    std::vector<float> y(static_cast<size_t>(m * n));
    GemmParams p;
    p.m = m, p.n = n, p.k = k;
    p.x = {x.data(), k, Type::kF32};
    p.weights = packed.data();
    p.nan_blocks = marks.data();
    const int64_t blocks = PackedShape{n, k}.blocks();
    p.scale_w = {scale.data(), blocks, 1};
    p.y = {y.data(), n, Type::kF32};
    p.threads = threads;
    portable::kTable.gemm(p);
    return y;
  }
};

std::vector<float> route(int threads) {
  constexpr int64_t t = 40, d = 64, e = 16, k = 3;
  std::vector<float> x(t * d), weight(e * d), weights(t * k), scores(t * e);
  std::vector<int64_t> idx(t * k);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 31 % 23) / 8 - 1;
  for (size_t i = 0; i < weight.size(); ++i)
    weight[i] = static_cast<float>(i * 13 % 19) / 16 - 0.5f;
  GateParams p;
  p.t = t, p.d = d, p.e = e, p.k = k;
  p.x = {x.data(), d, Type::kF32};
  p.weight = {weight.data(), d, Type::kF32};
  p.topk_idx = idx.data();
  p.topk_weights = weights.data();
  p.scores = scores.data();
  p.threads = threads;
  portable::kTable.moe_gate(p);
  return scores;
}

std::vector<float> decode(int threads) {
  constexpr int64_t b = 2, h = 4, dk = 24, dv = 16, page = 8, length = 1200, pages = length / page;
  std::vector<float> q(b * h * dk), cache(pages * page * dk), out(b * h * dv), lse(b * h);
  std::vector<int32_t> table(b * pages), lens(b, length);
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i % 7) - 3;
  for (size_t i = 0; i < cache.size(); ++i) cache[i] = static_cast<float>(i * 29 % 31) / 16 - 1;
  for (int64_t i = 0; i < b * pages; ++i) table[i] = static_cast<int32_t>(i * 7 % pages);
  DecodeParams p;
  p.b = b, p.s = 1, p.h = h;
  p.q = q.data();
  p.type = Type::kF32;
  p.cache.kind = CacheKind::kF32;
  p.cache.keys = p.cache.values = reinterpret_cast<const char*>(cache.data());
  p.cache.key_page = p.cache.value_page = page * dk * 4;
  p.cache.key_row = p.cache.value_row = dk * 4;
  p.cache.page = page, p.cache.dk = dk, p.cache.dv = dv;
  p.block_table = table.data();
  p.table_stride = pages;
  p.seq_lens = lens.data();
  p.out = out.data();
  p.lse = lse.data();
  p.threads = threads;
  portable::kTable.mla_decode(p);
  return out;
}

// dq, dk and dv behind one another. One request of two heads: both ways to cut the work are met.
std::vector<float> prefill_gradients(int threads) {
  constexpr int64_t t = 150, h = 2, dk = 24, dv = 16;
  std::vector<float> q(t * h * dk), k(q.size()), v(t * h * dv), grad(v.size()), out(v.size());
  std::vector<float> lse(h * t), grads(2 * q.size() + v.size());
  for (size_t i = 0; i < q.size(); ++i) {
    q[i] = static_cast<float>(i * 11 % 13) / 8 - 1;
    k[i] = static_cast<float>(i * 17 % 19) / 8 - 1;
  }
  for (size_t i = 0; i < v.size(); ++i) {
    v[i] = static_cast<float>(i * 23 % 29) / 16 - 1;
    grad[i] = static_cast<float>(i * 31 % 37) / 16 - 1;
  }
  const int32_t starts[] = {0, t};
  PrefillBackwardParams b;
  PrefillParams& p = b.forward;
  p.requests = 1, p.h = h;
  p.q = reinterpret_cast<const char*>(q.data());
  p.q_token = h * dk * 4, p.q_head = dk * 4;
  p.type = Type::kF32;
  p.kv.kind = CacheKind::kF32;
  p.kv.keys = reinterpret_cast<const char*>(k.data());
  p.kv.values = reinterpret_cast<const char*>(v.data());
  p.kv.key_row = h * dk * 4, p.key_head = dk * 4;
  p.kv.value_row = h * dv * 4, p.value_head = dv * 4;
  p.kv.dk = dk, p.kv.dv = dv;
  p.starts_q = p.starts_k = starts;
  p.out = out.data();
  p.lse = lse.data();
  p.lse_head = t;
  p.threads = threads;
  portable::kTable.mla_prefill(p);
  b.grad = reinterpret_cast<const char*>(grad.data());
  b.grad_token = h * dv * 4, b.grad_head = dv * 4;
  b.dq = grads.data();
  b.dk = grads.data() + q.size();
  b.dv = grads.data() + 2 * q.size();
  portable::kTable.mla_prefill_backward(b);
  return grads;
}

// dx and dweight behind one another.
std::vector<float> router_gradients(int threads) {
  constexpr int64_t t = 70, d = 130, e = 16, k = 2;
  std::vector<float> x(t * d), weight(e * d), scores(t * e, 0.25f), chosen(t * k, 0.5f);
  std::vector<float> grads(static_cast<size_t>((t + e) * d));
  std::vector<int64_t> idx(t * k);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 31 % 23) / 8 - 1;
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(i * 13 % 19) / 16;
  for (size_t i = 0; i < idx.size(); ++i) idx[i] = static_cast<int64_t>(i * 5 % e);
  GateBackwardParams p;
  p.t = t, p.d = d, p.e = e, p.k = k;
  p.x = {x.data(), d, Type::kF32};
  p.weight = {weight.data(), d, Type::kF32};
  p.topk_idx = idx.data();
  p.scores = p.grad_scores = scores.data();
  p.grad_weights = chosen.data();
  p.dx = {grads.data(), d, Type::kF32};
  p.dweight = {grads.data() + t * d, d, Type::kF32};
  p.threads = threads;
  portable::kTable.moe_gate_backward(p);
  return grads;
}

// A cache after two appends: rising slots, which threads share, and slots that repeat.
std::vector<float> append(int threads) {
  constexpr int64_t t = 200, dl = 20, r = 4, page = 16, pages = 13;
  std::vector<float> latent(t * dl, 1), rope(t * r, 2), cache(pages * page * (dl + r));
  std::vector<int64_t> slots(t);
  AppendParams p;
  p.t = t, p.dl = dl, p.r = r;
  p.latent = {latent.data(), dl, Type::kF32};
  p.rope = {rope.data(), r, Type::kF32};
  p.cache = reinterpret_cast<char*>(cache.data());
  p.kind = CacheKind::kF32;
  p.page = page;
  p.row_bytes = (dl + r) * 4, p.page_bytes = page * p.row_bytes;
  p.slots = slots.data();
  p.threads = threads;
  for (int64_t step : {1, 7}) {
    for (int64_t i = 0; i < t; ++i) {
      slots[static_cast<size_t>(i)] = i * step % (pages * page);
      latent[static_cast<size_t>(i * dl)] = static_cast<float>(i * step);
    }
    portable::kTable.mla_cache_append(p);
  }
  return cache;
}

}  // namespace

int main() {
  for (int threads : {1, 2, 5, 3}) {
    for (int64_t tasks : {0, 1, 2, 100}) count_once(tasks, threads);
  }
  run_tasks(6, 4, nested_task, nullptr);

  Product product(50, 200, 300);
  const std::vector<float> want = product.run(1), scores = route(1), attended = decode(1);
  const std::vector<float> prefilled = prefill_gradients(1), routed = router_gradients(1);
  const std::vector<float> cached = append(1);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 6; ++round) {
        const int threads = 1 + (caller + round) % 4;
        count_once(20, threads);
        expect(product.run(threads) == want, "a product does not depend on threads");
        expect(route(threads) == scores, "the router does not depend on threads");
        expect(prefill_gradients(threads) == prefilled, "prefill's gradients do not, either");
        expect(router_gradients(threads) == routed, "nor do the router's");
        expect(append(threads) == cached, "nor does the cache");
        const std::vector<float> out = decode(threads);
        for (size_t i = 0; i < out.size(); ++i) {
          const float error = out[i] - attended[i];
          expect(error < 1e-5f && error > -1e-5f, "splits of a request agree");
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  std::printf("ok\n");
  return 0;
}
