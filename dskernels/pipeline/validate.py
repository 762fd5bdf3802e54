"""Prove that a schedule can be trusted: complete, causal, paired, free of deadlock.

`problems` takes ANY list, also one edited by hand or imported, and returns every violation found
in words; `validate` raises on the first batch. Five proofs, each linear in the actions:

    1. form      every action sits on the rank, direction and stage that the placement gives it;
    2. complete  each (stage, micro-batch) has one F, and one B or one Bi with one W;
    3. causal    on a rank F comes before its backward, Bi before its W; over ranks the lists can
                 be run to their end with each action waiting for its inputs (no circular wait);
    4. paired    each transfer between ranks has one SEND after its producer and one RECV before
                 its consumer, and on every channel (sender -> receiver) both lists order the
                 transfers alike;
    5. blocking  with rendezvous P2P (a SEND or RECV holds its rank until the peer arrives) all
                 lists still run to their end. Any runtime that blocks less is then safe too.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from .actions import RECVS, SENDS, Action, Op, Schedule, ScheduleError
from .lower import needs, transfer_of

_MAX_REPORTED = 20


class _Report:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.lines) < _MAX_REPORTED:
            self.lines.append(text)


def problems(schedule: Schedule) -> list[str]:
    """Every rule that the schedule breaks, in words; empty if it is sound.

    A compute-only list is checked for form, completeness and causality; one with communication
    for all five. At most 20 violations are spelled out.
    """
    report = _Report()
    _check_form(schedule, report)
    if report.count:
        return report.lines  # the later proofs index by rank, stage and micro-batch
    _check_complete(schedule, report)
    _check_rank_order(schedule, report)
    if report.count:
        return report.lines
    if schedule.has_comms:
        _check_pairing(schedule, report)
        if not report.count:
            _check_blocking(schedule, report)
    else:
        _check_causal(schedule, report)
    return report.lines


def validate(schedule: Schedule) -> None:
    """Raise ScheduleError listing the violations, if there are any."""
    found = problems(schedule)
    if found:
        raise ScheduleError(f"schedule {schedule.name!r} is not sound:\n  " + "\n  ".join(found))


def _at(rank: int, index: int, action: Action) -> str:
    return f"rank {rank}, action {index} ({action})"


# --- 1. form --------------------------------------------------------------------------------------


def _check_form(schedule: Schedule, report: _Report) -> None:
    if len(schedule.actions) != schedule.num_ranks:
        report.add(f"{len(schedule.actions)} lists for {schedule.num_ranks} ranks")
        return
    for direction, place in enumerate(schedule.placement):
        if len(place) != schedule.num_stages or not all(0 <= r < schedule.num_ranks for r in place):
            report.add(
                f"placement of direction {direction} must give {schedule.num_stages} stages a "
                f"rank in 0..{schedule.num_ranks - 1}; got {place}"
            )
            return
    for rank, acts in enumerate(schedule.actions):
        for index, action in enumerate(acts):
            for atom in (action, *action.parts):
                fault = _form_fault(schedule, rank, atom)
                if fault:
                    report.add(f"{_at(rank, index, action)}: {fault}")
                    break


def _form_fault(schedule: Schedule, rank: int, atom: Action) -> str | None:
    if atom.rank != rank:
        return f"says it belongs to rank {atom.rank}"
    if not 0 <= atom.stage < schedule.num_stages:
        return f"stage {atom.stage} is not in 0..{schedule.num_stages - 1}"
    if not 0 <= atom.microbatch < schedule.num_microbatches:
        return f"micro-batch {atom.microbatch} is not in 0..{schedule.num_microbatches - 1}"
    direction = schedule.direction_of(atom.microbatch)
    if atom.direction != direction:
        return f"micro-batch {atom.microbatch} has direction {direction}, not {atom.direction}"
    home = schedule.placement[direction][atom.stage]
    if home != rank:
        return f"stage {atom.stage} of direction {direction} lives on rank {home}"
    if (atom.op is Op.FB) != bool(atom.parts):
        return "an overlapped pair has two parts, and only it has parts"
    if atom.parts and not (
        len(atom.parts) == 2 and atom.parts[0].op is Op.F and atom.parts[1].op in (Op.B, Op.BI)
    ):
        return "an overlapped pair is one F, then one B"
    return None


# --- 2. complete ----------------------------------------------------------------------------------


def _check_complete(schedule: Schedule, report: _Report) -> None:
    counts: Counter[tuple[Op, int, int]] = Counter()
    for acts in schedule.actions:
        for action in acts:
            for atom in action.atoms:
                counts[atom.op, atom.stage, atom.microbatch] += 1
    for stage in range(schedule.num_stages):
        for mb in range(schedule.num_microbatches):
            f, b, bi, w = (counts[op, stage, mb] for op in (Op.F, Op.B, Op.BI, Op.W))
            if f != 1:
                report.add(f"stage {stage} micro-batch {mb}: F happens {f} times, must be once")
            if schedule.forward_only:
                if b + bi + w:
                    report.add(f"stage {stage} micro-batch {mb}: backward in a forward-only list")
            elif (b, bi, w) not in ((1, 0, 0), (0, 1, 1)):
                report.add(
                    f"stage {stage} micro-batch {mb}: needs one B, or one I and one W; "
                    f"got B {b}, I {bi}, W {w} times"
                )


# --- 3. causal ------------------------------------------------------------------------------------


def _check_rank_order(schedule: Schedule, report: _Report) -> None:
    """F before backward, Bi before W, on each rank."""
    for rank, acts in enumerate(schedule.actions):
        done: set[tuple[Op, int, int]] = set()
        for index, action in enumerate(acts):
            for atom in action.atoms:
                key = (atom.stage, atom.microbatch)
                if atom.op in (Op.B, Op.BI) and (Op.F, *key) not in done:
                    report.add(f"{_at(rank, index, action)}: its forward has not run")
                if atom.op is Op.W and (Op.BI, *key) not in done:
                    report.add(f"{_at(rank, index, action)}: its input gradient has not run")
            # A pair's halves run together: neither may lean on the other.
            done.update((atom.op, atom.stage, atom.microbatch) for atom in action.atoms)


def _check_causal(schedule: Schedule, report: _Report) -> None:
    """Run the lists with every action waiting for its inputs from other stages."""
    done: set[tuple[bool, int, int]] = set()
    waiting: dict[tuple[bool, int, int], list[int]] = defaultdict(list)
    cursor = [0] * schedule.num_ranks
    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        acts = schedule.actions[rank]
        while cursor[rank] < len(acts):
            action = acts[cursor[rank]]
            missing = _missing_input(action, schedule, done)
            if missing:
                waiting[missing].append(rank)
                break
            cursor[rank] += 1
            for atom in action.atoms:
                if atom.op is not Op.W:
                    key = (atom.op is not Op.F, atom.stage, atom.microbatch)
                    done.add(key)
                    runnable.extend(waiting.pop(key, ()))
    stuck = [r for r in range(schedule.num_ranks) if cursor[r] < len(schedule.actions[r])]
    for rank in stuck:
        action = schedule.actions[rank][cursor[rank]]
        missing = _missing_input(action, schedule, done)
        if missing:
            backward, stage, mb = missing
            what = "gradient" if backward else "activation"
            report.add(
                f"{_at(rank, cursor[rank], action)}: circular wait for the {what} of "
                f"stage {stage}, micro-batch {mb}, held by rank {schedule.rank_of(stage, mb)}"
            )


def _missing_input(
    action: Action, schedule: Schedule, done: set[tuple[bool, int, int]]
) -> tuple[bool, int, int] | None:
    for atom in action.atoms:
        need = needs(atom, schedule.num_stages)
        if need is not None and (*need, atom.microbatch) not in done:
            return (*need, atom.microbatch)
    return None


# --- 4. paired ------------------------------------------------------------------------------------

_Channel = tuple[int, int]  # (sending rank, receiving rank)
_Message = tuple[Op, int, int]  # (SEND_F or SEND_B, sending stage, micro-batch)


def _message(action: Action) -> _Message:
    """A transfer's name, the same seen from both ends."""
    if action.op is Op.RECV_F:
        return Op.SEND_F, action.stage - 1, action.microbatch
    if action.op is Op.RECV_B:
        return Op.SEND_B, action.stage + 1, action.microbatch
    return action.op, action.stage, action.microbatch


