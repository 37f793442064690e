"""The Q-Former and the five losses that align it with text (stage 1). Needs torch alone; lift it out of here if you like.

A Q-Former turns a collaborative-filtering (CF) vector into Q soft tokens. It is a small BERT with two inputs, learned *query*
tokens and *text* tokens, which share self-attention and part ways in the feed-forward. Only the queries can see the CF vector, by
cross-attention in every second layer. Which of them may see which is set by one function, attention_pattern(), and that function
is the heart of the method: the same weights contrast (ITC), match (ITM) and write (ITG) texts.

Source: BLIP-2 (arXiv 2301.12597, section 3) with a CF vector in place of an image; ILM (arXiv 2406.02844) adds the item-item (II)
and user-item (UI) losses. A user is one more item: the same encoder reads user vectors.

Dimension letters, for the whole project:
    B batch   Q queries = soft tokens per item   T text tokens   M CF key tokens   D Q-Former width   E CF width
    H heads   V vocabulary   P width of the contrastive space   L prompt length   W items of a history
    I items   U users   N any number of rows   S keys"""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class QFormerConfig:
    cf_dim: int  # E
    vocab_size: int  # V of the text branch
    num_queries: int = 4  # Q. BLIP-2 has 32; the paper's number is not known to us
    width: int = 128  # D. DEVIATION: BERT-base's 768 in BLIP-2; --width 768 --layers 8 --init-bert is nearest to the paper
    layers: int = 2  # 8 in the paper, 12 in BLIP-2; cross-attention in layers 0, 2, 4, ...
    heads: int = 0  # H; 0 stands for width // 32, or the next smaller number that divides the width
    history: int = 0  # W, items of a user's history that queries read beside the CF vector; 0: the vector alone
    cf_tokens: int = 4  # M. DEVIATION: one key would make the softmax of cross-attention trivial (always 1): see CFKeys
    proj_dim: int = 64  # P. 256 in BLIP-2
    max_text: int = 48  # T at most. 32 in BLIP-2
    dropout: float = 0.1


# ---- Who may see whom ------------------------------------------------------------------------------------------------


def attention_pattern(pattern, num_queries, text_mask):
    """The three patterns of BLIP-2's figure 2. text_mask (B, T), True at real tokens -> (B, 1, Q+T, Q+T), True means "may attend".

                separate (ITC)         joint (ITM)            causal (ITG)
                keys q q t t t         keys q q t t t         keys q q t t t
        query q      x x . . .              x x x x x              x x . . .
        query q      x x . . .              x x x x x              x x . . .
        text  t      . . x x x              x x x x x              x x x . .
        text  t      . . x x x              x x x x x              x x x x .
        text  t      . . x x x              x x x x x              x x x x x

    separate: neither knows the other, so that their similarity is a fair question.   joint: they may compare notes.
    causal: text is written word by word from what the queries say; queries never peek at the text they must explain."""
    (B, T), Q = text_mask.shape, num_queries
    allowed = torch.zeros(Q + T, Q + T, dtype=torch.bool, device=text_mask.device)
    allowed[:Q, :Q] = True
    if pattern == "separate":
        allowed[Q:, Q:] = True
    elif pattern == "joint":
        allowed[:] = True
    elif pattern == "causal":
        allowed[Q:, :Q] = True
        allowed[Q:, Q:] = torch.ones(T, T, dtype=torch.bool, device=text_mask.device).tril()
    else:
        raise ValueError(f"unknown attention pattern {pattern!r}")
    keys = torch.cat([text_mask.new_ones(B, Q), text_mask], 1)  # nobody attends to padding
    return allowed & keys[:, None, None, :]


# ---- Building blocks (BERT's: LayerNorm *after* each residual sum, erf gelu) -----------------------------------------


