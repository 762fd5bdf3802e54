"""The exchange's protocol as a transition system, searched exhaustively.

A rank is a list of phases, each one atomic step: wait until counters have reached their values,
read slots (what is found must be what was promised), then send. Messages travel one by one in any
order; a notification waits only for the puts to the same peer that its fence covers. Coarser than
the code, but not kinder: a rank may be delayed for any time between two phases, and a phase's reads
all happen at its end, when most could have been overwritten.

`explore` visits every reachable state and returns their number, or raises Broken with the run that
leads to a wrong read, a slot overwritten before it was read, or a deadlock. With `reduced` it tries
one order of moves that cannot disturb each other (persistent sets): still every run, up to such
exchanges, so that four ranks and several calls can be searched.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple


class Broken(Exception):
    """The protocol is wrong; `trace` is a shortest run that shows it."""

    def __init__(self, what: str, trace: list[str]) -> None:
        super().__init__(what + "\n  " + "\n  ".join(trace))
        self.what, self.trace = what, trace


class Put(NamedTuple):
    to: int
    slot: tuple
    value: tuple


class Notify(NamedTuple):
    """Raise a counter of rank `to`; fenced: not before the puts to it that stand before this."""

    to: int
    counter: tuple
    value: int
    fenced: bool = True


@dataclass
class Phase:
    name: str
    wait: list[tuple[tuple, int]] = field(default_factory=list)  # (own counter, at least)
    read: list[tuple[int, tuple, tuple]] = field(default_factory=list)  # (rank, slot, expected)
    write: list[tuple[tuple, tuple]] = field(default_factory=list)  # own slots, at once
    send: list[Put | Notify] = field(default_factory=list)


class State(NamedTuple):
    pc: tuple[int, ...]
    memory: frozenset  # ((rank, slot), value, read by all who should)
    counters: frozenset  # ((rank, counter), value)
    flying: frozenset  # (source, phase, index)
    repeated: frozenset  # messages delivered once already that may come again


def explore(
    programs: list[list[Phase]],
    *,
    repeats: bool = False,
    reduced: bool = False,
    most_states: int = 3_000_000,
) -> int:
    """Search all runs of one program per rank. repeats: a put may be delivered twice (not with
    `reduced`)."""
    start = State((0,) * len(programs), frozenset(), frozenset(), frozenset(), frozenset())
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        moves = 0
        actors = [*range(len(programs)), *state.flying]
        if reduced:
            actors = _enough(programs, state, actors)
        steps = (step for a in actors for step in _steps(programs, state, a, repeats))
        for label, following, wrong in steps:
            moves += 1
            if wrong:
                raise Broken(wrong, [*_trace(came_from, state), label])
            if following not in came_from:
                came_from[following] = (state, label)
                queue.append(following)
        if not moves and any(pc < len(p) for pc, p in zip(state.pc, programs)):
            waiting = [p[pc].name if pc < len(p) else "done" for pc, p in zip(state.pc, programs)]
            raise Broken(f"deadlock: ranks wait in {waiting}", _trace(came_from, state))
        if len(came_from) > most_states:
            raise MemoryError(f"more than {most_states} states")
    return len(came_from)


def _steps(programs, state, actor, repeats=False):
    """What a rank (its number) or a message under way can do: label, next state, what is wrong."""
    if isinstance(actor, int):
        if _may_step(programs, state, actor):
            yield _rank_step(programs, state, actor)
        return
    source, pc, index = actor
    send = programs[source][pc].send[index]
    if isinstance(send, Notify):
        if send.fenced and _blocked(programs, state, actor):
            return
        counters = dict(state.counters)
        key = (send.to, send.counter)
        counters[key] = max(counters.get(key, 0), send.value)
        raised = frozenset(counters.items())
        yield f"{send} arrives", state._replace(
            counters=raised, flying=state.flying - {actor}), None  # fmt: skip
        return
    memory = dict(state.memory)
    memory[send.to, send.slot] = send.value
    landed = state._replace(memory=frozenset(memory.items()))
    yield f"{send} arrives", landed._replace(
        flying=state.flying - {actor}, repeated=state.repeated - {actor}), None  # fmt: skip
    if repeats and actor not in state.repeated:
        yield f"{send} arrives, to be repeated", landed._replace(
            repeated=state.repeated | {actor}), None  # fmt: skip


def _may_step(programs, state, rank):
    pc = state.pc[rank]
    if pc == len(programs[rank]):
        return False
    counters = dict(state.counters)
    return all(counters.get((rank, name), 0) >= least for name, least in programs[rank][pc].wait)


def _rank_step(programs, state, rank):
    pc = state.pc[rank]
    phase = programs[rank][pc]
    memory = dict(state.memory)
    for owner, slot, expected in phase.read:
        found = memory.get((owner, slot))
        if found != expected:
            label = f"rank {rank} {phase.name}"
            return label, state, f"{label}: slot {slot} of rank {owner} has {found}, not {expected}"
    for slot, value in phase.write:
        memory[rank, slot] = value
    pcs = (*state.pc[:rank], pc + 1, *state.pc[rank + 1 :])
    flying = state.flying | {(rank, pc, i) for i in range(len(phase.send))}
    return f"rank {rank} {phase.name}", state._replace(
        pc=pcs, memory=frozenset(memory.items()), flying=flying), None  # fmt: skip


def _blocked(programs, state, message):
    """Whether a put that the notification's fence covers is still under way."""
    source, pc, index = message
    target = programs[source][pc].send[index].to
    for other in state.flying:
        if other[0] == source and (other[1], other[2]) < (pc, index):
            send = _send_of(programs, other)
            if isinstance(send, Put) and send.to == target:
                return True
    return False


