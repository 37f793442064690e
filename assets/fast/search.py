"""Ranking, fast: the best of ILM.score over a whole catalogue by a search through the trie of names. tests/test_ilm.py shows that both
agree."""

import copy

import torch
import torch.nn as nn
from transformers import DynamicCache

from assets.guard import InputError


class Trie:
    """A prefix tree over token sequences in flat arrays: node n has children first[n] .. first[n] + count[n], reached by token[.].

        names  a b $ | a c $ | d e $      root -a-> . -b-> item 0       "d" alone decides for item 2: with renormalize, p is divided
                                                 `-c-> item 1           among a node's children, an only child is certain, and the
                                          `-d-> item 2                  tree ends where a name is decided (item[n] >= 0)

    Otherwise every name keeps all its tokens. Names end with an end token ($), so that none is the prefix of another. paths[i]: the
    tokens that lead to item i, and the nodes among whose children each is chosen."""

    def __init__(self, names, renormalize=True):
        if len(set(map(tuple, names))) < len(names):
            raise InputError(
                "two items have names of equal tokens; raise --name-tokens or use --item-names random"
            )
        order = sorted(range(len(names)), key=lambda i: names[i])
        first, count, token, item, self.paths = [0], [0], [-1], [-1], [()] * len(names)
        span = [(0, len(order))]  # which of the sorted names begin so
        queue = [(0, 0, len(order), [])]  # node, its range in the sorted names, its path
        for node, start, end, path in queue:  # grows while it is read: breadth first
            depth = len(path)
            if end - start == 1 and (renormalize or depth == len(names[order[start]])):
                item[node], self.paths[order[start]] = (
                    order[start],
                    ([t for t, _ in path], [n for _, n in path]),
                )
                continue
            first[node] = len(token)
            while start < end:
                stop = start
                while stop < end and names[order[stop]][depth] == names[order[start]][depth]:
                    stop += 1
                queue.append((len(token), start, stop, [*path, (names[order[start]][depth], node)]))
                for array, value in (
                    (token, names[order[start]][depth]),
                    (span, (start, stop)),
                    (first, 0),
                    (count, 0),
                    (item, -1),
                ):
                    array.append(value)
                start = stop
            count[node] = len(token) - first[node]
        self.first, self.count, self.token, self.item = (
            torch.tensor(x) for x in (first, count, token, item)
        )
        self.span, self.order = torch.tensor(span), torch.tensor(order)
        self.num_items, self.renormalize = len(names), renormalize
        # `vocabulary` (W,): the tokens that names consist of; child n's is vocabulary[column[n]]
        self.vocabulary, column = torch.unique(self.token[1:], return_inverse=True)
        self.column = nn.functional.pad(column, (1, 0))

    def children(self, node):
        """All children of nodes (N,) -> which of the N is the parent (M,), the child (M,)."""
        count, parent = self.count[node], torch.repeat_interleave(self.count[node])
        return parent, (self.first[node] + count - count.cumsum(0))[parent] + torch.arange(
            len(parent), device=node.device
        )

    def sums(self, values):
        """values (I,) of items -> the sum of them below each node (nodes,)."""
        total = nn.functional.pad(values[self.order].double().cumsum(0), (1, 0))
        return total[self.span[:, 1]] - total[self.span[:, 0]]

    def to(self, device):
        """A copy there."""
        there = copy.copy(self)
        for name in ("first", "count", "token", "item", "span", "order", "vocabulary", "column"):
            setattr(there, name, getattr(self, name).to(device))
        return there


def segment_logsumexp(x, segment, num_segments):
    """log sum exp of x (N,) within each segment (N,) -> (num_segments,)."""
    top = torch.full((num_segments,), -torch.inf, device=x.device).scatter_reduce(
        0, segment, x.detach(), "amax"
    )
    return top + torch.zeros_like(top).index_add(0, segment, (x - top[segment]).exp()).log()


def best_of_each(user, score, n):
    """Which of N scored things are among the `n` best of their user, sorted by user, best first -> indices (M,), places 0 .. n-1 (M,)."""
    order = score.argsort(descending=True)
    order = order[user[order].argsort(stable=True)]
    place = torch.arange(len(order), device=user.device) - torch.searchsorted(
        user[order], user[order]
    )
    return order[place < n], place[place < n]


def additive(may_attend, dtype):
    """A mask (B, 1, N, S) of True = "may attend" as numbers to add to attention's logits, finite in every type that autocast may choose."""
    return torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device).masked_fill_(
        ~may_attend, -3e4
    )