class Attention(nn.Module):
    """Multi-head attention with residual and LayerNorm. x (B, N, D), context (B, S, D), mask (B, 1, N, S) or None -> (B, N, D)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        assert width % heads == 0, f"width {width} is not a multiple of {heads} heads"
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.heads, self.dropout = heads, dropout

    def forward(self, x, context, mask=None):
        B, N, D = x.shape
        split = lambda y: y.view(B, -1, self.heads, D // self.heads).transpose(
            1, 2
        )  # (B, H, N, D/H)
        y = F.scaled_dot_product_attention(
            split(self.query(x)),
            split(self.key(context)),
            split(self.value(context)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = self.out(y.transpose(1, 2).reshape(B, N, D))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class FeedForward(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = dropout

    def forward(self, x):
        return self.norm(x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training))


class Layer(nn.Module):
    """Shared self-attention; cross-attention to the CF keys for queries alone, or to the keys of the
    history, or neither; a feed-forward for each kind.

    keep: return the first `keep` states alone (None: all). The others are still attended to, as keys and
    values. pair (N,): x has a row for each text, cf_keys one for each of N (item, text) pairs; pair[n] is
    the text of pair n."""

    def __init__(self, config, cross, history):
        super().__init__()
        self.self_attention = Attention(config.width, config.heads, config.dropout)
        self.cross_attention, self.history_attention = None, None
        if cross:
            self.cross_attention = Attention(config.width, config.heads, config.dropout)
        if history:
            self.history_attention = Attention(config.width, config.heads, config.dropout)
        self.query_ffn = FeedForward(config.width, config.dropout)
        self.text_ffn = FeedForward(config.width, config.dropout)

    def forward(self, x, num_queries, cf_keys, mask, keep=None, pair=None, history=None):
        if mask is not None:
            mask = mask[..., :keep, :]
        x = self.self_attention(x[:, :keep], x, mask)
        queries, text = x[:, :num_queries], self.text_ffn(x[:, num_queries:])
        if pair is not None:  # index_select: [pair] has a backward that differs from run to run
            queries, text = queries.index_select(0, pair), text.index_select(0, pair)
        if num_queries and self.cross_attention is not None:
            queries = self.cross_attention(queries, cf_keys)
        if self.history_attention is not None and history is not None:
            queries = self.history_attention(queries, *history)
        return torch.cat([self.query_ffn(queries), text], 1)


class CFKeys(nn.Module):
    """A CF vector (B, E) -> M key tokens (B, M, D).

    An image gives BLIP-2's queries 257 patches to choose from. One CF vector as one key gives them no choice: softmax over a single
    key is 1, and cross-attention is a learned linear map added to every query alike. M projections give the queries something to
    attend *between*. DEVIATION: no LayerNorm, as BLIP-2 has on its patches: it would take the length of the vector away, which says how
    popular an item is and how active a user."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.cf_dim, config.cf_tokens * config.width)
        self.tokens = config.cf_tokens

    def forward(self, cf):
        return self.linear(cf).view(len(cf), self.tokens, -1)


