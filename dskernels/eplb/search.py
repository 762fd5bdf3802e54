"""Placement of one node's experts: repair, hill climbing, and traffic shares by flow.

Letters: G GPUs, E experts. `held` int [G, E] counts replicas on a GPU, `load` fp64 [E] is the
experts' load, `room` int [G] the GPUs' slots, `share` fp64 [G, E] the part of an expert's traffic
that a GPU takes.
"""

from __future__ import annotations

import numpy as np

MOST_STEPS = 500  # of hill climbing; each one lowers the load of the fullest GPU
CLOSE = 1e-3  # a placement this close to the mean load is not searched further


def equal_share(held: np.ndarray) -> np.ndarray:
    return held / held.sum(0)


def gpu_load(share: np.ndarray, load: np.ndarray) -> np.ndarray:
    return share @ load


def repair(held: np.ndarray, load: np.ndarray, room: np.ndarray) -> np.ndarray:
    """The nearest placement that fills every slot, holds every expert, and has no expert twice on
    a GPU unless the GPU has more slots than there are experts."""
    held = np.minimum(held, 1) * (room > 0)[:, None]
    for gpu in np.nonzero(held.sum(1) > room)[0]:
        here = np.nonzero(held[gpu])[0]
        # Experts that live elsewhere go first, then light ones.
        order = here[np.lexsort((load[here], held[:, here].sum(0) == 1))]
        held[gpu, order[: len(here) - room[gpu]]] = 0
    missing = np.nonzero(held.sum(0) == 0)[0]
    for expert in missing[np.argsort(-load[missing], kind="stable")]:
        _place(held, load, room, expert)
    while True:
        free = np.nonzero(held.sum(1) < room)[0]
        if not len(free):
            return held
        _fill(held, load, free[0])


def _place(held: np.ndarray, load: np.ndarray, room: np.ndarray, expert: int) -> None:
    """Give an expert that is nowhere a slot: a free one, or a spare replica's."""
    count = np.maximum(held.sum(0), 1)
    total = held @ (load / count)
    free = held.sum(1) < room
    if free.any():
        held[np.where(free, total, np.inf).argmin(), expert] = 1
        return
    gpu, spare = np.nonzero((held > 0) & (count > 1))
    gone = load[spare] / count[spare]
    best = (total[gpu] - gone + load[expert]).argmin()
    held[gpu[best], spare[best]] -= 1
    held[gpu[best], expert] = 1


def _fill(held: np.ndarray, load: np.ndarray, gpu: int) -> None:
    """Use a free slot for the expert whose further replica lowers the fullest GPU most."""
    count = np.maximum(held.sum(0), 1)
    total = held @ (load / count)
    absent = np.nonzero(held[gpu] == 0)[0]
    options = absent if len(absent) else np.arange(len(load))
    options = options[held[:, options].sum(0) > 0]
    lighter = load[options] / (count[options] + 1) - load[options] / count[options]
    after = total[None] + held[:, options].T * lighter[:, None]
    after[:, gpu] += load[options] / (count[options] + 1)
    held[gpu, options[_best(after)]] += 1


def _best(after: np.ndarray) -> int:
    """The row with the least maximum; among equals the least sum of squares."""
    highest = after.max(1)
    ties = np.nonzero(highest <= highest.min() * (1 + 1e-12))[0]
    return int(ties[(after[ties] ** 2).sum(1).argmin()])


def climb(held: np.ndarray, load: np.ndarray, cost: float = 0.0, goal: float = 0.0) -> np.ndarray:
    """Change one slot, or swap two, as long as that lowers the fullest GPU under equal shares.

    cost: the least gain, in load, that a fetched replica must bring. Stops at or below `goal`.
    """
    held = held.copy()
    for _ in range(MOST_STEPS):
        total = gpu_load(equal_share(held), load)
        if total.max() <= goal:
            break
        moves = [m for m in (_replacements(held, load, total), _swaps(held, load, total)) if m]
        step = None
        for after, apply, fetched in moves:
            row = _best(after)
            gain = total.max() - after[row].max() - cost * fetched
            flatter = (total**2).sum() - (after[row] ** 2).sum()
            better = gain > 1e-12 * total.max() or (
                cost == 0 and gain > -1e-12 * total.max() and flatter > 1e-9 * (total**2).sum()
            )
            if better and (step is None or (gain, flatter) > step[0]):
                step = (gain, flatter), apply, row
        if step is None:
            break
        step[1](held, step[2])
    return held


