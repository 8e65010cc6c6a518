"""Level ``kv``: how a scorer, a strategy and a monitor act on the rows of one layer.

::

  tokens leave the recent window, at most 256 at a time (a flush)
     |
   Scorer.weigh  -> importance of each token ---------\\
   Monitor.judge -> shall all of them be held finer? ---> two tiers of rows, base and fine, each in the order of the tokens
     |
   Strategy.lines   -> keys as residuals against a line for each block of tokens, where that pays (delta, delta2)
   Strategy.choose  -> the blocks that a step reads (window)

Scores, sequences and layers stay apart: a sequence's tiers do not depend on its batch (what a monitor decides does), and every
flush has as many fine tokens in each sequence, so that a tier is one rectangle of rows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..codecs.rows import Rows, rows
from ..config import Config
from ..errors import TqaiError
from ..roles import BlockPredictor, BlockReader, BlockScorer, LayerScorer, Monitor, PackMonitor, Scorer, Strategy, TokenScorer, TokenSorter

if TYPE_CHECKING:
    from .cache import PackedKV, Plan, Segment

FLUSH = 256  # most tokens that are judged together
LINE = 4  # bits of the lines that keys are predicted by, and of centroids: their error comes back in the residual
QUERIES = 4  # recent queries kept for whoever asks


@dataclass
class Flush:
    """Tokens about to be packed in one layer. Keys and queries are as they are stored: centred, scaled, not rotated; queries
    are scaled by 1/sqrt(d) too, so that q.k is a score up to a number for all keys."""

    k: Tensor  # fp32 [B, H, n, D]
    v: Tensor  # fp32 [B, H, n, Dv]
    q: Tensor | None  # fp32 [B, H, group x recent queries, D]; None where an attention hides its queries
    first: int  # position of the first of them
    layer: int
    state: dict[str, Any]  # of the method that is asked; tensors in it begin with the batch
    near: Callable[[], tuple[Tensor, Tensor, int]]  # all exact rows (k, v) and where these tokens begin in them
    packed: Callable[[], tuple[Tensor, Tensor]]  # these tokens as the base tier would give them back

    def attention(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Weights ``[B, H, queries, n]`` and output of the recent queries on rows ``k, v``."""
        assert self.q is not None
        p = (self.q @ k.transpose(-1, -2)).softmax(-1)
        return p, p @ v

    @cached_property
    def error(self) -> Tensor | None:
        """|change| / |output| of the recent queries' attention to the exact rows, were these tokens packed in the base tier."""
        if self.q is None:
            return None
        k, v, at = self.near()
        exact = self.attention(k, v)[1]
        n = self.k.shape[2]
        changed = [torch.cat([x[:, :, :at], own, x[:, :, at + n :]], 2) for x, own in zip((k, v), self.packed(), strict=True)]
        return (self.attention(*changed)[1] - exact).norm() / exact.norm().clamp_min(1e-30)


def policy(config: Config, plan: Plan, layer: int, layers: int) -> tuple[Policy | None, Plan]:
    """The methods of ``config`` for one of ``layers``, or None without any; and the plan, which a scorer of layers changes."""
    scorer, strategy, monitor, _ = config.build()
    if scorer is None and strategy is None and monitor is None:
        return None, plan
    strategy = strategy or Strategy()
    raised = scorer.finer(layer, layers, strategy.tiers(plan.bits_k)[0]) if isinstance(scorer, LayerScorer) else None
    if raised is not None:
        bits = [strategy.tiers(b)[1] if up else b for b, up in zip((plan.bits_k, plan.bits_v), raised, strict=True)]
        plan = dataclasses.replace(plan, bits_k=bits[0], bits_v=bits[1])
    return Policy(scorer, strategy, monitor, plan, layer), plan