class HistoryKeys(nn.Module):
    """The last W items of a user's history, latest first (B, W * E), zeros where there is none -> keys
    (B, W + 1, D), one of them always there, and which of them may be attended to (B, 1, 1, W + 1).

    A user's vector is a sum, behind which no query can look; here they can choose. The attention that
    reads these keys begins at zero. DEVIATION: the paper's encoder reads the CF vector alone."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.cf_dim, config.width)
        self.places = nn.Parameter(torch.zeros(config.history + 1, config.width))

    def forward(self, history):
        B, W = len(history), len(self.places) - 1
        items = history.view(B, W, -1)
        keys = (
            torch.cat([self.linear(items), torch.zeros_like(self.places[:1]).expand(B, 1, -1)], 1)
            + self.places
        )
        there = torch.cat(
            [(items != 0).any(2), torch.ones(B, 1, dtype=torch.bool, device=items.device)], 1
        )
        return keys, there[:, None, None]


# ---- The model -------------------------------------------------------------------------------------------------------


class QFormer(nn.Module):
    def __init__(self, config):
        super().__init__()
        config = replace(
            config,
            heads=config.heads
            or next(h for h in range(max(1, config.width // 32), 0, -1) if config.width % h == 0),
        )
        self.config, self.width, self.history, D = (
            config,
            config.width,
            config.history,
            config.width,
        )
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, D))
        self.cf_keys = CFKeys(config)
        self.history_keys = HistoryKeys(config) if config.history else None
        self.words = nn.Embedding(config.vocab_size, D)
        self.positions = nn.Embedding(config.max_text, D)  # text alone: queries have no order
        self.norm = nn.LayerNorm(D, eps=1e-12)
        # Every second layer reads the CF vector; those between read the history, when queries know the user
        reads_history = [
            config.history > 0 and (i % 2 == 1 or config.layers == 1) for i in range(config.layers)
        ]
        self.layers = nn.ModuleList(
            Layer(config, i % 2 == 0, reads) for i, reads in enumerate(reads_history)
        )
        # Heads, one a loss
        self.query_proj, self.text_proj = (
            nn.Linear(D, config.proj_dim),
            nn.Linear(D, config.proj_dim),
        )
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.itm_head = nn.Linear(D, 2)
        self.lm_transform, self.lm_norm = nn.Linear(D, D), nn.LayerNorm(D, eps=1e-12)
        self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        std = (
            0.02 * math.sqrt(768 / D)
        )  # BERT's .02 is for width 768; this keeps each layer's gain, or narrow ones sit on a long plateau
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.queries, std=std)
        # The CF vector has to be heard: of the soft tokens' first variance it is under 1 % with BERT's small weights, 30 % with these.
        nn.init.normal_(self.cf_keys.linear.weight, std=config.cf_dim**-0.5)
        for cross in (
            layer.cross_attention for layer in self.layers if layer.cross_attention is not None
        ):
            nn.init.normal_(cross.value.weight, std=D**-0.5)
            nn.init.normal_(cross.out.weight, std=D**-0.5)
        if config.history:  # it says nothing at first, and learns what the vector leaves out
            nn.init.normal_(self.history_keys.linear.weight, std=config.cf_dim**-0.5)
            nn.init.normal_(self.history_keys.places, std=1.0)
        for layer in self.layers:
            if layer.history_attention is not None:
                nn.init.normal_(layer.history_attention.value.weight, std=D**-0.5)
                nn.init.zeros_(layer.history_attention.out.weight)

    def forward(
        self, cf=None, text_ids=None, text_mask=None, pattern="joint", keep=None, pair=None
    ):
        """cf (B, E) and/or text_ids, text_mask (B, T) -> query states (B, Q, D) and text states (B, T, D); None for what was not given.

        Two ways to compute less, with the same results (dropout apart). keep: how many leading states the caller will use; the last
        layer returns no others. pair (N,): cf has N rows, and row n goes with text pair[n]. Up to the first cross-attention nobody
        knows the item, and queries are constants: each text takes that way once, not once for every item it is matched with."""
        parts, mask, num_queries = [], None, 0
        if cf is not None:
            num_queries = self.config.num_queries
            parts.append(self.queries.expand(len(cf if pair is None else text_ids), -1, -1))
        if text_ids is not None:
            T = text_ids.shape[1]
            parts.append(
                self.words(text_ids) + self.positions(torch.arange(T, device=text_ids.device))
            )
            mask = attention_pattern(pattern, num_queries, text_mask)
        x = F.dropout(
            self.norm(torch.cat(parts, 1)), self.config.dropout, self.training
        )  # (B, Q+T, D)
        history, E = None, self.config.cf_dim
        if self.config.history and cf is not None and cf.shape[1] > E:
            cf, history = cf[:, :E], self.history_keys(cf[:, E:])
        cf_keys = None if cf is None else self.cf_keys(cf)  # (B, M, D)
        for layer in self.layers:
            x = layer(
                x,
                num_queries,
                cf_keys,
                mask,
                keep if layer is self.layers[-1] else None,
                pair,
                history,
            )
            if pair is not None:
                mask, pair = mask[pair], None
        return (x[:, :num_queries] if num_queries else None), (
            x[:, num_queries:] if text_ids is not None else None
        )

    def encode(self, cf):
        """CF vectors of items or users (B, E) -> Q soft tokens each (B, Q, D). This is all that stage 2 uses."""
        return self(cf)[0]

    def freeze_all_but_encode(self):
        """Stage 2 reads CF vectors alone: what encode() does not touch (text branch, heads, temperature) is frozen."""
        used = (
            "queries",
            "cf_keys",
            "history_keys",
            "norm",
            "self_attention",
            "cross_attention",
            "history_attention",
            "query_ffn",
        )
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            parameter.requires_grad_(parts[0] in used or parts[0] == "layers" and parts[2] in used)

    def query_features(self, query_states):
        return F.normalize(self.query_proj(query_states), dim=-1)  # (B, Q, P)

    def text_features(self, text_ids, text_mask):
        """The [CLS] states of texts that know no queries ("separate"), projected: (B, P)."""
        return F.normalize(
            self.text_proj(self(None, text_ids, text_mask, "separate", keep=1)[1][:, 0]), dim=-1
        )

    def match_logits(self, cf, text_ids, text_mask, pair=None):
        """Does text pair[n] (None: text n) belong to item n? (N, 2): the mean over queries of a linear head. "joint" pattern."""
        return self.itm_head(
            self(cf, text_ids, text_mask, "joint", keep=self.config.num_queries, pair=pair)[0]
        ).mean(1)

    def lm_logits(self, text_states):
        """States (..., D) -> next-token logits (..., V); the output table is the input table, as in BERT."""
        return (
            self.lm_norm(F.gelu(self.lm_transform(text_states))) @ self.words.weight.T
            + self.lm_bias
        )

    def scale(self):
        """1 / temperature, the learned temperature kept in a sane range. At the start 1 / .07."""
        return 1 / self.temperature.clamp(0.001, 0.5)


# ---- The five losses: pure functions, tensors in, scalar out ---------------------------------------------------------


def item_text_similarity(query_features, text_features):
    """(B, Q, P), (B, P) -> (B, B): item i against text j, the best of its Q queries. In [-1, 1]."""
    return torch.einsum("iqp,jp->ijq", query_features, text_features).amax(2)


def pair_similarity(a, b):
    """(B, Q, P), (B, Q, P) -> (B, B): the mean over the queries, each with its like. DEVIATION: the paper does not say how it pools; the
    best of all pairs (as in ITC) trains one query and lets the others forget the CF vector, from which stage 2 then has to start."""
    return torch.einsum("iqp,jqp->ij", a, b) / a.shape[1]


def contrastive(logits, same, label_smoothing=0.0):
    """Mean cross-entropy of rows with the diagonal as target. same (B, B) bool: duplicates, which are neither target nor negative."""
    B = len(logits)
    eye = torch.eye(B, dtype=torch.bool, device=logits.device)
    log_p = logits.float().masked_fill(same & ~eye, -torch.inf).log_softmax(1)
    counted = ~same | eye
    smooth = log_p.masked_fill(~counted, 0).sum(1) / counted.sum(1)
    return -((1 - label_smoothing) * log_p.diagonal() + label_smoothing * smooth).mean()


def itc_loss(similarity, scale, same, label_smoothing=0.1):
    """Item-text contrastive: an item finds its text among the batch's, and a text its item.

    (B, B) similarities -> scalar: mean over both directions of -log softmax(similarity / temperature)[i, i], with label smoothing; texts
    that are the same are no negatives. About ln B at the start."""
    logits = similarity * scale
    return (
        contrastive(logits, same, label_smoothing) + contrastive(logits.T, same.T, label_smoothing)
    ) / 2


def hard_negatives(logits, same, generator=None):
    """For ITM: a confusable wrong text for every item and a wrong item for every text, drawn by softmax of the ITC logits.

    (B, B) logits, same (B, B) -> two index tensors (B,). Duplicates are never drawn; a row that has nothing else draws itself."""
    B = len(logits)
    same = same | torch.eye(B, dtype=torch.bool, device=same.device)
    draws = []
    for x, taken in ((logits, same), (logits.T, same.T)):
        weights = x.detach().float().softmax(1).masked_fill(taken, 0) + 1e-4 * ~taken
        lonely = taken.all(1)
        weights[lonely] = torch.eye(B, device=weights.device)[lonely]
        draws.append(torch.multinomial(weights, 1, generator=generator)[:, 0])
    return draws


def itm_loss(logits, labels):
    """Item-text matching: is this pair real? logits (N, 2), labels (N,) 1 or 0 -> scalar.

    N = 3B: true pairs, items with a wrong text, texts with a wrong item. At the start about .69; p = 1/3 for every pair gives .64."""
    return F.cross_entropy(logits.float(), labels)


def itg_loss(logits, targets, label_smoothing=0.1):
    """Item-grounded text generation: -log p(next token | queries, tokens so far), the mean over the real tokens of all texts.

    logits (N, V), targets (N,) from next_tokens -> scalar. About ln V at the start."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing)