def _replacements(held: np.ndarray, load: np.ndarray, total: np.ndarray):
    """Turn a spare replica of x on GPU g into one of y: y is on the fullest GPU and not on g (to
    split y further), or g is the fullest GPU (to drop x there)."""
    full, count = int(total.argmax()), held.sum(0)
    gpu, old = np.nonzero((held > 0) & (count > 1))
    hot = np.nonzero(held[full])[0]
    pick, new = np.meshgrid(np.arange(len(gpu)), hot, indexing="ij")
    drop = np.nonzero(gpu == full)[0]
    pick2, new2 = np.meshgrid(drop, np.arange(len(load)), indexing="ij")
    pick = np.concatenate([pick.ravel(), pick2.ravel()])
    new = np.concatenate([new.ravel(), new2.ravel()])
    keep = (held[gpu[pick], new] == 0) & (new != old[pick])
    pick, new = pick[keep], new[keep]
    if not len(pick):
        return None
    g, x = gpu[pick], old[pick]
    less = load[new] / (count[new] + 1) - load[new] / count[new]
    more = load[x] / (count[x] - 1) - load[x] / count[x]
    after = total[None] + held[:, new].T * less[:, None] + held[:, x].T * more[:, None]
    after[np.arange(len(g)), g] += load[new] / (count[new] + 1) - load[x] / (count[x] - 1)

    def apply(held: np.ndarray, row: int) -> None:
        held[g[row], x[row]] -= 1
        held[g[row], new[row]] += 1

    return after, apply, 1


def _swaps(held: np.ndarray, load: np.ndarray, total: np.ndarray):
    """Exchange an expert of the fullest GPU for a lighter one of another GPU."""
    full, each = int(total.argmax()), load / held.sum(0)
    here = np.nonzero(held[full])[0]
    gpu, there = np.nonzero(held)
    a, pick = (i.ravel() for i in np.meshgrid(here, np.arange(len(gpu)), indexing="ij"))
    g, b = gpu[pick], there[pick]
    keep = (g != full) & (held[g, a] == 0) & (held[full, b] == 0) & (each[b] < each[a])
    a, g, b = a[keep], g[keep], b[keep]
    if not len(a):
        return None
    after = np.repeat(total[None], len(a), 0)
    after[:, full] += each[b] - each[a]
    after[np.arange(len(a)), g] += each[a] - each[b]

    def apply(held: np.ndarray, row: int) -> None:
        held[full, a[row]] -= 1
        held[full, b[row]] += 1
        held[g[row], b[row]] -= 1
        held[g[row], a[row]] += 1

    return after, apply, 2


def balance(held: np.ndarray, share: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Shift traffic between replicas until the fullest GPU cannot be relieved: the least maximum
    that this placement allows.

    Each step moves load from the fullest GPU along a path of shared experts to the emptiest GPU
    it reaches. When none of those is emptier, every GPU reached is as full, and whatever they
    carry cannot leave them: that is a proof that the maximum is least.
    """
    share, on = share.copy(), held > 0
    total = gpu_load(share, load)
    small = 1e-9 * max(total.mean(), 1e-300)
    for _ in range(50 * len(total)):
        full = int(total.argmax())
        # carry[g, h]: the most load that one shared expert can shift from g to h.
        amount = share * load
        carry = np.where(on[None], amount[:, None], 0.0)  # [g, h, e]
        via = carry.argmax(2)
        carry = carry.max(2)
        path = _path(carry > small, full, total)
        if len(path) < 2 or total[full] - total[path[-1]] <= small:
            break
        steps = list(zip(path, path[1:]))
        moved = min((total[full] - total[path[-1]]) / 2, *(carry[s] for s in steps))
        for g, h in steps:
            expert = via[g, h]
            share[g, expert] -= moved / load[expert]
            share[h, expert] += moved / load[expert]
        share = np.maximum(share, 0.0)
        total = gpu_load(share, load)
    return share / share.sum(0)


def _path(edge: np.ndarray, start: int, total: np.ndarray) -> list[int]:
    """A shortest path from start to the emptiest GPU that can be reached."""
    parent = {start: start}
    frontier = [start]
    while frontier:
        reached = []
        for g in frontier:
            for h in np.nonzero(edge[g])[0].tolist():
                if h not in parent:
                    parent[h] = g
                    reached.append(h)
        frontier = reached
    path = [min(parent, key=lambda g: (total[g], g))]
    while path[-1] != start:
        path.append(parent[path[-1]])
    return path[::-1]


def assign(gain: np.ndarray) -> np.ndarray:
    """The permutation p that maximises sum(gain[i, p[i]]) (Hungarian method, O(n^3))."""
    n = len(gain)
    cost = gain.max() - gain.astype(np.float64)
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, np.int64)  # of each column; 0: none, rows and columns count from 1
    for row in range(1, n + 1):
        row_of[0], column = row, 0
        least, way = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
        used = np.zeros(n + 1, bool)
        while row_of[column]:
            used[column] = True
            i = row_of[column]
            slack = cost[i - 1] - u[i] - v[1:]
            closer = ~used[1:] & (slack < least[1:])
            least[1:][closer], way[1:][closer] = slack[closer], column
            nearest = int(np.where(used, np.inf, least).argmin())
            delta = least[nearest]
            u[row_of[used]] += delta
            v[used] -= delta
            least[~used] -= delta
            column = nearest
        while column:
            row_of[column] = row_of[way[column]]
            column = way[column]
    p = np.empty(n, np.int64)
    p[row_of[1:] - 1] = np.arange(n)
    return p
