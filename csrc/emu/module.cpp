// Loading: parse, decode every kernel, number the symbols.
#include <algorithm>

#include "emu/decode.hpp"
#include "emu/system.hpp"

namespace dsk::emu {

class Linker {
 public:
  static std::shared_ptr<const Module> link(std::string_view text, const std::string& name) {
    auto module = std::make_shared<Module>();
    module->name_ = name;
    module->file_ = ptx::parse(text);
    ModuleSymbols symbols;
    symbols.target_sm = target_sm(module->file_.target);
    for (const ptx::Variable& v : module->file_.variables) {
      if (v.space == Space::Shared) {
        symbols.shared[v.name] = &v;
      } else {
        symbols.globals.emplace(v.name, static_cast<u32>(module->symbols_.size()));
        module->symbols_.push_back(&v);
      }
    }
    for (const ptx::Function& f : module->file_.functions) {
      if (!f.is_entry) continue;
      const ptx::Function whole = inline_calls(module->file_, f);
      module->programs_[f.name] = std::make_unique<Program>(Decoder(whole, symbols).run());
    }
    return module;
  }

 private:
  // "sm_90a" -> 90. Absent or strange: whatever the machine knows.
  static u32 target_sm(const std::string& target) {
    u32 sm = 0;
    for (std::size_t k = 3; k < target.size() && k < 7 && target[k] >= '0' && target[k] <= '9';
         ++k) {
      sm = sm * 10 + static_cast<u32>(target[k] - '0');
    }
    return target.rfind("sm_", 0) == 0 && sm != 0 ? sm : 90;
  }
};

std::shared_ptr<const Module> Module::load(std::string_view text, const std::string& name) {
  return Linker::link(text, name);
}

std::vector<std::string> Module::kernel_names() const {
  std::vector<std::string> names;
  for (const auto& [name, program] : programs_) names.push_back(name);
  return names;
}

const Program& Module::kernel(const std::string& name) const {
  const auto it = programs_.find(name);
  if (it != programs_.end()) return *it->second;
  std::string have;
  for (const auto& n : kernel_names()) have += (have.empty() ? "" : ", ") + n;
  throw Error("no kernel '" + name + "' in " + name_ + "; it has: " + have);
}

}  // namespace dsk::emu