def next_tokens(text_states, text_ids, text_mask):
    """States (B, T, D) at [DEC] t1 t2 ..., with t1 at position 1 of text_ids -> states (N, D) that have a real next token, and it (N,)."""
    real = text_mask[:, 1:]
    return text_states[:, :-1][real], text_ids[:, 1:][real]


def ii_loss(similarity, scale, same):
    """Item-item contrastive: items that one user chose within a few steps find each other (the paper's new loss).

    (B, B) from pair_similarity -> scalar, both directions. About ln B at the start, and hardly less on the toy world: a user's other items
    are negatives too. The logged accuracy tells more: chance is 1 / B; if it stays there, the queries have collapsed."""
    logits = similarity * scale
    return (contrastive(logits, same) + contrastive(logits.T, same.T)) / 2


ui_loss = (
    ii_loss  # user-item contrastive, the same function: row i is a user, column i an item of theirs
)


# ---- The losses of a batch, of which each process computes its own rows ------------------------------------------------


class Gather(torch.autograd.Function):
    """The rows of this process -> the rows of all, (B/N, ...) -> (B, ...). Backward: what all of them want changed in ours, summed."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x, count):
    """Features of this process's rows -> of all `count` rows of the batch, where torchrun started several processes."""
    return x if len(x) == count else Gather.apply(x)


