#include "emu/timing/cost.hpp"

#include <algorithm>
#include <string_view>
#include <unordered_map>

namespace dsk::emu::timing {
namespace {

class Opcode {
 public:
  explicit Opcode(const std::string& text) : text_(text) {
    std::size_t at = 0;
    while (at <= text.size()) {
      const std::size_t dot = std::min(text.find('.', at), text.size());
      parts_.emplace_back(text.data() + at, dot - at);
      at = dot + 1;
    }
  }
  std::string_view base() const { return parts_.front(); }
  std::string_view type() const { return parts_.back(); }
  bool has(std::string_view part) const {
    return std::find(parts_.begin() + 1, parts_.end(), part) != parts_.end();
  }
  bool starts(std::string_view prefix) const { return text_.rfind(prefix, 0) == 0; }
  bool is(std::initializer_list<std::string_view> names) const {
    return std::find(names.begin(), names.end(), base()) != names.end();
  }
  bool wide() const {
    const std::string_view t = type();
    return t == "u64" || t == "s64" || t == "b64";
  }
  bool fp32() const { return type() == "f32"; }
  bool fp64() const { return type() == "f64"; }
  bool half() const {
    const std::string_view t = type();
    return t == "f16" || t == "f16x2" || t == "bf16" || t == "bf16x2";
  }
  const std::vector<std::string_view>& parts() const { return parts_; }