# ---- fewer orders -------------------------------------------------------------------------------
#
# A move may go first alone if nothing that can happen while it is held back reads what it writes or
# writes what it touches: in any run, this move can be exchanged to the front. What can happen is
# found by letting everybody else go as far as waits allow: counters only grow, so there is one
# farthest point. A notification touches no slot; it always goes first.


def _enough(programs, state, actors):
    """One actor whose move may go first alone, or all of `actors`."""
    able = []
    for actor in actors:
        if isinstance(actor, int):
            if not _may_step(programs, state, actor):
                continue
        elif isinstance(_send_of(programs, actor), Notify):
            if _blocked(programs, state, actor) and _send_of(programs, actor).fenced:
                continue
            return [actor]
        able.append(actor)
    for actor in able:
        reads, writes = _touched(programs, state, actor)
        others_read, others_write = _while_held_back(programs, state, actor)
        if not (writes & (others_read | others_write) or reads & others_write):
            return [actor]
    return able


def _send_of(programs, message):
    source, pc, index = message
    return programs[source][pc].send[index]


def _touched(programs, state, actor):
    if isinstance(actor, int):
        phase = programs[actor][state.pc[actor]]
        return {(r, slot) for r, slot, _ in phase.read}, {(actor, slot) for slot, _ in phase.write}
    send = _send_of(programs, actor)
    return set(), {(send.to, send.slot)}


def _while_held_back(programs, state, held):
    """Slots that are read, and written, by all that can happen before `held` moves."""
    reads, writes = set(), set()
    counters, pcs = dict(state.counters), list(state.pc)

    def send(message):
        sent = _send_of(programs, message)
        if isinstance(sent, Put):
            writes.add((sent.to, sent.slot))
        elif not (sent.fenced and _covers(programs, held, message)):
            key = (sent.to, sent.counter)
            counters[key] = max(counters.get(key, 0), sent.value)

    for message in state.flying - {held}:
        send(message)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while rank != held and pcs[rank] < len(program):
                phase = program[pcs[rank]]
                if any(counters.get((rank, name), 0) < least for name, least in phase.wait):
                    break
                reads |= {(r, slot) for r, slot, _ in phase.read}
                writes |= {(rank, slot) for slot, _ in phase.write}
                for index in range(len(phase.send)):
                    send((rank, pcs[rank], index))
                pcs[rank] += 1
                moved = True
    return reads, writes


def _covers(programs, held, message):
    """Whether the fence of a notification waits for `held`, a put."""
    return (
        not isinstance(held, int)
        and held[0] == message[0]
        and held[1:] < message[1:]
        and _send_of(programs, held).to == _send_of(programs, message).to
    )


def _trace(came_from, state):
    steps = []
    while came_from[state] is not None:
        state, label = came_from[state]
        steps.append(label)
    return steps[::-1]


# ---- the protocol -------------------------------------------------------------------------------