def channel(action: Action, schedule: Schedule) -> _Channel:
    """(sender, receiver) of a SEND or RECV."""
    toward_next = action.op in (Op.SEND_F, Op.RECV_B)
    peer_stage = action.stage + (1 if toward_next else -1)
    peer = schedule.placement[action.direction][peer_stage]
    return (action.rank, peer) if action.op in SENDS else (peer, action.rank)


def _comm_fault(action: Action, schedule: Schedule) -> str | None:
    toward_next = action.op in (Op.SEND_F, Op.RECV_B)
    peer_stage = action.stage + (1 if toward_next else -1)
    if not 0 <= peer_stage < schedule.num_stages:
        return f"there is no stage {peer_stage} to exchange with"
    if schedule.placement[action.direction][peer_stage] == action.rank:
        return f"stage {peer_stage} lives on the same rank: nothing to transfer"
    return None


def _check_pairing(schedule: Schedule, report: _Report) -> None:
    sent: dict[_Channel, list[_Message]] = defaultdict(list)
    received: dict[_Channel, list[_Message]] = defaultdict(list)
    for rank, acts in enumerate(schedule.actions):
        _walk_rank_comms(schedule, rank, acts, sent, received, report)
    for pair in sorted(set(sent) | set(received)):
        src, dst = pair
        if sent[pair] == received[pair]:
            continue
        for i, (s, r) in enumerate(zip(sent[pair], received[pair])):
            if s != r:
                report.add(
                    f"channel {src}->{dst}: transfer {i} is sent as {_name(s)} but received as "
                    f"{_name(r)}: both ranks must order them alike"
                )
                break
        else:
            report.add(
                f"channel {src}->{dst}: {len(sent[pair])} sends but {len(received[pair])} receives"
            )


