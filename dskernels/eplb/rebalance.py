"""A placement that is never worse than the published greedy one.

Letters: L layers, E experts, P slots, G GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from . import search
from .greedy import groups_to_nodes, place
from .placement import Placement


class _Machine(NamedTuple):
    room: np.ndarray  # int [G]: usable slots, 0 on a dead GPU
    slots: np.ndarray  # int [G]: slots that exist
    groups: int
    nodes: int


def rebalance(
    weight: torch.Tensor,
    num_replicas: int | None = None,
    num_groups: int = 1,
    num_nodes: int = 1,
    num_gpus: int | None = None,
    *,
    slots: Sequence[int] | None = None,
    alive: Sequence[bool] | None = None,
    previous: Placement | None = None,
    migration_cost: float = 0.0,
    equal_shares: bool = False,
) -> Placement:
    """Place replicas of E experts with loads weight [L, E] so that the fullest GPU has little load.

    num_replicas, num_gpus  P and G with equally many slots on every GPU; or
    slots           slots of every GPU, [G], which may differ
    num_groups, num_nodes  as `greedy`: whole groups on a node when divisible. Ignored (one node)
                    when a node has fewer usable slots than experts, or slots that differ between
                    nodes.
    alive           one bool a GPU; dead GPUs get nothing (their slots are -1)
    previous        the placement in use: GPUs that do the same are renamed, and slots kept, so that
                    few replicas move
    migration_cost  load of the fullest GPU that one fetched replica is worth: of the candidates
                    (the old placement, improvements on it, a new one) the one with the least
                    max_load + migration_cost * moves is taken
    equal_shares    every replica takes the same part of its expert's traffic, for users of
                    (phy2log, log2phy, logcnt) alone

    No expert is twice on a GPU as long as the GPU has no more slots than there are experts. With
    migration_cost 0, all GPUs alive and equal slots, max_load is at most that of `greedy`: merging
    two replicas on one GPU into one with both shares keeps the loads, and shares are only moved
    to relieve the fullest GPU. (With equal_shares the greedy placement itself, double replicas and
    all, is kept where the search does not reach its load.)
    """
    loads, machine = _checked(weight, num_replicas, num_groups, num_nodes, num_gpus, slots, alive)
    old = _previous(previous, loads.shape, machine)
    rows = []
    for layer, load in enumerate(loads):
        before = None if old is None else old[layer]
        candidates = list(_candidates(load, machine, before, migration_cost, equal_shares))
        rows.append(
            min(
                (_number(c, load, machine, before) for c in candidates),
                key=lambda row: row[2] + migration_cost * row[3],
            )
        )
    return _placement(rows, loads.shape[1], machine)


def _candidates(load, machine, before, migration_cost, equal_shares):
    """(held, share) pairs, the ones that cannot lose first."""
    lower = load.sum() / max((machine.room > 0).sum(), 1) * (1 + search.CLOSE)
    starts = []
    for node, experts in _nodes(load, machine):
        room, own = machine.room[node], load[experts]
        held = _greedy_held(own, room)
        starts.append((node, experts, held))
    whole = np.zeros((len(machine.room), len(load)), np.int64)
    for node, experts, held in starts:
        whole[np.ix_(node, experts)] = held

    if before is not None:
        yield from _from_previous(load, machine, before, migration_cost, equal_shares)
    if equal_shares:
        yield whole, search.equal_share(whole)
    else:
        merged = _merge(whole, starts, load, machine)
        yield merged
        if gpu_max(merged[1], load) <= lower:
            return
    climbed = np.zeros_like(whole)
    for node, experts, held in starts:
        own, room = load[experts], machine.room[node]
        goal = own.sum() / max((room > 0).sum(), 1) * (1 + search.CLOSE)
        tries = [search.climb(search.repair(start, own, room), own, goal=goal)
                 for start in (held, np.zeros_like(held))]  # fmt: skip
        best = min(tries, key=lambda t: search.gpu_load(search.equal_share(t), own).max())
        climbed[np.ix_(node, experts)] = best
    yield climbed, _shares(climbed, load, equal_shares)


def gpu_max(share: np.ndarray, load: np.ndarray) -> float:
    return float(search.gpu_load(share, load).max())


def _shares(held, load, equal: bool) -> np.ndarray:
    share = search.equal_share(held)
    return share if equal else search.balance(held, share, load)


def _nodes(load: np.ndarray, machine: _Machine):
    """(GPUs, experts) that are placed on their own."""
    per_node = len(machine.room) // machine.nodes
    if machine.nodes > 1:
        experts = groups_to_nodes(load.astype(np.float32), machine.groups, machine.nodes)
        for node, own in enumerate(experts):
            yield np.arange(node * per_node, (node + 1) * per_node), own
    else:
        yield np.arange(len(machine.room)), np.arange(len(load))


def _greedy_held(load: np.ndarray, room: np.ndarray) -> np.ndarray:
    """The published algorithm's placement over the GPUs alive, or where it does not apply (unequal
    slots) the repair of an empty one."""
    held = np.zeros((len(room), len(load)), np.int64)
    up = np.nonzero(room)[0]
    if len(set(room[up].tolist())) > 1:
        return search.repair(held, load, room)
    slots, _ = place(load.astype(np.float32), int(room.sum()), 1, 1, len(up))
    np.add.at(held, (up[np.arange(len(slots)) // room[up[0]]], slots), 1)
    return held


def _merge(whole, starts, load, machine):
    """The greedy placement with double replicas merged: the same loads, then better shares."""
    share = search.equal_share(whole)
    held = np.zeros_like(whole)
    for node, experts, start in starts:
        held[np.ix_(node, experts)] = search.repair(start, load[experts], machine.room[node])
    # A new replica in a freed slot starts with share 0; balance() uses it as it likes.
    return held, search.balance(held, share, load)


def _from_previous(load, machine, before, migration_cost, equal_shares):
    held = np.zeros((len(machine.room), len(load)), np.int64)
    gpu = np.repeat(np.arange(len(machine.slots)), machine.slots)
    used = (before >= 0) & (machine.room[gpu] > 0)
    np.add.at(held, (gpu[used], before[used]), 1)
    for node, experts in _nodes(load, machine):
        if held[np.ix_(node, experts)].sum() != held[node].sum():
            return  # a group changed its node: the old placement breaks the rule
    for improve in (False, True):
        new = np.zeros_like(held)
        for node, experts in _nodes(load, machine):
            own = load[experts]
            part = search.repair(held[np.ix_(node, experts)], own, machine.room[node])
            if improve:
                part = search.climb(part, own, cost=migration_cost)
            new[np.ix_(node, experts)] = part
        yield new, _shares(new, load, equal_shares)


def _number(candidate, load, machine: _Machine, before):
    """Slots of a placement: (expert of each slot, share of each slot, max load, moves)."""
    held, share = candidate
    old = None if before is None else _old_held(before, held.shape, machine)
    if old is not None:
        order = _rename(held, old, machine)
        held, share = held[order], share[order]
    slots = np.full(int(machine.slots.sum()), -1, np.int64)
    parts = np.zeros(len(slots))
    begin = np.cumsum(machine.slots) - machine.slots
    for gpu in np.nonzero(machine.room)[0]:
        here = slice(begin[gpu], begin[gpu] + machine.slots[gpu])
        experts = np.repeat(np.arange(len(load)), held[gpu])
        if before is not None:
            experts = _keep_places(experts, before[here])
        slots[here] = experts
        parts[here] = share[gpu, experts] / held[gpu, experts]
    moves = 0 if old is None else int(np.maximum(held - old, 0).sum())
    return slots, parts, gpu_max(share, load), moves


def _old_held(before: np.ndarray, shape, machine: _Machine) -> np.ndarray:
    old = np.zeros(shape, np.int64)
    gpu = np.repeat(np.arange(len(machine.slots)), machine.slots)
    np.add.at(old, (gpu[before >= 0], before[before >= 0]), 1)
    return old


def _rename(held: np.ndarray, old: np.ndarray, machine: _Machine) -> np.ndarray:
    """Which GPU's set each GPU takes over: those of one node with equal room are alike."""
    order = np.arange(len(held))
    per_node = len(held) // machine.nodes
    node = np.arange(len(held)) // per_node
    for kind in {*zip(node.tolist(), machine.room.tolist())}:
        alike = np.nonzero((node == kind[0]) & (machine.room == kind[1]))[0]
        if kind[1] and len(alike) > 1:
            common = np.minimum(old[alike][:, None], held[alike][None]).sum(2)
            order[alike] = alike[search.assign(common)]
    return order


