"""Add point-to-point actions to a compute-only schedule, in an order that cannot deadlock.

Each rank runs its list from the top. If a SEND may block until its peer reaches the matching RECV
(a rendezvous, as on one NCCL stream), lists that look harmless can wait for each other in a
circle. So all sends and receives are placed along ONE global order: the order of time in a run
with unit costs. Every rank's list is a slice of that order, and each transfer appears in both
lists at the same point of it; whoever executes the lists can then follow the global order itself,
however slow or blocking the transfers are. `validate` proves it again for each list.
"""

from __future__ import annotations

from .actions import COMPUTE, Action, Op, Schedule, ScheduleError

# Any positive costs give a correct order; these are close to what the ops cost, so that a receive
# is posted about when its data comes.
_UNIT_COST = {Op.F: 1, Op.BI: 1, Op.W: 1, Op.B: 2, Op.FB: 3}


def needs(action: Action, num_stages: int) -> tuple[bool, int] | None:
    """What an elementary compute action waits for from another stage, as (is_backward, stage).

    A backward of the last stage waits for its own forward; W for its own Bi, which its rank's
    list orders, so neither W nor the first forward waits for anybody.
    """
    if action.op is Op.F:
        return (False, action.stage - 1) if action.stage else None
    if action.op in (Op.B, Op.BI):
        if action.stage == num_stages - 1:
            return (False, action.stage)
        return (True, action.stage + 1)
    return None


def _unit_times(schedule: Schedule) -> list[tuple[int, int, int, int]]:
    """Starts and ends of all compute actions as sorted (time, 1 if start else 0, rank, index)."""
    stages, lists = schedule.num_stages, schedule.actions
    done: dict[tuple[bool, int, int], int] = {}
    waiting: dict[tuple[bool, int, int], list[int]] = {}
    clock = [0] * schedule.num_ranks
    cursor = [0] * schedule.num_ranks
    events = []
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        acts = lists[rank]
        while cursor[rank] < len(acts):
            action = acts[cursor[rank]]
            start = clock[rank]
            blocked = None
            for atom in action.atoms:
                need = needs(atom, stages)
                if need is None:
                    continue
                key = (*need, atom.microbatch)
                if key not in done:
                    blocked = key
                    break
                start = max(start, done[key])
            if blocked is not None:
                waiting.setdefault(blocked, []).append(rank)
                break
            end = start + _UNIT_COST[action.op]
            clock[rank] = end
            events.append((start, 1, rank, cursor[rank]))
            events.append((end, 0, rank, cursor[rank]))
            cursor[rank] += 1
            for atom in action.atoms:
                if atom.op is not Op.W:
                    key = (atom.op is not Op.F, atom.stage, atom.microbatch)
                    done[key] = end
                    runnable.extend(waiting.pop(key, ()))
    for rank, acts in enumerate(lists):
        if cursor[rank] < len(acts):
            raise ScheduleError(
                f"schedule {schedule.name!r} cannot run: rank {rank} never gets the input of its "
                f"action {cursor[rank]}, {acts[cursor[rank]]}"
            )
    events.sort()
    return events


def transfer_of(action: Action, schedule: Schedule) -> tuple[Action, Action] | None:
    """(send, receive) that follows an elementary compute action, or None if it stays local."""
    if action.op is Op.F and action.stage + 1 < schedule.num_stages:
        peer_stage, ops = action.stage + 1, (Op.SEND_F, Op.RECV_F)
    elif action.op in (Op.B, Op.BI) and action.stage > 0:
        peer_stage, ops = action.stage - 1, (Op.SEND_B, Op.RECV_B)
    else:
        return None
    peer = schedule.placement[action.direction][peer_stage]
    if peer == action.rank:
        return None
    send = action._replace(op=ops[0])
    return send, Action(peer, ops[1], peer_stage, action.microbatch, action.direction)


def add_comms(schedule: Schedule) -> Schedule:
    """The schedule with SEND and RECV actions. One that has them already is returned as it is.

    Raises ScheduleError if the compute actions can never run in this order.
    """
    if schedule.has_comms:
        return schedule
    for acts in schedule.actions:
        for action in acts:
            if action.op not in COMPUTE:
                raise ScheduleError(f"not a compute action: {action}")
    lists: list[list[Action]] = [[] for _ in range(schedule.num_ranks)]
    for _, is_start, rank, index in _unit_times(schedule):
        action = schedule.actions[rank][index]
        if is_start:
            lists[rank].append(action)
            continue
        for atom in action.atoms:
            transfer = transfer_of(atom, schedule)
            if transfer is not None:
                send, recv = transfer
                lists[rank].append(send)
                lists[recv.rank].append(recv)
    return schedule.with_actions(lists)
