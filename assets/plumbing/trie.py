"""The trie of names: among which tokens p of a name's next token is divided (ILM.log_p)."""

import copy

import torch
import torch.nn as nn

from assets.plumbing.guard import InputError


class Trie:
    """A prefix tree over token sequences in flat arrays: node n has children first[n] .. first[n] +
    count[n] - 1, reached by token[.].

        names  a b $ | a c $ | d e $      root -a-> . -b-> item 0
                                                 `-c-> item 1
                                          `-d-> item 2

    "d" alone decides for item 2: with renormalize, p is divided among a node's children, an only
    child is certain, and the tree ends where a name is decided (item[n] >= 0). Otherwise every name
    keeps all its tokens. Names end with an end token ($), so that none is the prefix of another.
    paths[i]: the tokens that lead to item i, and the nodes among whose children each is chosen."""

    def __init__(self, names, renormalize=True):
        if len(set(map(tuple, names))) < len(names):
            raise InputError(
                "two items have names of equal tokens; raise --name-tokens or use --item-names "
                "random"
            )
        self.num_items, self.renormalize, self.there = len(names), renormalize, {}
        order = sorted(range(len(names)), key=lambda i: names[i])
        nodes = {"first": [0], "count": [0], "token": [-1], "item": [-1], "span": [(0, len(names))]}
        self.paths = [()] * len(names)

        # Breadth first. The queue grows while it is read: node, its range of the sorted names, path
        queue = [(0, 0, len(order), [])]
        for node, start, end, path in queue:
            depth, item = len(path), order[start]
            if end - start == 1 and (renormalize or depth == len(names[item])):
                nodes["item"][node] = item
                self.paths[item] = [token for token, _ in path], [above for _, above in path]
                continue
            nodes["first"][node] = len(nodes["token"])
            while start < end:
                token, stop = names[order[start]][depth], start
                while stop < end and names[order[stop]][depth] == token:
                    stop += 1
                queue.append((len(nodes["token"]), start, stop, [*path, (token, node)]))
                child = {"first": 0, "count": 0, "token": token, "item": -1, "span": (start, stop)}
                for key, value in child.items():
                    nodes[key].append(value)
                start = stop
            nodes["count"][node] = len(nodes["token"]) - nodes["first"][node]

        # span: which of the sorted names begin so. vocabulary (W,): the tokens that names consist
        # of; child n's is vocabulary[column[n]]
        for key, values in nodes.items():
            setattr(self, key, torch.tensor(values))
        self.order = torch.tensor(order)
        self.vocabulary, column = torch.unique(self.token[1:], return_inverse=True)
        self.column = nn.functional.pad(column, (1, 0))

    def children(self, node):
        """All children of nodes (N,) -> which of the N is the parent (M,), the child (M,)."""
        count = self.count[node]
        parent = torch.repeat_interleave(count)
        start = self.first[node] + count - count.cumsum(0)
        return parent, start[parent] + torch.arange(len(parent), device=node.device)

    def sums(self, values):
        """values (I,) of items -> the sum of them below each node (nodes,)."""
        total = nn.functional.pad(values[self.order].double().cumsum(0), (1, 0))
        return total[self.span[:, 1]] - total[self.span[:, 0]]

    def to(self, device):
        """A copy there, made once."""
        if device not in self.there:
            there = copy.copy(self)
            for key, value in vars(self).items():
                if torch.is_tensor(value):
                    setattr(there, key, value.to(device))
            self.there[device] = there
        return self.there[device]


def segment_logsumexp(x, segment, num_segments):
    """log sum exp of x (N,) within each segment (N,) -> (num_segments,)."""
    top = torch.full((num_segments,), -torch.inf, device=x.device)
    top = top.scatter_reduce(0, segment, x.detach(), "amax")
    total = torch.zeros_like(top).index_add(0, segment, (x - top[segment]).exp())
    return top + total.log()


def index_targets(trie, token, node):
    """What ILM.log_p has to know of target tokens (T,), worked out on the CPU: which of them are
    words of a text (node -1), and of those that are part of a name all children of their nodes
    (T,), among which p is divided (ragged: child[m] belongs to name_at[parent[m]]), and which child
    is meant."""
    word_at, name_at = (node < 0).nonzero()[:, 0], (node >= 0).nonzero()[:, 0]
    parent, child = trie.children(node[name_at])
    own_child = (trie.token[child] == token[name_at][parent]).nonzero()[:, 0]
    found = {"word_at": word_at, "word_id": token[word_at], "name_at": name_at}
    return found | {"parent": parent, "child": child, "own_child": own_child}