 private:
  const std::string& text_;
  std::vector<std::string_view> parts_;
};

Cost make(Class group, Pipe pipe, double slots, double busy, double latency) {
  Cost c;
  c.group = group, c.pipe = pipe, c.slots = slots, c.busy = busy, c.latency = latency;
  return c;
}

// Arithmetic rates per sub-partition and cycle: fp32 32 lanes, logic and conversions from fp32 16,
// other conversions 4 to 16, special functions 4. Integer additions go to either of two pipes.
Cost arithmetic(const Opcode& op, const Model& m) {
  const double words = op.wide() ? 2 : 1;
  if (op.fp64()) return make(Class::Fp64, Pipe::Fp64, 1, 2, m.fp64);
  if (op.half()) return make(Class::Half, Pipe::Fma, 1, 1, m.alu);
  if (op.fp32()) {
    if (op.is({"add", "sub", "mul", "fma", "mad"})) {
      return make(Class::Fp32, Pipe::Fma, 1, 1, m.alu);
    }
    if (op.is({"neg", "abs"})) return make(Class::Fp32, Pipe::None, 0, 0, 0);  // operand modifiers
    return make(Class::Fp32, Pipe::Alu, 1, 2, m.alu);
  }
  if (op.is({"mul", "mad", "fma", "mul24", "mad24"})) {
    const double slots = op.has("hi") ? 2 : op.wide() && !op.has("wide") ? 4 : 1;
    return make(Class::Integer, Pipe::Fma, slots, 2 * slots, m.alu + 1);
  }
  return make(Class::Integer, Pipe::Alu, words, words, m.alu);
}

Cost division(const Opcode& op, const Model& m) {
  if (op.fp64()) return make(Class::Fp64, Pipe::Fp64, 20, 40, 20 * m.fp64);
  if (!op.fp32()) {
    const double slots = op.wide() ? 70 : 18;
    return make(Class::Integer, Pipe::Alu, slots, slots, 2 * slots + m.special);
  }
  const bool fast = op.has("approx") || op.has("full");
  return make(Class::Special, Pipe::Special, fast ? 2 : 9, 8, m.special + (fast ? 1 : 8) * m.alu);
}

Cost special(const Opcode& op, const Model& m) {
  if (op.fp64()) return make(Class::Fp64, Pipe::Fp64, 20, 40, 20 * m.fp64);
  const bool exact = op.has("rn") || op.has("rz");
  // Without .ftz denormal inputs or results are scaled around the unit.
  const bool scaled = op.fp32() && !op.has("ftz") && op.is({"ex2", "lg2", "rsqrt", "sqrt"});
  const double slots = exact ? 8 : scaled ? 4 : 1;
  return make(Class::Special, Pipe::Special, slots, 8, m.special + (slots - 1) * m.alu);
}

Cost conversion(const Opcode& op, const Model& m) {
  const auto& parts = op.parts();
  const std::string_view from = parts.back(), to = parts[parts.size() - 2];
  const auto integer = [](std::string_view t) { return t[0] == 'u' || t[0] == 's' || t[0] == 'b'; };
  const auto is_bf = [](std::string_view t) { return t.rfind("bf16", 0) == 0; };
  const bool from_int = integer(from) && !is_bf(from), to_int = integer(to) && !is_bf(to);
  if (from_int && to_int) {  // widening is a shift or nothing, narrowing nothing
    const bool sign = from[0] == 's' && (to == "s64" || to == "u64" || to == "b64");
    return make(Class::Convert, sign ? Pipe::Alu : Pipe::None, sign ? 1 : 0, sign ? 2 : 0,
                sign ? m.alu : 0);
  }
  if (from == "f64" || to == "f64") return make(Class::Convert, Pipe::Special, 1, 8, m.special);
  if (from_int || to_int) return make(Class::Convert, Pipe::Special, 1, 8, m.special);
  if (to == "f32" && from == "f32") return make(Class::Convert, Pipe::Special, 1, 8, m.special);
  if (to == "f32") return make(Class::Convert, Pipe::Alu, 1, 2, m.alu);
  return make(Class::Convert, Pipe::Alu, 1, 2, m.convert);
}

Cost memory(const Opcode& op, const Inst& inst, const Model& m) {
  if (inst.space == Space::Param || inst.space == Space::Const) {
    return make(Class::Move, Pipe::None, 0, 0, 0);  // an operand from the constant bank
  }
  Cost c = make(Class::Global, Pipe::None, 1, 0, 0);
  if (inst.space == Space::Shared || inst.space == Space::SharedCluster ||
      op.is({"ldmatrix", "stmatrix"})) {
    c.group = Class::Shared;
  }
  c.memory = true;
  const bool ordered = op.has("volatile") || op.has("acquire") || op.has("release") ||
                       op.has("relaxed") || op.is({"atom", "red"});
  c.ends_region = ordered;
  return c;
}

Cost synchronization(const Opcode& op, const Model& m) {
  Cost c = make(Class::Sync, Pipe::None, 1, 0, m.alu);
  c.ends_region = true;
  if (op.is({"fence", "membar"})) {
    if (op.has("proxy")) {
      c.latency = m.fence_async;
    } else if (op.has("cta") || op.has("mbarrier_init") || op.has("cluster")) {
      c.latency = m.fence_cta;
    } else {
      c.latency = m.fence_gpu;
    }
  }
  return c;
}

double mma_cycles(const Opcode& op) {
  // 512 multiply-adds of 16-bit values per cycle and sub-partition by wgmma; mma.sync reaches about
  // five eighths of that.
  int m = 16, n = 8, k = 16;
  for (std::string_view p : op.parts()) {
    if (p.size() > 4 && p[0] == 'm' && p.find('n') != std::string_view::npos) {
      std::sscanf(std::string(p).c_str(), "m%dn%dk%d", &m, &n, &k);
    }
  }
  double rate = 512 * 0.625;
  if (op.has("e4m3") || op.has("e5m2") || op.has("s8") || op.has("u8")) rate *= 2;
  if (op.has("tf32")) rate /= 2;
  if (op.fp64()) rate = 32;
  return m * n * k / rate;
}

}  // namespace

const char* class_name(Class c) {
  static const char* const names[kClasses] = {
      "move",   "fp32",   "integer", "logic", "convert", "special", "fp64",     "half",
      "shared", "global", "tensor",  "async", "sync",    "control", "exchange", "other"};
  return names[static_cast<u32>(c)];
}

Cost cost_of(const std::string& text, const Inst& inst, const Model& m) {
  const Opcode op(text);
  if (op.is({"mov", "cvta", "pragma", "mapa"})) return make(Class::Move, Pipe::None, 0, 0, 0);
  if (op.is({"add", "sub", "mul", "fma", "mad", "neg", "abs", "min", "max", "mul24", "mad24", "sad",
             "addc", "subc", "madc", "add3", "copysign"})) {
    return arithmetic(op, m);
  }
  if (op.is({"div", "rem"})) return division(op, m);
  if (op.is({"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"})) return special(op, m);
  if (op.is({"cvt"})) return conversion(op, m);
  if (op.is({"and", "or", "xor", "not", "lop3", "shl", "shr", "shf", "bfe", "bfi", "prmt", "cnot",
             "bmsk", "szext", "selp", "slct", "fns"})) {
    const double words = op.wide() ? 2 : 1;
    return make(Class::Logic, Pipe::Alu, words, 2 * words, m.alu);
  }
  if (op.is({"set", "setp", "testp"})) {
    const double words = op.wide() ? 2 : 1;
    return make(Class::Logic, Pipe::Alu, words, 2 * words, m.predicate);
  }
  if (op.is({"popc", "clz", "bfind", "brev"})) {
    return make(Class::Integer, Pipe::Special, 1, 8, m.special);
  }
  if (op.is({"dp4a", "dp2a"})) return make(Class::Integer, Pipe::Fma, 1, 2, m.alu);
  if (op.is({"shfl"})) return make(Class::Exchange, Pipe::None, 1, 0, m.shuffle);
  if (op.is({"vote", "match", "activemask", "elect"})) {
    return make(Class::Exchange, Pipe::Alu, 1, 2, 2 * m.predicate);
  }
  if (op.is({"redux"})) return make(Class::Exchange, Pipe::Alu, 1, 2, m.shuffle);
  if (op.is({"ld", "ldu", "st", "atom", "red", "ldmatrix", "stmatrix", "multimem"}) &&
      !op.starts("red.async") && !op.starts("st.async")) {
    return memory(op, inst, m);
  }
  if (op.is({"mma"})) {
    return make(Class::Tensor, Pipe::Tensor, 1, mma_cycles(op) * m.tensor_scale, 33);
  }
  if (op.is({"wgmma"})) {
    Cost c = make(Class::Tensor, Pipe::None, op.has("mma_async") ? 2 : 1, 0, 0);
    c.ends_region = true;
    return c;
  }
  if (op.is(
          {"cp", "st", "red", "tensormap", "prefetch", "prefetchu", "applypriority", "discard"})) {
    Cost c = make(Class::AsyncCopy, Pipe::None, op.has("bulk") ? 4 : 1, 0, 0);
    c.ends_region = true;
    return c;
  }
  if (op.is({"bar", "barrier", "mbarrier", "fence", "membar", "griddepcontrol", "setmaxnreg",
             "nanosleep"})) {
    return synchronization(op, m);
  }
  if (op.is({"bra", "brx", "exit", "ret", "call", "trap", "brkpt"})) {
    Cost c = make(Class::Control, Pipe::None, 1, 0, m.branch);
    c.ends_region = true;
    return c;
  }
  Cost c = make(Class::Other, Pipe::Alu, 1, 2, m.alu);
  c.ends_region = true;
  return c;
}

namespace {

// List scheduling of one region: among the first `window` instructions not yet issued, those whose
// operands come soonest, the longest path to the end first. Registers are virtual, so only true
// dependencies, and the order of stores with other memory accesses, bind.
class RegionScheduler {
 public:
  RegionScheduler(const Program& p, const std::vector<Cost>& cost, const Model& m)
      : program_(p), cost_(cost), model_(m) {}