def normal(ranks: int, calls: str, bug: str = "") -> list[list[Phase]]:
    """`calls`: "d" dispatch, "p" combine by pull, "s" combine by push, in this order on every rank.

    Every rank has one receive region, and takes it again in the next call: the tightest case.
    bug: one planted fault, or "".
    """
    everyone = range(ranks)
    programs = []
    for me in everyone:
        phases: list[Phase] = []
        peers = [(me + i) % ranks for i in range(1, ranks + 1)]
        for epoch, call in enumerate(calls, 1):
            phases += _CALLS[call](me, peers, epoch, bug)
        programs.append(phases)
    return programs


def _to_all(peers, me, kind, epoch, puts, fenced=True):
    """puts(peer) then a fenced notification, to every peer."""
    return [m for p in peers for m in (*puts(p), Notify(p, (kind, me), epoch, fenced))]


def _wait(peers, kind, epoch):
    return [((kind, p), epoch) for p in peers]


def _dispatch(me, peers, epoch, bug):
    fenced = bug != "rows without a fence"
    wait_rows = [] if bug == "no wait for rows" else _wait(peers, "sent", epoch)
    notices = [] if bug == "rows before notices" else _wait(peers, "notified", epoch)
    return [
        Phase("sends notices", send=_to_all(
            peers, me, "notified", epoch, lambda p: [Put(p, ("notice", me), ("notice", epoch, me))],
            fenced=bug != "notice without a fence")),
        Phase("reads notices and sends rows", wait=notices,
              read=[(me, ("notice", p), ("notice", epoch, p)) for p in peers],
              send=_to_all(peers, me, "sent", epoch,
                           lambda p: [Put(p, ("region", me), ("row", epoch, me))], fenced)),
        Phase("reads its rows", wait=wait_rows,
              read=[(me, ("region", p), ("row", epoch, p)) for p in peers]),
    ]  # fmt: skip


def _combine_pull(me, peers, epoch, bug):
    done = [] if bug == "no wait for readers" else _wait(peers, "read", epoch)
    # Results are written into the region before they are announced.
    return [
        Phase("writes results and says so", write=[(("result",), ("result", epoch, me))],
              send=_to_all(peers, me, "ready", epoch,
                           lambda p: [Put(p, ("return", me), ("return", epoch, me))])),
        Phase("reads the others' results", wait=_wait(peers, "ready", epoch),
              read=[(me, ("return", p), ("return", epoch, p)) for p in peers]
              + [(p, ("result",), ("result", epoch, p)) for p in peers],
              send=_to_all(peers, me, "read", epoch, lambda p: [])),
        Phase("is done with the region", wait=done, write=[(("result",), ("free", epoch, me))]),
    ]  # fmt: skip


def _combine_push(me, peers, epoch, bug):
    return [
        Phase("announces its return region", send=_to_all(
            peers, me, "announced", epoch,
            lambda p: [Put(p, ("return", me), ("return", epoch, me))])),
        Phase("pushes results", wait=_wait(peers, "announced", epoch),
              read=[(me, ("return", p), ("return", epoch, p)) for p in peers],
              send=_to_all(peers, me, "ready", epoch,
                           lambda p: [Put(p, ("region", me), ("result", epoch, me))])),
        Phase("sums", wait=_wait(peers, "ready", epoch),
              read=[(me, ("region", p), ("result", epoch, p)) for p in peers]),
    ]  # fmt: skip


_CALLS = {"d": _dispatch, "p": _combine_pull, "s": _combine_push}


