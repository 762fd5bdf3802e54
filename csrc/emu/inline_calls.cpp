// Calls of the file's own functions become their bodies: the machine has no call stack, and nvcc
// leaves few calls in optimised PTX.
#include <algorithm>
#include <set>
#include <string>
#include <unordered_map>

#include "emu/decode.hpp"

namespace dsk::emu {
namespace {

constexpr std::size_t kMaxInstructions = 4u << 20;

class Inliner {
 public:
  Inliner(const ptx::File& file, const ptx::Function& kernel) : file_(file), out_(kernel) {
    for (const ptx::Function& f : file.functions) by_name_[f.name] = &f;
  }

  ptx::Function run() {
    const std::vector<ptx::Instruction> code = std::move(out_.code);
    std::vector<ptx::Function::Label> labels = std::move(out_.labels);
    out_.code.clear();
    out_.labels.clear();
    Frame frame;
    frame.labels = &labels;
    frame.identity = true;
    emit(code, frame);
    return std::move(out_);
  }

 private:
  struct Frame {
    const std::vector<ptx::Function::Label>* labels = nullptr;
    bool identity = false;  // the kernel itself: names and registers stay
    u32 first_register = 0, first_scope = 0;
    std::string prefix;                                  // of labels and locals
    std::unordered_map<std::string, std::string> names;  // variables, renamed
    std::string return_label;
    std::vector<std::string> stack;
  };

  void emit(const std::vector<ptx::Instruction>& code, const Frame& frame) {
    std::vector<std::vector<const ptx::Function::Label*>> at(code.size() + 1);
    for (const auto& label : *frame.labels) at[label.index].push_back(&label);
    for (std::size_t k = 0; k <= code.size(); ++k) {
      for (const auto* label : at[k]) {
        out_.labels.push_back({frame.prefix + label->name, frame.first_scope + label->scope,
                               static_cast<u32>(out_.code.size())});
      }
      if (k < code.size()) emit(code[k], frame);
    }
  }

  void emit(const ptx::Instruction& original, const Frame& frame) {
    if (out_.code.size() > kMaxInstructions) {
      throw PtxError(original.line, "the kernel is too large once its calls are inlined");
    }
    ptx::Instruction in = original;
    rename(in, frame);
    if (in.opcode == "ret" && !frame.identity) {
      in.opcode = "bra";
      in.modifiers.clear();
      in.operands = {symbol(frame.return_label)};
      in.scope = 0;
    } else if (in.opcode == "call") {
      if (const ptx::Function* callee = find_callee(in)) return emit_call(in, *callee, frame);
    }
    out_.code.push_back(std::move(in));
  }

  static ptx::Operand symbol(const std::string& name) {
    ptx::Operand o;
    o.kind = ptx::Operand::Kind::Symbol;
    o.symbol = name;
    return o;
  }

  void rename(ptx::Instruction& in, const Frame& frame) {
    if (frame.identity) return;
    in.scope += frame.first_scope;
    if (in.predicate >= 0) in.predicate += static_cast<i32>(frame.first_register);
    const bool branch = in.opcode == "bra";
    for (ptx::Operand& o : in.operands) rename(o, frame, branch);
  }

  void rename(ptx::Operand& o, const Frame& frame, bool branch) {
    if (o.reg >= 0) o.reg += static_cast<i32>(frame.first_register);
    if (o.second >= 0) o.second += static_cast<i32>(frame.first_register);
    if (!o.symbol.empty()) {
      const auto it = frame.names.find(o.symbol);
      if (branch) {
        o.symbol = frame.prefix + o.symbol;
      } else if (it != frame.names.end()) {
        o.symbol = it->second;
      }
    }
    for (ptx::Operand& e : o.list) rename(e, frame, branch);
  }

  // call{.uni} (results), function, (arguments); results and arguments may be absent.
  struct CallParts {
    const ptx::Operand* results = nullptr;
    const ptx::Operand* callee = nullptr;
    const ptx::Operand* arguments = nullptr;
  };
  static CallParts parts(const ptx::Instruction& in) {
    CallParts p;
    for (const ptx::Operand& o : in.operands) {
      if (o.kind == ptx::Operand::Kind::Vector) {
        (p.callee == nullptr ? p.results : p.arguments) = &o;
      } else if (p.callee == nullptr) {
        p.callee = &o;
      }
    }
    return p;
  }

