"""The published greedy placement: pack groups onto nodes, replicate the hottest, pack onto GPUs.

Letters: L layers, E logical experts, P slots (physical experts), X most replicas of one expert.
"""

from __future__ import annotations

import numpy as np
import torch


def greedy(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Place num_replicas copies of E experts with loads weight [L, E] on num_gpus GPUs.

    Groups of experts stay on one node when num_groups is a multiple of num_nodes; otherwise nodes
    and groups are ignored. Returns int64 tensors: the expert of every slot [L, P], the slots of
    every expert [L, E, X] padded with -1, and the replicas of every expert [L, E]. Slot p is on
    GPU p // (P / num_gpus). Loads are compared in fp32, ties go to the lower number. Source: the
    algorithm published with DeepSeek-V3 ("EPLB"), report section 3.4.
    """
    _check(weight, num_replicas, num_groups, num_nodes, num_gpus)
    loads = weight.detach().to("cpu", torch.float32).numpy()
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    rows = [place(row, num_replicas, num_groups, num_nodes, num_gpus) for row in loads]
    experts = loads.shape[1]
    slots = np.array([row[0] for row in rows], np.int64).reshape(len(rows), num_replicas)
    ranks = np.array([row[1] for row in rows], np.int64).reshape(slots.shape)
    counts = np.stack([np.bincount(row, minlength=experts) for row in slots])
    inverse = np.full((len(rows), experts, counts.max()), -1, np.int64)
    for layer, (row, rank) in enumerate(zip(slots, ranks)):
        inverse[layer, row, rank] = np.arange(num_replicas)
    return torch.from_numpy(slots), torch.from_numpy(inverse), torch.from_numpy(counts)


def place(
    load: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[np.ndarray, np.ndarray]:
    """One layer: the expert of each slot, and which replica of the expert it is."""
    node_experts = groups_to_nodes(load, num_groups, num_nodes)
    slots, ranks = [], []
    for experts in node_experts:
        own = load[experts]
        expert, rank, count = replicate(own, num_replicas // num_nodes)
        gpu, place_in_gpu = pack((own / count)[expert], num_gpus // num_nodes)
        where = np.argsort(gpu * len(expert) + place_in_gpu)
        slots.append(experts[expert[where]])
        ranks.append(rank[where])
    return np.concatenate(slots), np.concatenate(ranks)


def groups_to_nodes(load: np.ndarray, num_groups: int, num_nodes: int) -> list[np.ndarray]:
    """The experts of every node, in the order of their groups' places there."""
    size = len(load) // num_groups
    node, place_in_node = pack(load.reshape(num_groups, size).sum(1), num_nodes)
    order = np.argsort(node * num_groups + place_in_node).reshape(num_nodes, -1)
    return [(groups[:, None] * size + np.arange(size)).reshape(-1) for groups in order]


def pack(weight: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Heaviest first, each item to the lightest pack that has room; all packs get equally many.

    Returns the pack of every item and its place there.
    """
    room = len(weight) // packs
    if room == 1:
        return np.arange(packs), np.zeros(packs, np.int64)
    pack_of = np.empty(len(weight), np.int64)
    place_in = np.empty(len(weight), np.int64)
    total, items = np.zeros(packs, np.float32), np.zeros(packs, np.int64)
    for item in np.argsort(-weight, kind="stable"):
        lightest = int(np.where(items < room, total, np.inf).argmin())
        pack_of[item], place_in[item] = lightest, items[lightest]
        total[lightest] += weight[item]
        items[lightest] += 1
    return pack_of, place_in


def replicate(load: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One replica of every expert, then one more of whichever has the most load per replica."""
    expert, rank = list(range(len(load))), [0] * len(load)
    count = np.ones(len(load), np.int64)
    for _ in range(slots - len(load)):
        hottest = int((load / count.astype(np.float32)).argmax())
        expert.append(hottest)
        rank.append(int(count[hottest]))
        count[hottest] += 1
    return np.array(expert), np.array(rank), count


def _check(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    if weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"weight: expected loads [layers, experts], got {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()):
        raise ValueError("weight: expected finite loads >= 0, got some that are not")
    experts = weight.shape[1]
    for name, value in (("num_groups", num_groups), ("num_nodes", num_nodes),
                        ("num_gpus", num_gpus)):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if num_replicas < experts or num_replicas % num_gpus:
        raise ValueError(
            f"num_replicas: expected a multiple of {num_gpus} GPUs and at least {experts} experts, "
            f"got {num_replicas}"
        )
    if num_groups % num_nodes == 0 and (experts % num_groups or num_gpus % num_nodes):
        raise ValueError(
            f"num_groups, num_nodes: expected divisors of {experts} experts and {num_gpus} GPUs, "
            f"got {num_groups} groups and {num_nodes} nodes"
        )
