#include "emu/check/shadow.hpp"

namespace dsk::emu::check {
namespace {

constexpr u16 kAllBytes = 0xffff;

// The conflict of `touch` with one earlier access, if any.
bool conflicts(const Touch& earlier, bool earlier_wrote, AccessKind kind, const Touch& touch,
               const Knowledge& knowledge, Conflict& conflict) {
  const bool writes = kind != AccessKind::Read;
  if (earlier.when.clock == 0 || (earlier.bytes & touch.bytes) == 0) return false;
  if (!writes && !earlier_wrote) return false;
  if (!knowledge.happened.knows(earlier.when)) {
    if (earlier.strong && touch.strong) return false;
    conflict = Conflict::Race;
    return true;
  }
  if (touch.async && !earlier.async && !knowledge.fenced.knows(earlier.when)) {
    conflict = earlier_wrote ? Conflict::UnfencedWrite : Conflict::UnfencedRead;
    return true;
  }
  return false;
}

void report(std::vector<Finding>& findings, const Finding& finding) {
  for (const Finding& known : findings) {
    if (known.conflict == finding.conflict && known.earlier.pc == finding.earlier.pc) return;
  }
  findings.push_back(finding);
}

void remember_read(std::vector<Touch>& reads, const Touch& touch, const Knowledge& knowledge) {
  for (Touch& read : reads) {
    // A read that happened before this one is covered by it: whoever is ordered after this read is
    // ordered after that one too. The proxies differ in what else they need, so they do not cover
    // one another.
    if (read.async == touch.async && knowledge.happened.knows(read.when)) {
      const u16 bytes = read.bytes | touch.bytes;
      const bool same_agent = read.when.agent == touch.when.agent;
      if (same_agent || read.bytes == (read.bytes & touch.bytes)) {
        read = touch;
        if (same_agent) read.bytes = bytes;
        return;
      }
    }
  }
  reads.push_back(touch);
}

}  // namespace

Shadow::Shadow(u32 bytes) : granules_((bytes + kCoarse - 1) / kCoarse) {}

void Shadow::touch_record(Record& record, AccessKind kind, const Touch& touch, u32 offset,
                          const Knowledge& knowledge, std::vector<Finding>& findings) {
  Finding finding;
  finding.offset = offset;
  if (conflicts(record.write, true, kind, touch, knowledge, finding.conflict)) {
    finding.earlier = record.write;
    finding.earlier_wrote = true;
    report(findings, finding);
  }
  if (kind == AccessKind::Read) {
    remember_read(record.reads, touch, knowledge);
    return;
  }
  for (const Touch& read : record.reads) {
    if (conflicts(read, false, kind, touch, knowledge, finding.conflict)) {
      finding.earlier = read;
      finding.earlier_wrote = false;
      report(findings, finding);
    }
  }
  record.write = touch;
  record.reads.clear();
}

void Shadow::touch_parts(Granule& granule, AccessKind kind, const Touch& touch, u32 base, u32 mask,
                         const Knowledge& knowledge, std::vector<Finding>& findings) {
  constexpr u32 kParts = kCoarse / kFine;
  constexpr u32 kPartMask = (1u << kFine) - 1;
  if (granule.parts.empty()) {
    granule.parts.assign(kParts, granule.whole);
    for (Record& part : granule.parts) {
      part.write.bytes = kPartMask;
      for (Touch& read : part.reads) read.bytes = kPartMask;
    }
    granule.whole = Record{};
  }
  for (u32 p = 0; p < kParts; ++p) {
    const u32 bytes = mask >> (p * kFine) & kPartMask;
    if (bytes == 0) continue;
    Touch part = touch;
    part.bytes = static_cast<u16>(bytes);
    touch_record(granule.parts[p], kind, part, base + p * kFine, knowledge, findings);
  }
}

void Shadow::access(AccessKind kind, const Touch& touch, u32 offset, u32 bytes,
                    const Knowledge& knowledge, std::vector<Finding>& findings) {
  const u32 end = offset + bytes;
  for (u32 at = offset; at < end;) {
    const u32 index = at / kCoarse;
    const u32 base = index * kCoarse;
    const u32 stop = std::min(end, base + kCoarse);
    if (index >= granules_.size()) return;  // out of bounds is another check's finding
    const u32 mask = ((1u << (stop - base)) - 1) & ~((1u << (at - base)) - 1);
    Granule& granule = granules_[index];
    if (mask == kAllBytes && granule.parts.empty()) {
      Touch whole = touch;
      whole.bytes = kAllBytes;
      touch_record(granule.whole, kind, whole, base, knowledge, findings);
    } else {
      touch_parts(granule, kind, touch, base, mask, knowledge, findings);
      // A full write leaves four equal records: one will do again.
      if (mask == kAllBytes && kind == AccessKind::Write) {
        granule.whole = granule.parts[0];
        granule.whole.write.bytes = kAllBytes;
        granule.parts.clear();
      }
    }
    at = stop;
  }
}

}  // namespace dsk::emu::check