def _name(message: _Message) -> str:
    op, stage, mb = message
    return f"{stage}{op.value}{mb}"


def _walk_rank_comms(
    schedule: Schedule,
    rank: int,
    acts: tuple[Action, ...],
    sent: dict[_Channel, list[_Message]],
    received: dict[_Channel, list[_Message]],
    report: _Report,
) -> None:
    """One rank: a SEND follows its producer, a RECV precedes its consumer, none is missing."""
    produced: set[_Message] = set()  # transfers whose data exist here
    arrived: set[tuple[Op, int, int]] = set()  # RECVs posted so far
    pending: set[_Message] = set()  # produced, must still be sent
    for index, action in enumerate(acts):
        if action.op in SENDS or action.op in RECVS:
            fault = _comm_fault(action, schedule)
            if fault:
                report.add(f"{_at(rank, index, action)}: {fault}")
                continue
            message = _message(action)
            if action.op in SENDS:
                if message not in produced:
                    report.add(f"{_at(rank, index, action)}: sends before it is computed")
                elif message not in pending:
                    report.add(f"{_at(rank, index, action)}: sent twice")
                pending.discard(message)
                sent[channel(action, schedule)].append(message)
            else:
                key = (action.op, action.stage, action.microbatch)
                if key in arrived:
                    report.add(f"{_at(rank, index, action)}: received twice")
                arrived.add(key)
                received[channel(action, schedule)].append(message)
            continue
        for atom in action.atoms:
            need = needs(atom, schedule.num_stages)
            if need is not None:
                backward, stage = need
                remote = schedule.placement[atom.direction][stage] != rank
                op = Op.RECV_B if backward else Op.RECV_F
                if remote and (op, atom.stage, atom.microbatch) not in arrived:
                    report.add(f"{_at(rank, index, action)}: no {op.value} before it")
            transfer = transfer_of(atom, schedule)
            if transfer is not None:
                produced.add(_message(transfer[0]))
                pending.add(_message(transfer[0]))
    for message in sorted(pending):
        report.add(f"rank {rank}: never sends {_name(message)}")


# --- 5. blocking ----------------------------------------------------------------------------------


def _local_input_missing(
    action: Action, schedule: Schedule, done: set[tuple[bool, int, int]]
) -> bool:
    """Inputs handed over on the rank itself (the turn of a V, the loss) must have been made."""
    for atom in action.atoms:
        need = needs(atom, schedule.num_stages)
        if need is None:
            continue
        backward, stage = need
        local = schedule.placement[atom.direction][stage] == action.rank
        if local and (backward, stage, atom.microbatch) not in done:
            return True
    return False


def _check_blocking(schedule: Schedule, report: _Report) -> None:
    """Execute with rendezvous transfers: each holds both ranks until the other one is there."""
    cursor = [0] * schedule.num_ranks
    done: set[tuple[bool, int, int]] = set()
    at_transfer: dict[tuple[_Channel, _Message, bool], int] = {}
    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        acts = schedule.actions[rank]
        while cursor[rank] < len(acts):
            action = acts[cursor[rank]]
            if action.op in SENDS or action.op in RECVS:
                sending = action.op in SENDS
                meeting = (channel(action, schedule), _message(action))
                peer = at_transfer.pop((*meeting, not sending), None)
                if peer is None:
                    at_transfer[(*meeting, sending)] = rank
                    break
                cursor[peer] += 1
                runnable.append(peer)
            elif _local_input_missing(action, schedule, done):
                break  # nobody else can make it: reported below
            else:
                for atom in action.atoms:
                    if atom.op is not Op.W:
                        done.add((atom.op is not Op.F, atom.stage, atom.microbatch))
            cursor[rank] += 1
    for rank, acts in enumerate(schedule.actions):
        if cursor[rank] == len(acts):
            continue
        action = acts[cursor[rank]]
        if action.op in SENDS or action.op in RECVS:
            src, dst = channel(action, schedule)
            peer = dst if action.op in SENDS else src
            there = schedule.actions[peer]
            at = cursor[peer]
            doing = f"stands at action {at} ({there[at]})" if at < len(there) else "has ended"
            report.add(
                f"{_at(rank, cursor[rank], action)}: deadlock under blocking P2P; it waits for "
                f"rank {peer}, which {doing}"
            )
        else:
            report.add(
                f"{_at(rank, cursor[rank], action)}: its input from this same rank comes later"
            )