  const ptx::Function* find_callee(const ptx::Instruction& in) {
    const CallParts p = parts(in);
    if (p.callee == nullptr || p.callee->kind != ptx::Operand::Kind::Symbol) {
      throw PtxError(in.line, "calls through pointers are not supported");
    }
    const auto it = by_name_.find(p.callee->symbol);
    return it == by_name_.end() ? nullptr : it->second;
  }

  void bind_names(const ptx::Instruction& in, const ptx::Operand* actual,
                  const std::vector<ptx::Variable>& formal, Frame& frame) {
    const std::size_t n = actual == nullptr ? 0 : actual->list.size();
    if (n != formal.size()) {
      throw PtxError(in.line, "call passes " + std::to_string(n) + " values, expected " +
                                  std::to_string(formal.size()));
    }
    for (std::size_t k = 0; k < n; ++k) {
      if (actual->list[k].kind != ptx::Operand::Kind::Symbol) {
        throw PtxError(in.line, "call arguments must be .param variables");
      }
      frame.names[formal[k].name] = actual->list[k].symbol;
    }
  }

  void emit_call(const ptx::Instruction& in, const ptx::Function& callee, const Frame& caller) {
    Frame frame;
    frame.stack = caller.stack;
    if (std::count(frame.stack.begin(), frame.stack.end(), callee.name) != 0) {
      throw PtxError(in.line, "recursive call of '" + callee.name + "' is not supported");
    }
    frame.stack.push_back(callee.name);
    frame.prefix = "@" + std::to_string(++calls_) + ".";
    frame.return_label = frame.prefix + "return";
    frame.labels = &callee.labels;
    const CallParts p = parts(in);
    bind_names(in, p.results, callee.returns, frame);
    bind_names(in, p.arguments, callee.params, frame);
    frame.first_register = static_cast<u32>(out_.registers.size());
    out_.registers.insert(out_.registers.end(), callee.registers.begin(), callee.registers.end());
    // The callee's blocks hang below the kernel's body, where the return label lives.
    frame.first_scope = static_cast<u32>(out_.scope_parent.size());
    for (u32 parent : callee.scope_parent) {
      out_.scope_parent.push_back(
          out_.scope_parent.size() == frame.first_scope ? 0 : frame.first_scope + parent);
    }
    for (ptx::Variable v : callee.locals) {
      // Static shared variables of a function exist once; locals once per inlined copy.
      if (v.space == Space::Shared) {
        const bool known = std::any_of(out_.locals.begin(), out_.locals.end(),
                                       [&](const ptx::Variable& o) { return o.name == v.name; });
        if (!known) out_.locals.push_back(v);
        continue;
      }
      frame.names[v.name] = frame.prefix + v.name;
      v.name = frame.prefix + v.name;
      out_.locals.push_back(v);
    }
    if (in.predicate >= 0) {
      ptx::Instruction skip = in;
      skip.opcode = "bra";
      skip.modifiers.clear();
      skip.predicate_negated = !in.predicate_negated;
      skip.operands = {symbol(frame.return_label)};
      out_.code.push_back(std::move(skip));
    }
    emit(callee.code, frame);
    out_.labels.push_back({frame.return_label, 0, static_cast<u32>(out_.code.size())});
  }

  const ptx::File& file_;
  ptx::Function out_;
  std::unordered_map<std::string, const ptx::Function*> by_name_;
  u64 calls_ = 0;
};

}  // namespace

ptx::Function inline_calls(const ptx::File& file, const ptx::Function& kernel) {
  const bool has_calls = std::any_of(kernel.code.begin(), kernel.code.end(),
                                     [](const ptx::Instruction& i) { return i.opcode == "call"; });
  return has_calls ? Inliner(file, kernel).run() : kernel;
}

}  // namespace dsk::emu