def item_text_losses(model, cf, ids, mask, same, dec, generator=None, rows=slice(None)):
    """The three BLIP-2 losses in three passes. cf (B, E), ids and mask (B, T), same (B, B) -> dict of scalars.

    rows: those that this process computes (all, if it is alone); the contrastive features of the others are gathered."""
    dec_ids = torch.cat(
        [torch.full_like(ids[:, :1], dec), ids[:, 1:]], 1
    )  # position 0 is [CLS] to compare or match, [DEC] to write
    # Queries never see the text in the causal pattern, so that one pass serves both ITG and the queries' side of ITC.
    queries, written = model(cf[rows], dec_ids[rows], mask[rows], "causal")
    features = (
        gather(model.query_features(queries), len(cf)),
        gather(model.text_features(ids[rows], mask[rows]), len(cf)),
    )
    similarity = item_text_similarity(*features)  # (B, B), by every process
    wrong_text, wrong_item = hard_negatives(similarity * model.scale(), same, generator)
    own = torch.arange(len(cf), device=cf.device)[rows]
    item, text = (
        torch.cat([own, own, wrong_item[rows]]),
        torch.cat([own, wrong_text[rows], own]),
    )  # 3B pairs, the first B are real
    labels = ((item == text) | same[item, text]).long()
    written, targets = next_tokens(written, ids[rows], mask[rows])  # no logits for padding
    share = len(cf) / len(own) * len(targets) / mask[:, 1:].sum()  # 1 for a single process
    return {
        "itc": itc_loss(similarity, model.scale(), same),
        "itm": itm_loss(model.match_logits(cf[item], ids, mask, pair=text), labels),
        "itg": itg_loss(model.lm_logits(written), targets) * share,
    }


def pair_loss(model, left_cf, right_cf, left_key, right_key, rows=slice(None)):
    """II or UI on B pairs: CF vectors (B, E) of both sides, and keys (B,): equal for the same user, the same item, items of equal text.
    Sides with equal keys are no negatives of each other; other items of the same user are.

    -> scalar, share of the left sides whose own partner is the most similar (chance 1 / B)."""
    keys = [(left_key, left_key), (right_key, right_key), (left_key, right_key)]
    same = (
        sum(a[:, None] == b[None] for a, b in keys).bool().fill_diagonal_(False).to(left_cf.device)
    )
    features = model.query_features(model.encode(torch.cat([left_cf[rows], right_cf[rows]]))).chunk(
        2
    )
    similarity = pair_similarity(*(gather(x, len(same)) for x in features))
    hit = similarity.detach().masked_fill(same, -2).argmax(1) == torch.arange(
        len(same), device=same.device
    )
    return ii_loss(similarity, model.scale(), same), hit.float().mean()