@dataclass
class Policy:
    """The methods of one layer and what they remember."""

    scorer: Scorer | None
    strategy: Strategy
    monitor: Monitor | None
    plan: Plan
    layer: int = 0

    def __post_init__(self) -> None:
        self.terms = self.strategy.terms if isinstance(self.strategy, BlockPredictor) else 0
        self.reads = isinstance(self.strategy, BlockReader)
        self.near = self.reads and isinstance(self.scorer, BlockScorer)  # blocks chosen by what queries want
        self.share, fine_k = self.strategy.tiers(self.plan.bits_k)
        fine_v = self.strategy.tiers(self.plan.bits_v)[1]
        self.fine = (max(fine_k, self.plan.bits_k), max(fine_v, self.plan.bits_v))
        self.two = self.fine != (self.plan.bits_k, self.plan.bits_v)  # whether there is a finer size at all
        asked = [m.recent_queries for m in (self.scorer, self.monitor) if isinstance(m, (TokenScorer, PackMonitor))]
        self.queries_wanted = max(asked, default=0)
        self.clear()

    def clear(self) -> None:
        self.tensors: dict[str, Tensor] = {}  # tier [B, packed], line codes and gains [B, H, blocks, terms, ...], queries, block scores
        self.states: dict[str, dict[str, Any]] = {"scorer": {}, "monitor": {}}
        self.gate: bool | None = None if self.terms else False  # whether keys are predicted; None: not decided yet
        self.lead = 0  # tokens of the first block, where it is a short one
        self.residual: float | None = None  # energy of what prediction leaves of the keys
        self.decisions: list[dict[str, Any]] = []
        self.read = self.readable = 0  # blocks that steps read, and that they could have read

    # -- in

    @property
    def span(self) -> int:
        """Tokens of a block; 1 where blocks mean nothing."""
        return 1 if self.terms and self.gate is False else self.strategy.span

    @property
    def offset(self) -> int:
        """Tokens that the first block is short of."""
        return -self.lead % self.span

    def due(self, count: int, packed: int) -> int:
        """How many of ``count`` tokens can be packed now: whole blocks, the first of which may be a short one."""
        if not packed and self.terms and count >= self.span:
            self.lead = count % self.span
            return count
        return count - count % self.span

    def size(self, left: int, packed: int) -> int:
        """Tokens of the next flush."""
        lead = 0 if packed else self.lead
        return min(left, lead + (FLUSH - lead) // self.span * self.span)

    def observe(self, q: Tensor) -> None:
        """Queries ``[B, heads, n, D]`` as they come; the last few stay."""
        if not self.queries_wanted:
            return
        count, before = self.queries_wanted, self.tensors.get("queries")
        q = q.detach()[:, :, -count:]
        if before is not None and q.shape[2] < count and before.shape[:2] == q.shape[:2]:
            q = torch.cat([before[:, :, q.shape[2] - count :].to(q.dtype), q], 2)
        self.tensors["queries"] = q.clone()

    def pack(self, kv: PackedKV, at: int, size: int) -> bool:
        """Pack the exact rows ``at`` to ``at + size`` of ``kv``, or False where they are no numbers."""
        assert kv.keys is not None
        assert kv.values is not None
        k, v = kv.stored(kv.keys[:, :, at : at + size]), kv.values[:, :, at : at + size].float()
        if not bool((k.isfinite().all() & v.isfinite().all()).item()):
            return False
        guess, lines = self._predict(k)
        rest = k if guess is None else k - guess

        def near() -> tuple[Tensor, Tensor, int]:
            assert kv.keys is not None
            assert kv.values is not None
            return kv.stored(kv.keys), kv.values.float(), at

        def packed() -> tuple[Tensor, Tensor]:
            y = kv.coder_k().decode(*kv.coder_k().encode(rest))
            return y if guess is None else y + guess, kv.coder_v().decode(*kv.coder_v().encode(v))

        flush = Flush(k, v, self._queries(kv), kv.plan.sink + kv.packed, self.layer, {}, near, packed)
        fine, score = self._tiers(flush, rest)
        made = self._encode(kv, rest, v, fine)
        if made is None:
            return False
        if lines is not None:
            self._grow("codes", lines[0], 2)
            self._grow("gain", lines[1], 2)
        if score is not None and self.reads:
            self._grow("scores", score.unflatten(1, (-1, self.span)).mean(-1).bfloat16(), 1)
        if fine is not None or "tier" in self.tensors:
            none = torch.zeros(k.shape[0], 0 if "tier" in self.tensors else kv.packed, dtype=torch.uint8, device=k.device)
            self._grow("tier", none, 1)
            self._grow("tier", none.new_zeros(k.shape[0], size) if fine is None else fine.to(torch.uint8), 1)
        for segments, segment in zip((kv.segments, kv.fine), made, strict=True):
            if segment is not None:
                kv.add(segments, segment)
        return True

    def _tiers(self, flush: Flush, rest: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens are fine, ``bool [B, n]`` or None, and the scores of all."""
        b, _, n, _ = flush.k.shape
        score = None
        if isinstance(self.scorer, TokenScorer) and not self.near and (self.two or self.reads):
            flush.state = self.states["scorer"]
            score = self.scorer.weigh(flush)
        if score is None and isinstance(self.strategy, TokenSorter):  # the tokens whose error is largest
            score = rest.square().sum((1, 3))
        if not self.two:
            return None, score
        raised = False
        if isinstance(self.monitor, PackMonitor):
            flush.state = self.states["monitor"]
            decision, error = self.monitor.judge(flush)
            self.decisions.append({
                "step": flush.first, "sigma": None, "action": "raise" if decision.compute else "pack",
                "error_estimate": decision.error_estimate, "error": error, "why": decision.why, "model": f"attn.{self.layer}",
            })  # fmt: skip
            raised = decision.compute
        if raised:
            return torch.ones(b, n, dtype=torch.bool, device=flush.k.device), score
        count = 0 if score is None or self.reads else round(self.share * n)
        if not count or score is None:
            return None, score
        fine = torch.zeros(b, n, dtype=torch.bool, device=flush.k.device)
        return fine.scatter_(1, score.topk(count, dim=1).indices, True), score

    def _encode(self, kv: PackedKV, k: Tensor, v: Tensor, fine: Tensor | None) -> tuple[Segment | None, Segment | None] | None:
        """Rows of the base and of the fine tier, None where a gain is no number."""
        n = k.shape[2]
        count = 0 if fine is None else int(fine[0].sum())
        out: list[Segment | None] = []
        for tier, rows_of in ((0, n - count), (1, count)):
            if not rows_of:
                out.append(None)
                continue
            own = (k, v)
            if fine is not None and rows_of < n:
                place = order(fine if tier else ~fine)[:, None, :rows_of, None]
                own = (k.gather(2, place.expand(-1, k.shape[1], -1, k.shape[3])), v.gather(2, place.expand(-1, v.shape[1], -1, v.shape[3])))
            coders = (kv.coder_k(), kv.coder_v()) if tier == 0 else self.fine_coders(kv)
            segment, sound = kv.rows_of(*own, *coders)
            if not sound:
                return None
            out.append(segment)
        return out[0], out[1]

    def fine_coders(self, kv: PackedKV) -> tuple[Rows, Rows]:
        assert kv.keys is not None
        assert kv.values is not None
        (k, v), seed = self.fine, self.plan.seed
        return rows(kv.keys.shape[3], k, seed, kv.keys.device), rows(kv.values.shape[3], v, seed + 1, kv.values.device)

    def _queries(self, kv: PackedKV) -> Tensor | None:
        q = self.tensors.get("queries")
        if q is None or kv.keys is None:
            return None
        q = q.float() * q.shape[3] ** -0.5
        q = q.unflatten(1, (kv.keys.shape[1], -1)).flatten(2, 3)
        return q if kv.scale is None else q * kv.scale

    def _grow(self, name: str, new: Tensor, dim: int) -> None:
        before = self.tensors.get(name)
        self.tensors[name] = new if before is None else torch.cat([before, new], dim)

    # -- prediction of keys, and centroids

    def _predict(self, k: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """What the lines of the blocks give of ``k``, and their codes ``[B, H, blocks, terms, bytes]`` with gains."""
        if self.near:
            return None, self._line_coder(k).encode(k.unflatten(2, (-1, self.span)).mean(3, keepdim=True))
        if self.gate is False:
            return None, None
        coder, short = self._line_coder(k), -k.shape[2] % self.span
        own = k if not short else torch.cat([k[:, :, : self.span - short].mean(2, keepdim=True).expand(-1, -1, short, -1), k], 2)
        lines = coder.encode(cast(BlockPredictor, self.strategy).fit(own))
        guess = self._follow(coder.decode(*lines))[:, :, short:]
        if self.gate is None:  # once a layer: does it spare more bits than the lines take?
            before, after = torch.stack([k.square().sum(), (k - guess).square().sum()]).tolist()
            self.residual = after / max(before, 1e-30)
            cost = self.terms * (LINE + 16 / k.shape[3]) / self.span
            self.gate = -0.5 * math.log2(max(self.residual, 1e-30)) > cost
            if not self.gate:
                return None, None
        return guess, lines

    def _line_coder(self, k: Tensor) -> Rows:
        return rows(k.shape[3], LINE, self.plan.seed, k.device)

    def line_scores(self, q: Tensor) -> Tensor | None:
        """Scores of queries ``q [B, H, r, D]`` (stored domain, rotated) with lines or centroids: ``[B, H, r, blocks, terms]``."""
        codes = self.tensors.get("codes")
        if codes is None:
            return None
        levels = self._line_coder(q).lookup(codes) * self.tensors["gain"].float()[..., None]
        return (q @ levels.flatten(2, 3).transpose(-1, -2)).unflatten(3, levels.shape[2:4])

    def predicted(self, kv: PackedKV) -> Tensor | None:
        """The predicted part of the packed keys ``fp32 [B, H, packed, D]`` in the order of the tokens."""
        if not self.gate or "codes" not in self.tensors:
            return None
        assert kv.keys is not None
        lines = self._line_coder(kv.keys).decode(self.tensors["codes"], self.tensors["gain"])
        return self._follow(lines)[:, :, self.offset :]

    def _follow(self, lines: Tensor) -> Tensor:
        """Lines ``[B, H, blocks, terms, D]`` at each token of their blocks."""
        return torch.einsum("bhntd,ts->bhnsd", lines, course(self.terms, self.span, lines.device)).flatten(2, 3)

    # -- out

    def places(self, kv: PackedKV) -> list[Tensor | None]:
        """Numbers of the packed tokens that each tier's rows hold, ``int64 [B, rows]``; None: all of them in order."""
        tier = self.tensors.get("tier")
        count = sum(map(len, kv.fine))
        if tier is None or not count:
            return [None, None]
        back = order(tier.bool())
        return [back[:, count:], back[:, :count]]

    def bands(self, kv: PackedKV) -> list[PackedKV]:
        """Each tier as a cache of its own kind of rows; the exact rows belong to the first."""
        assert kv.keys is not None
        assert kv.values is not None
        base = copy.copy(kv)
        base.policy, base.fine = None, []
        base.length = kv.keys.shape[2] + base.packed
        if not kv.fine:
            return [base]
        fine = copy.copy(base)
        fine.basis = None  # plain rows: they have bits to spare
        fine.segments, fine.plan = kv.fine, dataclasses.replace(kv.plan, bits_k=self.fine[0], bits_v=self.fine[1], sink=0)
        fine.keys, fine.values, fine.length = kv.keys[:, :, :0], kv.values[:, :, :0], sum(map(len, kv.fine))
        return [base, fine]

    def reading(self, q: Tensor, places: Tensor | None, rows_of: int, exact: Tensor | None = None) -> Tensor | None:
        """Blocks that queries ``q [B, H, r, D]`` (stored domain, rotated) read of a tier's rows: ``bool [B, H, blocks]``, None for
        all. ``exact [B, H, r, 1]`` is the logarithm of the weight that the exact rows have for them."""
        blocks = rows_of // self.span
        own = None if places is None else places[:, :: self.span] // self.span  # a block lies in one tier as a whole
        scores = self.tensors.get("scores")
        if scores is not None:
            scores = (scores if own is None else scores.gather(1, own))[:, None].float().expand(-1, q.shape[1], -1)
        if self.near and (logits := self.line_scores(q)) is not None:
            logits = logits[..., 0]
            if own is not None:
                logits = logits.gather(3, own[:, None, None].expand(-1, *logits.shape[1:3], -1))
            scores = logits.add_(math.log(self.span))  # a query that looks at exact rows has little to say
            if exact is not None:
                scores = torch.cat([scores, exact], 3)
            scores = scores.softmax(-1)[..., :blocks].mean(2)
        if scores is None:
            scores = torch.arange(blocks, device=q.device, dtype=torch.float32).expand(*q.shape[:2], -1)
        kept = cast(BlockReader, self.strategy).num_blocks(blocks)
        scores = scores.clone()
        scores[..., blocks - kept // 2 :] = float("inf")  # half of them the newest: some layers look nowhere else
        self.read, self.readable = self.read + kept, self.readable + blocks
        return None if kept == blocks else torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(kept, -1).indices, True)

    def shift(self, q: Tensor, places: Tensor | None, rows_of: int) -> Tensor | None:
        """What the predicted part of the keys adds to the scores of ``q [B, H, r, D]`` (stored domain, rotated) with a tier's
        rows: ``[B, H, r, rows]``."""
        if not self.gate or (scores := self.line_scores(q)) is None:
            return None
        weights = course(self.terms, self.span, q.device)
        if places is None:
            return torch.einsum("bhrnt,ts->bhrns", scores, weights).flatten(3)[..., self.offset :]
        places = places + self.offset
        block = (places // self.span)[:, None, None].expand(-1, *scores.shape[1:3], -1)
        own = weights[:, places % self.span].permute(1, 0, 2)  # [B, terms, rows]
        return sum(scores[..., t].gather(3, block) * own[:, t][:, None, None] for t in range(len(weights)))  # type: ignore[return-value]

    # -- changes

    def boundary(self, count: int) -> int:
        """The most packed tokens up to ``count`` at which blocks are whole and every sequence has as many fine ones."""
        count = self._whole(count)
        tier = self.tensors.get("tier")
        if tier is None or tier.shape[0] == 1:
            return count
        sums = tier[:, :count].long().cumsum(1)
        same = (sums == sums[:1]).all(0).nonzero()
        even = int(same[-1]) + 1 if len(same) else 0
        return even if even == self._whole(even) else self.boundary(even)

    def _whole(self, count: int) -> int:
        return max(count - (count + self.offset) % self.span, 0)

    def crop(self, kv: PackedKV, count: int) -> None:
        """Keep the first ``count`` packed tokens, a :meth:`boundary`."""
        tier = self.tensors.get("tier")
        fine = 0 if tier is None else int(tier[0, :count].sum())
        kv.cut(kv.segments, count - fine)
        kv.cut(kv.fine, fine)
        blocks = (count + self.offset) // self.span if count else 0
        for name, dim, left in (("tier", 1, count), ("codes", 2, blocks), ("gain", 2, blocks), ("scores", 1, blocks)):
            if name in self.tensors:
                self.tensors[name] = self.tensors[name].narrow(dim, 0, left).clone()

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in (self.tensors, *self.states.values()):
            for name, value in store.items():
                if isinstance(value, Tensor):
                    store[name] = change(value)

    # -- files and reports

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = dict(self.tensors)
        plain: dict[str, dict[str, Any]] = {}
        for role, store in self.states.items():
            tensors |= {f"{role}.{name}": value for name, value in store.items() if isinstance(value, Tensor)}
            plain[role] = {name: value for name, value in store.items() if not isinstance(value, Tensor)}
        header = {"states": plain, "gate": self.gate, "residual": self.residual, "decisions": self.decisions, "lead": self.lead}
        return tensors, {**header, "read": [self.read, self.readable]}

    def restore(self, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        self.clear()
        self.gate, self.residual, self.decisions = header["gate"], header["residual"], list(header["decisions"])
        (self.read, self.readable), self.lead = header["read"], header["lead"]
        for role, store in self.states.items():
            store.update(header["states"][role])
        for name, tensor in tensors.items():
            role, dot, own = name.partition(".")
            if dot:
                self.states[role][own] = tensor
            else:
                self.tensors[name] = tensor

    def check(self, kv: PackedKV) -> None:
        """ValueError where what a file holds does not belong together."""
        blocks = (kv.packed + self.offset) // self.span if kv.packed else 0
        for name, dim, size in (("tier", 1, kv.packed), ("codes", 2, blocks), ("gain", 2, blocks), ("scores", 1, blocks)):
            tensor = self.tensors.get(name)
            if tensor is not None and (kv.keys is None or tensor.shape[0] != kv.keys.shape[0] or tensor.shape[dim] != size):
                raise TqaiError(f"field 'policy.{name}' is {tuple(tensor.shape)}, it should tell of {size}: save the cache again")
        if self.gate and kv.packed and "codes" not in self.tensors:
            raise TqaiError("field 'policy.codes' is missing: save the cache again")
        tier = self.tensors.get("tier")
        if sum(map(len, kv.fine)) != (0 if tier is None else int(tier[0].sum())):
            raise TqaiError("field 'policy.tier' is missing or names rows that are not there: save the cache again")

    def report(self, kv: PackedKV) -> dict[str, Any]:
        """What the methods did here: exact average bits, share of fine tokens, prediction, share of the blocks read."""
        fine, packed = sum(map(len, kv.fine)), kv.packed
        out: dict[str, Any] = {}
        if packed and kv.keys is not None and kv.values is not None:
            for name, d in (("k", kv.keys.shape[3]), ("v", kv.values.shape[3])):
                held = sum(len(s) * getattr(s, f"codes_{name}").shape[3] for s in (*kv.segments, *kv.fine))
                out[f"bits_{name}"] = round(8 * held / (packed * d), 4)
            out["share_fine"] = round(fine / packed, 4)
        if self.terms and self.gate is not None:
            out |= {"predicted": self.gate, "residual_energy": None if self.residual is None else round(self.residual, 4)}
        if self.reads:
            out["share_read"] = round(self.read / self.readable, 4) if self.readable else 1.0
        if self.monitor is not None:
            out |= {"flushes": len(self.decisions), "flushes_raised": sum(d["action"] == "raise" for d in self.decisions)}
        return out

    def fallbacks(self) -> list[str]:
        """Why a method had nothing to do here."""
        out = []
        if not self.two and (self.scorer or self.monitor or isinstance(self.strategy, TokenSorter)) and not self.reads:
            out.append(f"no finer size than {max(self.fine)} bits: scorer and monitor decide nothing in this layer")
        if self.terms and self.gate is False and self.residual is not None:
            out.append(f"{self.strategy.name} is off: it leaves {self.residual:.2f} of the keys' energy, its lines would cost more")
        return out


def order(first: Tensor) -> Tensor:
    """Numbers of the tokens of ``bool [B, n]``, the marked ones first, each kind in its own order."""
    return (~first).to(torch.uint8).argsort(dim=1, stable=True)


def course(terms: int, span: int, device: torch.device) -> Tensor:
    """What a block's mean and slope weigh at its tokens, ``fp32 [terms, span]``."""
    ones = torch.ones(1, span, device=device)
    return ones if terms == 1 else torch.cat([ones, torch.linspace(-1, 1, span, device=device)[None]])