def _keep_places(experts: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The experts of a GPU, each in its old slot where it has one."""
    result = np.full(len(experts), -1, np.int64)
    left = experts.tolist()
    for place_, expert in enumerate(before.tolist()):
        if expert in left:
            result[place_] = expert
            left.remove(expert)
    result[result < 0] = left
    return result


def _placement(rows, experts: int, machine: _Machine) -> Placement:
    phy2log = np.stack([row[0] for row in rows])
    counts = np.stack([np.bincount(row[row >= 0], minlength=experts) for row in phy2log])
    inverse = np.full((*counts.shape, counts.max()), -1, np.int64)
    for layer, row in enumerate(phy2log):
        seen = np.zeros(experts, np.int64)
        for slot, expert in enumerate(row.tolist()):
            if expert >= 0:
                inverse[layer, expert, seen[expert]] = slot
                seen[expert] += 1
    return Placement(
        phy2log=torch.from_numpy(phy2log),
        log2phy=torch.from_numpy(inverse),
        logcnt=torch.from_numpy(counts),
        share=torch.from_numpy(np.stack([row[1] for row in rows])),
        gpu=torch.from_numpy(np.repeat(np.arange(len(machine.slots)), machine.slots)),
        max_load=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        moves=torch.tensor([row[3] for row in rows]),
    )


def _checked(weight, num_replicas, num_groups, num_nodes, num_gpus, slots, alive):
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight: expected loads [layers, experts], got {tuple(weight.shape)}")
    loads = weight.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError("weight: expected finite loads >= 0, got some that are not")
    if slots is None:
        if num_replicas is None or num_gpus is None:
            raise ValueError("slots: expected it, or num_replicas and num_gpus, got neither")
        if num_gpus < 1 or num_replicas % num_gpus:
            raise ValueError(
                f"num_replicas: expected a multiple of {num_gpus} GPUs, got {num_replicas}"
            )
        slots = [num_replicas // num_gpus] * num_gpus
    elif num_replicas is not None or num_gpus is not None:
        raise ValueError("slots: expected it or num_replicas and num_gpus, got both")
    if not len(slots) or min(slots) < 0:
        raise ValueError(f"slots: expected numbers >= 0, one a GPU, got {list(slots)}")
    if alive is not None and len(alive) != len(slots):
        raise ValueError(f"alive: expected {len(slots)} entries, got {len(alive)}")
    exist = np.array(slots, np.int64)
    room = exist if alive is None else np.where(alive, exist, 0)
    experts = loads.shape[1]
    if room.sum() < experts:
        raise ValueError(
            f"slots: expected at least {experts} on living GPUs, one for each expert, got "
            f"{int(room.sum())}"
        )
    if num_groups < 1 or num_nodes < 1:
        raise ValueError(
            f"num_groups, num_nodes: expected positive numbers, got {num_groups}, {num_nodes}"
        )
    nodes = num_nodes if num_groups % num_nodes == 0 else 1
    if nodes > 1 and (experts % num_groups or len(exist) % nodes):
        raise ValueError(
            f"num_groups, num_nodes: expected divisors of {experts} experts and {len(exist)} GPUs, "
            f"got {num_groups} groups and {num_nodes} nodes"
        )
    if nodes > 1 and (room.reshape(nodes, -1).sum(1) < experts // nodes).any():
        nodes = 1
    return loads, _Machine(room, exist, num_groups if nodes > 1 else 1, nodes)


def _previous(previous: Placement | None, shape, machine: _Machine):
    if previous is None:
        return None
    expected = (shape[0], int(machine.slots.sum()))
    if tuple(previous.phy2log.shape) != expected or previous.logcnt.shape[1] != shape[1]:
        raise ValueError(
            f"previous: expected {expected} slots of {shape[1]} experts, got "
            f"{tuple(previous.phy2log.shape)} of {previous.logcnt.shape[1]}"
        )
    return previous.phy2log.numpy()
