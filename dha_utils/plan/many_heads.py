"""Partitions of many heads into n = 1 … heads groups of small cost, from the costs of few groups.

Were heads points, and the cost of a group that of k-means, it would follow from the costs of its pairs: their sum times
2 / size. The search guesses by that what a move, a swap or a merge would change, corrected by the cost that groups of each
size have turned out to have, and prices only the most promising.
"""

from itertools import combinations

import torch

from ..measure.energies import share

PRICED = 256  # over the number of heads: how many moves, swaps or merges are priced before giving up, at least 4
EXACT_SIZE = 5  # larger groups of value heads are priced in a subspace while searching
ROUNDS = 3  # passes down and up through n, at most


def many_partitions(space):
    """For n = 1 … heads: (cost, groups). `space`: a `Groups`, `KeyGroups` or `ValueGroups`, whose costs these are."""
    found = Search(space).run()
    exact = {group: space.exact_cost(group) for group in set().union(*found)}
    return [(sum(map(exact.get, groups)), sorted(map(list, groups))) for groups in found]


class Groups:
    """Groups of `heads` heads, tuples in ascending order, with a cost that any function gives."""

    def __init__(self, cost, heads):
        self.exact_cost, self.heads = cost, heads

    def cost(self, group, near):
        """`near`: groups of known cost that `group` was made from."""
        return self.exact_cost(group)