  void run(u32 first, u32 size, std::vector<u32>& order) {
    if (size <= 2 || model_.window <= 1) {
      for (u32 k = 0; k < size; ++k) order.push_back(first + k);
      return;
    }
    find_dependencies(first, size);
    std::vector<double> ready(size, 0);
    std::vector<bool> done(size, false);
    double now = 0;
    u32 front = 0;
    for (u32 issued = 0; issued < size; ++issued) {
      while (done[front]) ++front;
      u32 best = kNoReg;
      double best_start = 0;
      u32 seen = 0;
      for (u32 k = front; k < size && seen < model_.window; ++k) {
        if (done[k]) continue;
        ++seen;
        if (waiting_[k] != 0) continue;
        const double start = std::max(now, ready[k]);
        if (best == kNoReg || start < best_start ||
            (start == best_start && height_[k] > height_[best])) {
          best = k, best_start = start;
        }
      }
      done[best] = true;
      order.push_back(first + best);
      now = best_start + cost_[first + best].slots;
      for (u32 user : users_[best]) {
        ready[user] = std::max(ready[user], best_start + latency(first + best));
        --waiting_[user];
      }
    }
  }

 private:
  double latency(u32 pc) const {
    const Cost& c = cost_[pc];
    if (!c.memory) return c.latency;
    return c.group == Class::Shared ? model_.shared : model_.l1 + model_.l2;
  }

