"use strict";
// The page's twin of schedules.py, formulas.py and simulate.py, small enough to run on every move
// of a slider. A test compares the two over a grid of sizes and costs: change both together.

const Pipeline = (() => {
  const FAMILIES = {
    gpipe: { title: "GPipe", perRank: 1, directions: 1 },
    "1f1b": { title: "1F1B", perRank: 1, directions: 1 },
    interleaved: {
      title: "Interleaved 1F1B", perRank: 2, directions: 1, multiple: (p) => p, least: (p) => p,
    },
    zb1p: { title: "ZB1P", perRank: 1, directions: 1 },
    zbv: { title: "ZB-V", perRank: 2, directions: 1, v: true },
    chimera: {
      title: "Chimera", perRank: 1, directions: 2, even: true,
      multiple: () => 2, least: () => 2,
    },
    dualpipe: {
      title: "DualPipe", perRank: 1, directions: 2, even: true,
      multiple: () => 2, least: (p) => 2 * p,
    },
    dualpipev: { title: "DualPipeV", perRank: 2, directions: 1, v: true, least: (p) => 2 * p },
  };

  const FORMULAS = {
    gpipe: "(P-1)(F+B)",
    "1f1b": "(P-1)(F+B)",
    interleaved: "(P-1)(F+B), F and B of one of V chunks",
    zb1p: "(P-1)(F+B-2W)",
    zbv: "(P-1)F, if F=Bi=W",
    chimera: "(P-2)max(F,B), if microbatches=P",
    dualpipe: "(P/2-1)(F&B+B-3W)",
    dualpipev: "(P-1)(F&B+B-3W)",
  };

  // Nearest sizes for which a schedule is defined, and why they differ from those asked for.
  function legal(name, ranks, microbatches) {
    const fam = FAMILIES[name];
    const notes = [];
    let p = ranks;
    if (fam.even && p % 2) {
      p += 1;
      notes.push(`${fam.title} needs an even number of ranks: showing ${p}`);
    }
    const step = fam.multiple ? fam.multiple(p) : 1;
    const least = fam.least ? fam.least(p) : 1;
    const m = Math.max(least, Math.ceil(microbatches / step) * step);
    if (m !== microbatches) {
      notes.push(`${fam.title} on ${p} ranks needs at least ${least} micro-batches` +
        (step > 1 ? `, a multiple of ${step}` : "") + `: showing ${m}`);
    }
    return { ranks: p, microbatches: m, note: notes.join(". ") };
  }

  // --- generators: one list per rank -------------------------------------------------------------

  class RankList {
    constructor(chunks, limit = Infinity) {
      this.actions = [];
      this.chunks = chunks; // [stage, direction, first micro-batch]
      this.limit = limit;
      this.forwards = chunks.map((c) => c[2]);
      this.backwards = chunks.map((c) => c[2]);
      this.pending = [];
    }
    next(op, chunk, counter) {
      const [stage, direction] = this.chunks[chunk];
      return { op, stage, direction, mb: counter[chunk]++ };
    }
    emit(action) {
      if (action.mb < this.limit) this.actions.push(action);
    }
    f(chunk = 0) { this.emit(this.next("F", chunk, this.forwards)); }
    b(chunk = 0, split = false) {
      const action = this.next(split ? "I" : "B", chunk, this.backwards);
      if (split) this.pending.push({ ...action, op: "W" });
      this.emit(action);
    }
    w() { this.emit(this.pending.shift()); }
    fb(ahead, back) {
      const fwd = this.next("F", ahead, this.forwards);
      const bwd = this.next("B", back, this.backwards);
      this.actions.push({ ...fwd, op: "FB", parts: [fwd, bwd] });
    }
  }

  const times = (n, call) => { for (let i = 0; i < n; i++) call(i); };

  function gpipe(p, m, rank) {
    const out = new RankList([[rank, 0, 0]]);
    times(m, () => out.f());
    times(m, () => out.b());
    return out.actions;
  }

  function oneFOneB(p, m, rank, split) {
    const out = new RankList([[rank, 0, 0]]);
    const warmup = Math.min(p - 1 - rank, m);
    times(warmup, () => out.f());
    times(m, (i) => {
      if (i < m - warmup) out.f();
      out.b(0, split);
      if (split && out.pending.length > rank) out.w();
    });
    while (out.pending.length) out.w();
    return out.actions;
  }

  function interleaved(p, m, rank, virtual) {
    const total = m * virtual;
    const group = p * virtual;
    const slot = (k, backward) => {
      const chunk = Math.floor(k / p) % virtual;
      return {
        op: backward ? "B" : "F", direction: 0,
        stage: (backward ? virtual - 1 - chunk : chunk) * p + rank,
        mb: Math.floor(k / group) * p + (k % p),
      };
    };
    const warmup = Math.min((virtual - 1) * p + 2 * (p - 1 - rank), total);
    const out = [];
    times(warmup, (k) => out.push(slot(k, false)));
    times(total, (k) => {
      if (k + warmup < total) out.push(slot(k + warmup, false));
      out.push(slot(k, true));
    });
    return out;
  }

  function zbv(p, m, rank) {
    const full = Math.max(m, 2 * p - 1);
    const out = new RankList([[rank, 0, 0], [2 * p - 1 - rank, 0, 0]], m);
    let down = 2 * (p - rank) - 1 + rank;
    let up = p;
    times(2 * (p - rank) - 1, () => out.f(0));
    times(rank, () => { out.f(1); out.f(0); });
    times(p - rank, () => { out.f(1); out.b(1, true); out.w(); });
    while (up < down || down < full) {
      if (down < full) { out.f(0); down++; }
      out.b(0, true); out.w();
      out.f(1);
      out.b(1, true); out.w();
      up++;
    }
    const late = [[], []];
    const split = (chunk) => { out.b(chunk, true); late[chunk].push(out.pending.pop()); };
    times(rank, () => { split(0); split(1); });
    times(p - rank, () => { split(0); out.emit(late[0].shift()); });
    for (const action of [...late[1], ...late[0]]) out.emit(action);
    return out.actions;
  }

  function chimera(p, m, rank) {
    const slots = [];
    for (const [direction, stage] of [[0, rank], [1, p - 1 - rank]]) {
      times(m / 2, (i) => {
        const base = 2 * p * Math.floor(i / (p / 2)) + 2 * (i % (p / 2));
        const mb = direction * (m / 2) + i;
        slots.push([base + stage, { op: "F", stage, mb, direction }]);
        slots.push([base + 2 * p - 1 - stage, { op: "B", stage, mb, direction }]);
      });
    }
    return slots.sort((a, b) => a[0] - b[0]).map((s) => s[1]);
  }

  function dualSteps(out, depth, h, perChunk, turn) {
    const outer = depth - h - 1;
    const inner = h + 1;
    times(2 * outer, () => out.f(0));
    times(inner, () => { out.f(0); out.f(1); });
    times(outer, () => { out.b(1, true); out.w(); out.f(1); });
    times(perChunk - 2 * depth + inner, (i) => {
      if (i === 0 && turn) { out.f(0); out.b(1); } else out.fb(0, 1);
      out.fb(1, 0);
    });
    times(outer, () => { out.b(1); out.fb(1, 0); });
    let split = false;
    times(inner, (i) => {
      const now = i === Math.floor(inner / 2);
      split = split || (now && h % 2 === 1);
      out.b(1, split);
      split = split || (now && h % 2 === 0);
      out.b(0, split);
    });
    times(outer, () => { out.w(); out.b(0, true); });
    times(inner, () => out.w());
    return out.actions;
  }

  function dualpipe(p, m, rank) {
    const down = [rank, 0, 0];
    const up = [p - 1 - rank, 1, m / 2];
    const out = new RankList(rank < p / 2 ? [down, up] : [up, down]);
    const h = Math.min(rank, p - 1 - rank);
    return dualSteps(out, p / 2, h, m / 2, h === p / 2 - 1);
  }

  function dualpipev(p, m, rank) {
    const out = new RankList([[rank, 0, 0], [2 * p - 1 - rank, 0, 0]]);
    return dualSteps(out, p, rank, m, rank === p - 1);
  }

  function make(name, ranks, microbatches) {
    const fam = FAMILIES[name];
    const build = {
      gpipe, "1f1b": (p, m, r) => oneFOneB(p, m, r, false),
      zb1p: (p, m, r) => oneFOneB(p, m, r, true),
      interleaved: (p, m, r) => interleaved(p, m, r, fam.perRank),
      zbv, chimera, dualpipe, dualpipev,
    }[name];
    const stages = ranks * fam.perRank;
    const place = Array.from({ length: stages }, (_, s) =>
      fam.v && s >= ranks ? 2 * ranks - 1 - s : s % ranks);
    return {
      name, ranks, microbatches, stages,
      placement: fam.directions === 1 ? [place] : [place, [...place].reverse()],
      lists: Array.from({ length: ranks }, (_, r) => build(ranks, microbatches, r)),
    };
  }

  // --- simulation --------------------------------------------------------------------------------

  // costs: f, bi, w, fb, latency (of every transfer between ranks)
  function simulate(schedule, costs) {
    const { lists, stages, ranks, microbatches, placement } = schedule;
    const price = {
      F: costs.f, I: costs.bi, W: costs.w, B: costs.bi + costs.w,
      FB: costs.fb,
    };
    const done = [new Map(), new Map()]; // forward, backward: stage * M + mb -> time
    const key = (stage, mb) => stage * microbatches + mb;
    const clock = new Array(ranks).fill(0);
    const busy = new Array(ranks).fill(0);
    const cursor = new Array(ranks).fill(0);
    const rows = lists.map(() => []);
    const need = (a) => {
      if (a.op === "F") return a.stage ? [0, a.stage - 1] : null;
      if (a.op === "W") return null;
      return a.stage === stages - 1 ? [0, a.stage] : [1, a.stage + 1];
    };
    let progress = true;
    while (progress) {
      progress = false;
      for (let r = 0; r < ranks; r++) {
        for (; cursor[r] < lists[r].length; cursor[r]++) {
          const action = lists[r][cursor[r]];
          let start = clock[r];
          let ready = true;
          for (const atom of action.parts || [action]) {
            const wanted = need(atom);
            if (!wanted) continue;
            const at = done[wanted[0]].get(key(wanted[1], atom.mb));
            if (at === undefined) { ready = false; break; }
            const remote = placement[atom.direction][wanted[1]] !== r;
            start = Math.max(start, at + (remote ? costs.latency || 0 : 0));
          }
          if (!ready) break;
          const end = start + price[action.op];
          for (const atom of action.parts || [action]) {
            if (atom.op !== "W") done[atom.op === "F" ? 0 : 1].set(key(atom.stage, atom.mb), end);
          }
          rows[r].push({ start, end, action });
          busy[r] += end - start;
          clock[r] = end;
          progress = true;
        }
      }
    }
    const makespan = Math.max(...clock);
    const memory = rows.map(memoryCurve);
    return {
      schedule, rows, makespan, busy, memory,
      bubble: busy.map((b) => makespan - b),
      spanBubble: rows.map((row, r) => row[row.length - 1].end - row[0].start - busy[r]),
      peak: memory.map((curve) => Math.max(...curve.map((point) => point[1]))),
      formula: formula(schedule.name, ranks, microbatches, costs),
      formulaText: FORMULAS[schedule.name],
    };
  }

  // [time, chunks held]: F takes one at its start, B or W gives it back at its end.
  function memoryCurve(row) {
    const events = [];
    for (const { start, end, action } of row) {
      for (const atom of action.parts || [action]) {
        if (atom.op === "F") events.push([start, 1]);
        if (atom.op === "B" || atom.op === "W") events.push([end, -1]);
      }
    }
    events.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    let held = 0;
    return events.map(([t, change]) => [t, (held += change)]);
  }

  function formula(name, p, m, { f, bi, w, fb }) {
    const b = bi + w;
    if (name === "gpipe" || name === "1f1b" || name === "interleaved") return (p - 1) * (f + b);
    if (name === "zb1p") return (p - 1) * (f + b - 2 * w);
    if (name === "zbv") {
      return Math.abs(f - w) + Math.abs(b - 2 * f) < 1e-12 * f ? (p - 1) * f : null;
    }
    if (name === "chimera") return m === p ? (p - 2) * Math.max(f, b) : null;
    return ((name === "dualpipev" ? p : p / 2) - 1) * (fb + b - 3 * w);
  }

  return { FAMILIES, legal, make, simulate };
})();