class ValueGroups(Groups):
    """Groups of value heads with the costs of `HeadEnergies`: a shared head keeps d eigenvectors of the energy."""

    def __init__(self, energies):
        energy, self.d, self.heads = energies.weighted_values(), energies.head_dim, len(energies.query_weight)
        self.total = float(energy.trace())
        tiles = energy.unflatten(0, (-1, self.d)).unflatten(2, (-1, self.d)).transpose(1, 2)
        self.tiles = tiles.to(torch.float32, memory_format=torch.contiguous_format)  # [heads, heads, d, d]
        self.near, self.vectors = {}, {}

    def block(self, group):
        index = torch.tensor(group)
        return self.tiles[index[:, None], index].transpose(1, 2).flatten(2).flatten(0, 1)

    def exact_cost(self, group):
        if len(group) == 1:
            return 0.0
        lost = torch.linalg.eigvalsh(self.block(group))[: -self.d].clamp(min=0).sum(dtype=torch.float64)
        return share(float(lost), self.total)

    def cost(self, group, near):
        """An upper bound, mostly 0.01 % high: what the vectors of the groups `near` lose after a power step."""
        if len(group) <= EXACT_SIZE:
            return self.exact_cost(group)
        self.near[group] = near
        block = self.block(group)
        basis = torch.linalg.qr(block @ self.start(group)).Q
        lost = block.trace() - torch.linalg.eigvalsh(basis.T @ (block @ basis))[-self.d :].sum()
        return share(float(lost), self.total)

    def start(self, group):
        """[g · d, k]: the leading vectors of the groups near `group`, as far as they lie in it."""
        columns = []
        for other in self.near[group]:
            vectors = self.leading(other).unflatten(0, (len(other), self.d))
            part = vectors.new_zeros(len(group), *vectors.shape[1:])
            common = [h for h in other if h in group]
            part[[group.index(h) for h in common]] = vectors[[other.index(h) for h in common]]
            columns.append(part.flatten(0, 1))
        return torch.cat(columns, 1)

    def leading(self, group):
        """[g · d, ≤ 1¼ d]: leading eigenvectors, more than d because a head that leaves makes room."""
        if group not in self.vectors:
            block, size = self.block(group), min(len(group) * self.d // 2, 5 * self.d // 4)
            if len(group) > EXACT_SIZE:
                basis = torch.linalg.qr(block @ self.start(group)).Q
                vectors = basis @ torch.linalg.eigh(basis.T @ (block @ basis)).eigenvectors
            else:
                vectors = torch.linalg.eigh(block).eigenvectors
            self.vectors[group] = vectors[:, -size:].bfloat16()  # half the memory: a power step follows
        return self.vectors[group].float()


class Search:
    """`prices`: the costs known so far, by group. `pairs` [heads, heads]: those of pairs."""

    def __init__(self, space):
        self.space, self.heads, self.priced = space, space.heads, max(4, PRICED // space.heads)
        self.prices = {(h,): 0.0 for h in range(self.heads)}
        self.seen = torch.zeros(self.heads + 1, 2, dtype=torch.float64)  # by size, of groups priced: costs, point costs
        self.pairs = torch.zeros(self.heads, self.heads, dtype=torch.float64)
        for a, b in combinations(range(self.heads), 2):
            self.pairs[a, b] = self.pairs[b, a] = self.price((a, b))

    def price(self, group, near=()):
        """The cost of `group`, a sorted tuple; `near`: groups of known price that it was made from."""
        if group not in self.prices:
            self.prices[group] = self.space.cost(group, near)
            self.seen[len(group)] += torch.tensor([self.prices[group], self.point_cost(group)])
        return self.prices[group]

    def total(self, groups):
        return sum(map(self.prices.get, groups))

    def point_cost(self, group):
        index = torch.tensor(group)
        return float(self.pairs[index[:, None], index].sum()) / len(group)

    def scale(self):
        """[heads + 2]: by size, what groups cost over their point cost; as the next smaller size where none was seen."""
        scale = torch.ones(self.heads + 2, dtype=torch.float64)
        for size in range(3, self.heads + 1):
            cost, point_cost = self.seen[size].tolist()
            scale[size] = cost / point_cost if point_cost else scale[size - 1]
        return scale

    def run(self):
        """The best groups found for n = 1 … heads: down by merges, up by splits, each improved, until nothing changes."""
        found = {self.heads: [(h,) for h in range(self.heads)]}
        for _ in range(ROUNDS):
            before = dict(found)
            for n in range(self.heads - 1, 0, -1):
                self.offer(found, self.merge(found[n + 1]))
            for n in range(2, self.heads):
                self.offer(found, self.split(found[n - 1]))
            if found == before:
                break
        return [found[n] for n in range(1, self.heads + 1)]

    def offer(self, found, groups):
        groups = self.improve(groups)
        found[len(groups)] = min(found.get(len(groups), groups), groups, key=self.total)

    def improve(self, groups):
        """Move one head, or swap two of different groups, as long as one of the promising steps lowers the cost."""
        while len(groups) > 1:
            for _, a, b, out, back in self.steps(groups):  # `out`: heads from a to b, `back`: from b to a
                new_a, new_b = tuple(sorted({*a, *back} - {*out})), tuple(sorted({*b, *out} - {*back}))
                cost = self.price(new_a, (a, *((h,) for h in back))) + self.price(new_b, (b, *((h,) for h in out)))
                if cost < self.total((a, b)) - 1e-5 * self.total(groups):
                    groups = [group for group in groups if group not in (a, b)] + [new_a, new_b]
                    break
            else:
                break
        return groups

    def steps(self, groups):
        """The most promising moves and swaps, best first: (guessed change, group a, group b, heads out, heads back)."""
        heads = sorted(sum(groups, ()))
        own = [next(group for group in groups if h in group) for h in heads]
        moves, swaps = self.guess_steps(groups, heads)
        steps = [(guess, own[i], groups[k], (heads[i],), ()) for guess, i, k in lowest(moves, self.priced)]
        steps += [(guess, own[i], own[j], (heads[i],), (heads[j],)) for guess, i, j in lowest(swaps, self.priced)]
        return sorted(steps)

    def guess_steps(self, groups, heads):
        """Guessed changes of the cost: [heads, groups] if a head moves to a group, [heads, heads] if two are swapped."""
        member = torch.tensor([[float(h in group) for group in groups] for h in heads], dtype=torch.float64)
        own, scale, pairs = member.argmax(1), self.scale(), self.pairs[heads][:, heads]
        size, price = member.sum(0).long(), torch.tensor([self.prices[group] for group in groups], dtype=torch.float64)
        to = pairs @ member  # [heads, groups]: the sum of a head's pairs with a group
        within = (to * member).sum(0) / 2

        def guess(size, pairs):
            return scale[size] * 2 * pairs / size.clamp(min=1)

        factor = torch.where(within > 0, price / guess(size, within), 1.0).clamp(0.25, 4)  # the group's own
        without = within[own] - to[range(len(heads)), own]
        leave = factor[own] * guess(size[own] - 1, without) - price[own]
        moves = leave[:, None] + factor * guess(size + 1, within + to) - price
        exchanged = without[:, None] + to[:, own].T - pairs  # the pairs of i's group with j in place of i
        swaps = factor[own][:, None] * guess(size[own][:, None], exchanged) - price[own][:, None]
        swaps = swaps + swaps.T
        alone = size[own] == 1
        moves[(member > 0) | alone[:, None]] = torch.inf
        swaps[(own[:, None] <= own) | alone[:, None] & alone] = torch.inf
        return moves, swaps

    def merge(self, groups):
        """`groups` with the two merged that cost least."""
        scale, guesses = self.scale().tolist(), []
        for a, b in combinations(groups, 2):
            merged = tuple(sorted(a + b))
            guesses.append((self.point_cost(merged) * scale[len(merged)] - self.total((a, b)), a, b, merged))
        promising = sorted(guesses)[: self.priced]
        _, a, b, merged = min((self.price(new, (a, b)) - self.total((a, b)), a, b, new) for _, a, b, new in promising)
        return [group for group in groups if group not in (a, b)] + [merged]

    def split(self, groups):
        """`groups` with that one in two whose halves save most."""
        best, result = -1.0, None
        for group in sorted((group for group in groups if len(group) > 1), key=self.prices.get, reverse=True):
            if self.prices[group] > best:  # else nothing more can be saved
                halves = self.halves(group)
                saved = self.prices[group] - self.total(halves)
                if saved > best:
                    best, result = saved, [other for other in groups if other != group] + halves
        return result

    def halves(self, group):
        """The two heads of `group` that are least alike, each with those nearer to it; then improved."""
        a, b = max(combinations(group, 2), key=self.prices.get)
        first = tuple(h for h in group if h == a or h != b and self.pairs[h, a] < self.pairs[h, b])
        halves = [first, tuple(h for h in group if h not in first)]
        for half in halves:
            self.price(half, (group,))
        return self.improve(halves)


def lowest(guesses, count):
    """The at most `count` lowest finite entries of a matrix: (entry, row, column)."""
    values, order = guesses.flatten().sort(stable=True)
    best = zip(values[:count].tolist(), order[:count].tolist())
    return [(value, *divmod(index, guesses.shape[1])) for value, index in best if value < torch.inf]