  void find_dependencies(u32 first, u32 size) {
    users_.assign(size, {});
    waiting_.assign(size, 0);
    height_.assign(size, 0);
    std::unordered_map<u32, u32> writer;
    std::unordered_map<u32, std::vector<u32>> readers;
    std::vector<u32> loads;
    u32 last_store = kNoReg;
    const auto depend = [&](u32 user, u32 on) {
      if (user == on) return;
      users_[on].push_back(user);
      ++waiting_[user];
    };
    for (u32 k = 0; k < size; ++k) {
      const InstInfo& info = program_.info[first + k];
      const auto reads = [&](u32 r) {
        if (const auto it = writer.find(r); it != writer.end()) depend(k, it->second);
        readers[r].push_back(k);
      };
      for (u32 r : info.reads) reads(r);
      for (u32 r : info.writes) {
        if (const auto it = writer.find(r); it != writer.end()) depend(k, it->second);
        for (u32 reader : readers[r]) depend(k, reader);
        readers[r].clear();
        writer[r] = k;
      }
      if (!cost_[first + k].memory) continue;
      if (info.writes.empty()) {  // a store
        for (u32 l : loads) depend(k, l);
        loads.clear();
        if (last_store != kNoReg) depend(k, last_store);
        last_store = k;
      } else {
        if (last_store != kNoReg) depend(k, last_store);
        loads.push_back(k);
      }
    }
    for (u32 k = size; k-- > 0;) {
      double longest = 0;
      for (u32 user : users_[k]) longest = std::max(longest, height_[user]);
      height_[k] = longest + std::max(1.0, latency(first + k));
    }
  }

  const Program& program_;
  const std::vector<Cost>& cost_;
  const Model& model_;
  std::vector<std::vector<u32>> users_;
  std::vector<u32> waiting_;
  std::vector<double> height_;
};

}  // namespace

CostTable::CostTable(const Program& program, const Model& m) {
  const u32 n = static_cast<u32>(program.code.size());
  for (u32 pc = 0; pc < n; ++pc) {
    cost.push_back(cost_of(program.texts[program.info[pc].text], program.code[pc], m));
    Cost& c = cost.back();
    const Kind kind = program.code[pc].kind;
    if (kind != Kind::Plain) c.ends_region = true;
    // The last of several machine instructions has the result.
    if (c.slots > 1) c.latency += c.slots - 1;
    const bool alu = c.group <= Class::Half && c.group != Class::Move;
    if (alu) c.slots *= m.issue_scale;
  }
  region.resize(n), rank.resize(n);
  RegionScheduler scheduler(program, cost, m);
  u32 pc = 0;
  while (pc < n) {
    const u32 first = pc;
    const u32 id = static_cast<u32>(region_first.size());
    const u32 block = program.info[pc].block;
    // Something that ends a region is a region of its own.
    if (cost[pc].ends_region) {
      ++pc;
    } else {
      while (pc < n && !cost[pc].ends_region && program.info[pc].block == block) ++pc;
    }
    region_first.push_back(first);
    region_size.push_back(pc - first);
    const std::size_t at = order.size();
    scheduler.run(first, pc - first, order);
    for (std::size_t k = at; k < order.size(); ++k) {
      region[order[k]] = id;
      rank[order[k]] = static_cast<u32>(k - at);
    }
  }
}

}  // namespace dsk::emu::timing
