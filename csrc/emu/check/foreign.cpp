#include "emu/check/foreign.hpp"

namespace dsk::emu::check {
namespace {

using Snapshot = std::shared_ptr<const Past>;

bool covers(const Past& a, const Past& b) {
  return a.happened.covers(b.happened) && a.fenced.covers(b.fenced);
}

Snapshot join_past(const Snapshot& a, const Snapshot& b) {
  if (a == b || covers(*a, *b)) return a;
  if (covers(*b, *a)) return b;
  auto joined = std::make_shared<Past>(*a);
  joined->happened.join(b->happened);
  joined->fenced.join(b->fenced);
  return joined;
}

Foreign::const_iterator find(const Foreign& in, ClusterId cluster) {
  return std::lower_bound(in.begin(), in.end(), cluster,
                          [](const auto& entry, ClusterId id) { return entry.first < id; });
}

}  // namespace

void merge_foreign(ForeignPtr& into, const ForeignPtr& other) {
  if (!into) {
    into = other;
    return;
  }
  auto merged = std::make_shared<Foreign>();
  merged->reserve(std::max(into->size(), other->size()));
  bool as_before = true;
  auto a = into->begin(), b = other->begin();
  while (a != into->end() || b != other->end()) {
    if (b == other->end() || (a != into->end() && a->first < b->first)) {
      merged->push_back(*a++);
    } else if (a == into->end() || b->first < a->first) {
      merged->push_back(*b++);
      as_before = false;
    } else {
      merged->emplace_back(a->first, join_past(a->second, b->second));
      as_before &= merged->back().second == a->second;
      ++a, ++b;
    }
  }
  if (!as_before) into = std::move(merged);
}

ForeignPtr publish(ClusterId self, const Knowledge& knowledge) {
  auto snapshot = std::make_shared<Foreign>();
  if (knowledge.foreign) *snapshot = *knowledge.foreign;
  auto own = std::make_shared<Past>();
  own->happened = knowledge.happened;
  own->fenced = knowledge.fenced;
  const auto at = find(*snapshot, self) - snapshot->begin();
  snapshot->insert(snapshot->begin() + at, {self, std::move(own)});
  return snapshot;
}

void absorb(Knowledge& knowledge, ClusterId self, const ForeignPtr& snapshot) {
  if (!snapshot) return;
  const Past* own = past_of(snapshot, self);
  if (own == nullptr) return join_foreign(knowledge.foreign, snapshot);
  knowledge.happened.join(own->happened);
  knowledge.fenced.join(own->fenced);
  if (snapshot->size() == 1) return;
  auto others = std::make_shared<Foreign>(*snapshot);
  others->erase(others->begin() + (find(*snapshot, self) - snapshot->begin()));
  join_foreign(knowledge.foreign, others);
}

const Past* past_of(const ForeignPtr& snapshot, ClusterId cluster) {
  if (!snapshot) return nullptr;
  const auto it = find(*snapshot, cluster);
  return it != snapshot->end() && it->first == cluster ? it->second.get() : nullptr;
}

void fence_foreign(ForeignPtr& foreign) {
  if (!foreign) return;
  auto fenced = std::make_shared<Foreign>();
  for (const auto& [cluster, past] : *foreign) {
    auto copy = std::make_shared<Past>(*past);
    copy->fenced.join(copy->happened);
    fenced->emplace_back(cluster, std::move(copy));
  }
  foreign = std::move(fenced);
}

}  // namespace dsk::emu::check