def read_side_by_side(model, token, user, place, sees, position, cache):
    """One more token (N,) of each living prefix, in row `user`, column `place` (N,). sees (N, columns of the cache and the new ones):
    what each may attend to. position (B, 1) of the new tokens. -> last hidden states (N, hidden); the cache grows."""
    B, W = len(position), sees.shape[1] - cache.get_seq_length()
    mask = torch.zeros(B, W, sees.shape[1], dtype=torch.bool, device=token.device)
    mask[user, place] = sees
    ids = torch.zeros(B, W, dtype=torch.long, device=token.device)
    ids[user, place] = token
    embedded = model.embed(ids)
    return model.body(
        embedded, additive(mask[:, None], embedded.dtype), position.expand(B, W), cache
    )[user, place]


def read_alone(model, prompts, user, path, chunk=64):
    """The last hidden state (N, hidden) of each living prefix, tokens `path` (N, T) behind its user's prompt, by the definition."""
    found, T = [], path.shape[1]
    for users, rows in zip(user.split(chunk), path.split(chunk)):
        targets = [[*row, 0] for row in rows.tolist()]
        found.append(model.states([prompts[u] for u in users.tolist()], targets)[T :: T + 1])
    return torch.cat(found)


@torch.no_grad()
def search(model, prompts, trie, beams=None, taken=None):
    """log p of items' names after each prompt, (B, I): of the `beams` best of each user, the others -inf. beams=0: of all, exact;
    None: exact up to 1,000 items, 20 beams above.

    score(name) = sum over its tokens and an end token of log p, p renormalised over the trie's children (trie.renormalize).
    taken (B, I): items that shall not be found. All prefixes of a user are read side by side in that user's row, a token a step; a
    mask shows each of them the prompt and its own beginning. So the prompt's keys and values exist once, and nothing is moved."""
    embeddings, sees, position = model.pad(prompts)
    B, device = len(embeddings), embeddings.device
    user, node, score = (
        torch.arange(B, device=device),
        torch.zeros(B, dtype=torch.long, device=device),
        torch.zeros(B, device=device),
    )
    beams = (20 if beams is None and trie.num_items > 1000 else beams) or trie.num_items
    if model.seq2seq:
        states, sees = model.encode_prompts(embeddings, sees)
        path = torch.full((B, 1), model.llm.generation_config.decoder_start_token_id, device=device)
        hidden = model.decode(path, states, sees)[:, -1]  # of N living prefixes, first N = B
    elif not model.packs:
        path = node[:, None][:, :0]
        hidden = read_alone(model, prompts, user, path)
    else:
        hidden = model.body(embeddings, sees, position, cache := DynamicCache())[:, -1]
        position, sees = position[:, -1:], sees.bool()
    found = user[:0], node[:0], score[:0]  # finished names: user, item, score
    free = (
        torch.ones(B, trie.num_items, device=device)
        if taken is None
        else (~taken[:, trie.order]).float()
    )
    free = nn.functional.pad(free.cumsum(1), (1, 0))  # of the first n sorted names, (B, I+1)
    while len(node):
        # All continuations of all prefixes
        parent, child = trie.children(node)
        allowed, column = trie.token[child].unique(return_inverse=True)
        logit = model.head(hidden, allowed)[parent, column]
        if trie.renormalize:
            logit = model.among_children(logit, child)
        total = (
            segment_logsumexp(logit, parent, len(node))
            if trie.renormalize
            else model.head(hidden).logsumexp(1)
        )
        user, score, item = (
            user[parent],
            score[parent] + logit - total[parent],
            trie.item[child],
        )
        # The `beams` best finished names. Dead is a prefix that is not above the last of them, or leads to nothing but taken items
        done = (item >= 0) if taken is None else (item >= 0) & ~taken[user, item]
        found = [torch.cat([old, new[done]]) for old, new in zip(found, (user, item, score))]
        kept, place = best_of_each(found[0], found[2], beams)
        found = [x[kept] for x in found]
        bar = torch.full((B,), -torch.inf, device=device)
        bar[found[0][place == beams - 1]] = found[2][place == beams - 1]
        begin, end = trie.span[child].T
        alive = (
            (item < 0) & (score > bar[user]) & (free[user, end] > free[user, begin])
        ).nonzero()[:, 0]
        kept, place = best_of_each(user[alive], score[alive], beams)
        alive = alive[kept]
        if not len(alive):
            break
        user, node, score, parent = user[alive], child[alive], score[alive], parent[alive]
        if not model.packs:  # the simple path: a prefix is a row, read from its start
            path = torch.cat([path[parent], trie.token[node][:, None]], 1)
            if not model.seq2seq:
                hidden = read_alone(model, prompts, user, path)
                continue
            hidden = torch.cat(
                [
                    model.decode(p, states[u], sees[u])[:, -1]
                    for p, u in zip(path.split(512), user.split(512))
                ]
            )
            continue
        position = position + 1
        sees = torch.cat(
            [sees[parent], place[:, None] == torch.arange(int(place.max()) + 1, device=device)],
            1,
        )
        hidden = read_side_by_side(model, trie.token[node], user, place, sees, position, cache)
    scores = torch.full((B, trie.num_items), -torch.inf, device=device)
    scores[found[0], found[1]] = found[2]
    return scores