def over_nodes(nodes: int, per_node: int, calls: str, bug: str = "") -> list[list[Phase]]:
    """The forms over nodes: "d" dispatch, "p" combine. Rows for another node go to the rank there
    that has the sender's place, which passes them on; sums of a node come back the same way, into
    the very slots that rows to pass on are kept in."""
    ranks = range(nodes * per_node)
    programs = []
    for me in ranks:
        home = [r for r in ranks if r // per_node == me // per_node]
        rails = [r for r in ranks if r % per_node == me % per_node and r != me]
        phases: list[Phase] = []
        for epoch, call in enumerate(calls, 1):
            form = {"d": _dispatch_over_nodes, "p": _combine_over_nodes}[call]
            phases += form(me, [*ranks], home, rails, epoch, bug)
        programs.append(phases)
    return programs


def _dispatch_over_nodes(me, ranks, home, rails, epoch, bug):
    again = [] if bug != "notices read once more behind rows" else [
        (me, ("notice", p), ("notice", epoch, p)) for p in ranks]  # fmt: skip
    fenced = bug != "rows to pass on without a fence"
    pass_on = [
        m for p in home for s in rails
        for m in (Put(p, ("region", s), ("row", epoch, s)),
                  Notify(p, ("sent", s), epoch, bug != "rows passed on without a fence"))
    ]  # fmt: skip
    return [
        *_dispatch(me, ranks, epoch, "")[:1],
        Phase("reads notices and sends rows",
              wait=[] if bug == "rows before notices" else _wait(ranks, "notified", epoch),
              read=[(me, ("notice", p), ("notice", epoch, p)) for p in ranks],
              send=_to_all(home, me, "sent", epoch,
                           lambda p: [Put(p, ("region", me), ("row", epoch, me))])
              + _to_all(rails, me, "forwarded", epoch,
                        lambda p: [Put(p, ("forward", me), ("forward", epoch, me))], fenced)),
        Phase("passes rows on",
              wait=[] if bug == "no wait for rows to pass on" else _wait(rails, "forwarded", epoch),
              read=[(me, ("forward", s), ("forward", epoch, s)) for s in rails] + again,
              send=pass_on),
        Phase("reads its rows",
              wait=_wait(home if bug == "no wait for rows passed on" else ranks, "sent", epoch),
              read=[(me, ("region", p), ("row", epoch, p)) for p in ranks]),
    ]  # fmt: skip


def _combine_over_nodes(me, ranks, home, rails, epoch, bug):
    results = [(p, ("result",), ("result", epoch, p)) for p in home]
    ready = home if bug == "sums before their owner is ready" else ranks
    return [
        *_combine_pull(me, ranks, epoch, "")[:1],
        Phase("sums for other nodes", wait=_wait(ready, "ready", epoch),
              read=[(me, ("return", p), ("return", epoch, p)) for p in home] + results,
              send=_to_all(rails, me, "partial", epoch,
                           lambda p: [Put(p, ("forward", me), ("sum", epoch, me))],
                           bug != "sums without a fence")),
        Phase("sums its tokens",
              wait=[] if bug == "no wait for sums" else _wait(rails, "partial", epoch),
              read=[(me, ("forward", s), ("sum", epoch, s)) for s in rails] + results,
              send=_to_all(ranks, me, "read", epoch, lambda p: [])),
        Phase("is done with the region",
              wait=[] if bug == "no wait for readers" else _wait(ranks, "read", epoch),
              write=[(("result",), ("free", epoch, me))]),
    ]  # fmt: skip


def low_latency(
    ranks: int, calls: int, late: list[int], *, depth: int, must_be_received, copy, combine=True,
    bug: str = "",
) -> list[list[Phase]]:  # fmt: skip
    """Dispatch and combine in fixed slots. late[r]: how many calls rank r's receive hooks lag
    behind its sends, as far as `must_be_received` lets them."""
    programs = []
    for me in range(ranks):
        peers = [(me + i) % ranks for i in range(1, ranks + 1)]
        fenced = bug != "count without a fence"
        phases: list[Phase] = []
        received = 0

        def receive(call, me=me, peers=peers, phases=phases):
            slot = copy(call)
            back = [] if not combine else _to_all(
                peers, me, "returned", call,
                lambda p: [Put(p, ("back", slot, me), ("result", call, me))])  # fmt: skip
            rows = [(me, ("low", slot, p), ("row", call, p)) for p in peers]
            results = [(me, ("back", slot, p), ("result", call, p)) for p in peers]
            wait = _wait(peers, "low sent", call)
            phases.append(Phase(f"receives {call}", wait=wait, read=rows, send=back))
            if combine:
                wait = _wait(peers, "returned", call)
                phases.append(Phase(f"reduces {call}", wait=wait, read=results))

        for call in range(1, calls + 1):
            needed = must_be_received(call) - (bug == "one call too many under way")
            while received < max(needed, call - 1 - late[me]):
                received += 1
                receive(received)
            phases.append(Phase(f"sends {call}", send=_to_all(
                peers, me, "low sent", call,
                lambda p, call=call, me=me: [Put(p, ("low", copy(call), me), ("row", call, me))],
                fenced)))  # fmt: skip
        while received < calls:
            received += 1
            receive(received)
        programs.append(phases)
    return programs
