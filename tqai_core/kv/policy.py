"""Level ``kv``: how a scorer, a strategy and a monitor act on the rows of one layer.

::

  tokens leave the recent window, at most 256 at a time (a batch)
     |
   TokenScorer.weigh  -> importance of each token ---------\\
   PackMonitor.judge  -> shall all of them be held finer? ---> two bit tiers, base and fine, each in the order of the tokens
     |
   BlockPredictor.fit -> keys as residuals against a line for each block of tokens, where that pays (delta, delta2)
   BlockReader        -> the blocks that a step reads (window)

Scores, sequences and layers stay apart: a sequence's tiers do not depend on its batch (what a monitor decides does), and every
batch has as many fine tokens in each sequence, so that a tier is one rectangle of rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..codecs.rows import Rows, rows
from ..config import Config
from ..errors import TqaiError
from ..files import check_tensor
from ..roles import BlockPredictor, BlockReader, BlockScorer, LayerScorer, Monitor, PackMonitor, Scorer, Strategy, TokenScorer, TokenSorter
from .calibrated import Shape
from .segments import AGAIN, FLOATS, SEGMENT, UNCHANGED, Adjustment, BitTier, PackBatch, Plan

FLUSH = 256  # most tokens that are judged together
COEFFICIENT = 4  # bits of the coefficients that predict keys, and of centroids: their error comes back in the residual
CHOICE = 64  # queries that together choose blocks; calls of more read all of them


def policy(config: Config, plan: Plan, layer: int, layers: int) -> tuple[Policy, Plan]:
    """The methods of ``config`` for one of ``layers``; and the plan, which a scorer of layers changes."""
    scorer, found, monitor, _ = config.build()
    strategy = found or Strategy()
    raised = scorer.finer(layer, layers, strategy.tiers(plan.bits_k)[0]) if isinstance(scorer, LayerScorer) else None
    if raised is not None:
        bits = [strategy.tiers(b)[1] if up else b for b, up in zip((plan.bits_k, plan.bits_v), raised, strict=True)]
        plan = dataclasses.replace(plan, bits_k=bits[0], bits_v=bits[1])
    return Policy(plan, scorer, strategy, monitor, layer), plan


@dataclass
class Policy:
    """The methods of one layer and what they remember; without any it changes nothing."""

    plan: Plan
    scorer: Scorer | None = None
    strategy: Strategy = field(default_factory=Strategy)
    monitor: Monitor | None = None
    layer: int = 0

    def __post_init__(self) -> None:
        strategy = self.strategy
        self.plain = self.scorer is None and self.monitor is None and type(strategy) is Strategy
        self.terms = strategy.terms if isinstance(strategy, BlockPredictor) else 0
        self.reads = isinstance(strategy, BlockReader)
        self.reads_by_query = self.reads and isinstance(self.scorer, BlockScorer)  # else by the tokens' scores, or the newest
        self.share, fine_k = strategy.tiers(self.plan.bits_k)
        self.fine = (max(fine_k, self.plan.bits_k), max(strategy.tiers(self.plan.bits_v)[1], self.plan.bits_v))
        self.has_fine = not self.plain and self.fine != (self.plan.bits_k, self.plan.bits_v)  # whether there is a finer size at all
        asked = [m.recent_queries for m in (self.scorer, self.monitor) if isinstance(m, (TokenScorer, PackMonitor))]
        self.recent_queries = max(asked, default=0)
        self.shape: Shape | None = None  # of the keys, from a calibration file
        self.clear()

    def clear(self) -> None:
        self.tensors: dict[str, Tensor] = {}  # tier [B, packed], codes and gain [B, H, blocks, terms, ...], queries, scores of blocks
        self.states: dict[str, dict[str, Any]] = {"scorer": {}, "monitor": {}}
        self.predicts: bool | None = None if self.terms else False  # whether keys are predicted; None: not decided yet
        self.first_block_len = 0  # tokens of the first block, where it is a short one
        self.residual_energy: float | None = None  # part of the keys' energy that prediction leaves
        self.decisions: list[dict[str, Any]] = []
        self.pads: Tensor | None = None  # int64 [B]: the first packed tokens of each sequence that are padding; None: of none
        self.read = self.readable = 0  # blocks that steps read, and that they could have read

    # -- in

    @property
    def span(self) -> int:
        """Tokens of a block; 1 where blocks mean nothing."""
        return 1 if self.terms and self.predicts is False else self.strategy.span

    @property
    def missing(self) -> int:
        """Tokens that the first block is short of."""
        return -self.first_block_len % self.span

    def due(self, count: int, packed: int) -> int:
        """How many of ``count`` tokens can be packed now: whole blocks, the first of which may be a short one."""
        if not packed and self.terms and count >= self.span:
            self.first_block_len = count % self.span
            return count
        return count - count % self.span

    def size(self, left: int, packed: int) -> int:
        """Tokens of the next batch."""
        first = 0 if packed else self.first_block_len
        return min(left, SEGMENT if self.plain else first + (FLUSH - first) // self.span * self.span)

    def observe(self, q: Tensor) -> None:
        """Queries ``[B, heads, n, D]`` with new keys; the last few are held."""
        count, before = self.recent_queries, self.tensors.get("queries")
        if not count:
            return
        q = q.detach()[:, :, -count:]
        if before is not None and q.shape[2] < count and before.shape[:2] == q.shape[:2]:
            q = torch.cat([before[:, :, q.shape[2] - count :].to(q.dtype), q], 2)
        self.tensors["queries"] = q.clone()

    def queries(self, heads: int, scale: Tensor | None) -> Tensor | None:
        """The recent queries as they meet stored keys of ``heads`` heads: ``fp32 [B, H, group x recent, D]``."""
        q = self.tensors.get("queries")
        if q is None:
            return None
        q = (q.float() * q.shape[3] ** -0.5).unflatten(1, (heads, -1)).flatten(2, 3)
        return q if scale is None else q * scale

    def decide(self, batch: PackBatch) -> bool:
        """Set what ``batch`` leaves to the policy; False where a method cannot look at it, since it is not finite."""
        if self.plain:
            return True
        if not batch.all_finite:
            return False
        self._predict(batch)
        self._sort(batch)
        return True

    def _sort(self, batch: PackBatch) -> None:
        """Set the scores of the tokens, and which of them are fine."""
        b, _, n, _ = batch.k.shape
        if isinstance(self.scorer, TokenScorer) and not self.reads_by_query and (self.has_fine or self.reads):
            batch.state = self.states["scorer"]
            batch.scores = self.scorer.weigh(batch)
        if batch.scores is None and isinstance(self.strategy, TokenSorter):  # the tokens whose error is largest
            batch.scores = batch.rest.square().sum((1, 3))
        if batch.scores is not None and self.pads is not None:
            number = batch.first - self.plan.sink + torch.arange(n, device=self.pads.device)
            batch.scores = batch.scores.masked_fill(number < self.pads[:, None], -1e30)  # finite: scores are averaged over blocks
        if not self.has_fine:
            return
        if isinstance(self.monitor, PackMonitor):
            batch.state = self.states["monitor"]
            decision, error = self.monitor.judge(batch)
            self.decisions.append({
                "step": batch.first, "sigma": None, "action": "raise" if decision.compute else "pack",
                "error_estimate": decision.error_estimate, "error": error, "why": decision.why, "model": f"attn.{self.layer}",
            })  # fmt: skip
            if decision.compute:
                batch.fine = torch.ones(b, n, dtype=torch.bool, device=batch.k.device)
                return
        if batch.scores is not None and not self.reads and (count := round(self.share * n)):
            batch.fine = torch.zeros(b, n, dtype=torch.bool, device=batch.k.device)
            batch.fine.scatter_(1, batch.scores.topk(count, dim=1).indices, True)

    def keep(self, batch: PackBatch, packed: int) -> None:
        """Remember what was decided of ``batch``, whose rows follow ``packed`` others."""
        if batch.coefficients is not None:
            self._grow("codes", batch.coefficients[0], 2)
            self._grow("gain", batch.coefficients[1], 2)
        if batch.scores is not None and self.reads:
            self._grow("scores", batch.scores.unflatten(1, (-1, self.span)).mean(-1).bfloat16(), 1)
        if batch.fine is not None or "tier" in self.tensors:
            zeros = lambda n: torch.zeros(len(batch.k), n, dtype=torch.uint8, device=batch.k.device)  # noqa: E731
            self.tensors.setdefault("tier", zeros(packed))
            self._grow("tier", zeros(batch.k.shape[2]) if batch.fine is None else batch.fine.to(torch.uint8), 1)

    def _grow(self, name: str, new: Tensor, dim: int) -> None:
        before = self.tensors.get(name)
        self.tensors[name] = new if before is None else torch.cat([before, new], dim)

    # -- prediction of keys, and centroids

    def _predict(self, batch: PackBatch) -> None:
        """Set what the coefficients of the blocks predict of the keys; centroids where queries choose blocks by them."""
        k, span = batch.k, self.span
        if self.reads_by_query:
            batch.coefficients = self._coefficient_coder(k).encode(k.unflatten(2, (-1, span)).mean(3, keepdim=True))
            return
        if self.predicts is False:
            return
        coder, missing = self._coefficient_coder(k), -k.shape[2] % span
        if missing:
            k = torch.cat([k[:, :, : span - missing].mean(2, keepdim=True).expand(-1, -1, missing, -1), k], 2)
        coefficients = coder.encode(cast(BlockPredictor, self.strategy).fit(k))
        predicted = self._expand(coder.decode(*coefficients))[:, :, missing:]
        if self.predicts is None:  # once a layer: does prediction save more bits than its coefficients take?
            before, after = torch.stack([batch.k.square().sum(), (batch.k - predicted).square().sum()]).tolist()
            self.residual_energy = after / max(before, 1e-30)
            cost = self.terms * (COEFFICIENT + 16 / k.shape[3]) / span
            self.predicts = -0.5 * math.log2(max(self.residual_energy, 1e-30)) > cost
        if self.predicts:
            batch.predicted, batch.coefficients = predicted, coefficients

    def _coefficient_coder(self, k: Tensor) -> Rows:
        plain = rows(k.shape[3], COEFFICIENT, self.plan.seed, k.device)
        return plain if self.shape is None else self.shape.coder(plain, self.plan.seed)

    def _expand(self, coefficients: Tensor) -> Tensor:
        """Coefficients ``[B, H, blocks, terms, D]`` at each token of their blocks."""
        return torch.einsum("bhntd,ts->bhnsd", coefficients, term_weights(self.terms, self.span, coefficients.device)).flatten(2, 3)

    def predicted(self, like: Tensor) -> Tensor | None:
        """The predicted part of the packed keys ``fp32 [B, H, packed, D]`` in the order of the tokens; ``like`` is of their width."""
        if not self.predicts or "codes" not in self.tensors:
            return None
        coefficients = self._coefficient_coder(like).decode(self.tensors["codes"], self.tensors["gain"])
        return self._expand(coefficients)[:, :, self.missing :]

    def _coefficient_scores(self, q: Tensor) -> Tensor | None:
        """Scores of rotated queries ``q [B, H, r, D]`` with coefficients or centroids: ``[B, H, r, blocks, terms]``."""
        codes = self.tensors.get("codes")
        if codes is None:
            return None
        levels = self._coefficient_coder(q).lookup(codes) * self.tensors["gain"].float()[..., None]
        return (q @ levels.flatten(2, 3).transpose(-1, -2)).unflatten(3, levels.shape[2:4])

    # -- out: what attention asks

    @property
    def by_block(self) -> bool:
        """Whether a step must know which row is whose, whatever its mask."""
        return bool(self.predicts) or self.reads

    def score_width(self, length: int) -> int:
        """Tokens whose scores exist at a time: with methods all of them."""
        return min(max(length, 1), 1024) if self.plain else max(length, 1)

    def places(self, fine: int) -> tuple[Tensor | None, Tensor | None]:
        """Numbers of the packed tokens that the rows of each tier hold, ``int64 [B, rows]``, where ``fine`` of them are fine."""
        back = order(self.tensors["tier"].bool())
        return back[:, fine:], back[:, :fine]

    def adjust(self, q: Tensor, tiers: Sequence[BitTier], count: int) -> list[Adjustment]:
        """What changes in the attention of ``q fp32 [B, H, group x n, D]`` (scaled) to each tier; ``count``: queries of the
        whole call."""
        if not self.by_block:
            return [UNCHANGED] * len(tiers)
        base = tiers[0]
        turned = base.coder_k.query(q if base.scale is None else q * base.scale)
        out, reads = [], self.reads and count <= CHOICE
        exact: Tensor | None = None  # logarithm of the weight that the exact rows have, on the scale of stored keys
        if self.reads_by_query and reads:
            exact = (q @ base.keys.float().transpose(-1, -2)).logsumexp(-1, keepdim=True)
            exact = exact if base.mean is None else exact - (q * base.mean).sum(-1, keepdim=True)
        for tier in tiers:
            offsets = self._offsets(turned, tier) if tier.packed else None
            read = self._reading(turned, tier, exact) if tier.packed and reads else None
            out.append(UNCHANGED if offsets is None and read is None else Adjustment(offsets, read, self.span))
        return out

    def _reading(self, q: Tensor, tier: BitTier, exact: Tensor | None) -> Tensor | None:
        """Blocks of a tier that rotated queries ``q [B, H, r, D]`` read: ``bool [B, H, blocks]``, None for all. ``exact [B, H, r, 1]``:
        see :meth:`adjust`; given where queries choose."""
        blocks = tier.packed // self.span
        own = None if tier.order is None else tier.order[:, :: self.span] // self.span  # a block lies in one tier as a whole
        scores = self.tensors.get("scores")
        if scores is not None:
            scores = (scores if own is None else scores.gather(1, own))[:, None].float().expand(-1, q.shape[1], -1)
        if exact is not None and (logits := self._coefficient_scores(q)) is not None:
            logits = logits[..., 0]
            if self.pads is not None:
                block = torch.arange(1, logits.shape[3] + 1, device=q.device) * self.span
                logits = logits.masked_fill((block <= self.pads[:, None])[:, None, None], -1e30)
            if own is not None:
                logits = logits.gather(3, own[:, None, None].expand(-1, *logits.shape[1:3], -1))
            scores = torch.cat([logits.add_(math.log(self.span)), exact], 3)  # a query that looks at exact rows has little to say
            scores = scores.softmax(-1)[..., :blocks].mean(2)
        if scores is None:
            scores = torch.arange(blocks, device=q.device, dtype=torch.float32).expand(*q.shape[:2], -1)
        num_blocks = cast(BlockReader, self.strategy).num_blocks(blocks)
        scores = scores.clone()
        scores[..., blocks - num_blocks // 2 :] = float("inf")  # half of them the newest: some layers look nowhere else
        self.read, self.readable = self.read + num_blocks, self.readable + blocks
        if num_blocks == blocks:
            return None
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(num_blocks, -1).indices, True)

    def _offsets(self, q: Tensor, tier: BitTier) -> Tensor | None:
        """What the predicted part of the keys adds to the scores of rotated queries ``q [B, H, r, D]``: ``[B, H, r, rows]``."""
        if not self.predicts or (scores := self._coefficient_scores(q)) is None:
            return None
        weights = term_weights(self.terms, self.span, q.device)
        if tier.order is None:
            return torch.einsum("bhrnt,ts->bhrns", scores, weights).flatten(3)[..., self.missing :]
        places = tier.order + self.missing
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
        return max(count - (count + self.missing) % self.span, 0)

    def _sizes(self, packed: int) -> tuple[tuple[str, int, int], ...]:
        """Name, dimension and size of the tensors that grow with the ``packed`` tokens."""
        blocks = (packed + self.missing) // self.span if packed else 0
        return ("tier", 1, packed), ("codes", 2, blocks), ("gain", 2, blocks), ("scores", 1, blocks)

    def crop(self, count: int) -> int:
        """Keep the first ``count`` packed tokens, a :meth:`boundary`; how many of them are fine."""
        for name, dim, left in self._sizes(count):
            if name in self.tensors:
                self.tensors[name] = self.tensors[name].narrow(dim, 0, left).clone()
        return int(self.tensors["tier"][0].sum()) if "tier" in self.tensors else 0

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in (self.tensors, *self.states.values()):
            store.update({name: change(value) for name, value in store.items() if isinstance(value, Tensor)})

    # -- files and reports

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of a file; no header without methods."""
        if self.plain:
            return {}, {}
        tensors = dict(self.tensors)
        plain: dict[str, dict[str, Any]] = {}
        for role, store in self.states.items():
            tensors |= {f"{role}.{name}": value for name, value in store.items() if isinstance(value, Tensor)}
            plain[role] = {name: value for name, value in store.items() if not isinstance(value, Tensor)}
        return tensors, {
            "states": plain, "gate": self.predicts, "residual": self.residual_energy, "decisions": self.decisions,
            "lead": self.first_block_len, "read": [self.read, self.readable],
        }  # fmt: skip

    def restore(self, tensors: dict[str, Tensor], header: dict[str, Any], keys: Tensor, packed: int, fine: int) -> None:
        """What :meth:`state` gave, for a cache like ``keys [B, H, n, D]`` with ``packed`` tokens, ``fine`` of them fine. TqaiError names
        what does not belong together."""
        self.clear()
        if self.plain != (not header) or (self.plain and tensors):
            raise TqaiError(f"field 'policy' does not go with the config: {AGAIN}")
        if self.plain:
            return
        self.predicts, self.residual_energy, self.decisions = header["gate"], header["residual"], list(header["decisions"])
        (self.read, self.readable), self.first_block_len = header["read"], header["lead"]
        for role, store in self.states.items():
            store.update(header["states"][role])
        for name, tensor in tensors.items():
            role, dot, own = name.partition(".")
            (self.states[role] if dot else self.tensors)[own or name] = tensor
        b, h, d = keys.shape[0], keys.shape[1], keys.shape[3]
        if not 0 <= self.first_block_len < self.strategy.span or (self.terms == 0 and self.predicts) or self.read > self.readable:
            raise TqaiError(f"field 'policy' does not go with strategy {self.strategy.name!r}: {AGAIN}")
        blocks = self._sizes(packed)[1][2]
        terms = self.terms or 1
        shapes: dict[str, tuple[tuple[int | None, ...], torch.dtype]] = {
            "tier": ((b, packed), torch.uint8), "codes": ((b, h, blocks, terms, d * COEFFICIENT // 8), torch.uint8),
            "gain": ((b, h, blocks, terms), torch.bfloat16), "scores": ((b, blocks), torch.bfloat16),
        }  # fmt: skip
        needed = {"codes", "gain"} if packed and (self.predicts or self.reads_by_query) else set()
        named = {f"policy.{name}": tensor for name, tensor in self.tensors.items()}
        for name in sorted(self.tensors.keys() | needed):
            if name == "queries":
                q = check_tensor(named, f"policy.{name}", (b, None, None, d), FLOATS, AGAIN)
                if q.shape[1] % h or not 0 < q.shape[2] <= self.recent_queries:
                    raise TqaiError(f"field 'policy.queries' is {list(q.shape)}: {AGAIN}")
            elif name not in shapes:
                raise TqaiError(f"field 'policy.{name[:80]}' is unknown: {AGAIN}")
            else:
                check_tensor(named, f"policy.{name}", shapes[name][0], (shapes[name][1],), AGAIN)
        if any(x.ndim == 0 or len(x) != b for store in self.states.values() for x in store.values() if isinstance(x, Tensor)):
            raise TqaiError(f"field 'policy.scorer' or 'policy.monitor' is not of {b} sequences: {AGAIN}")
        tier = self.tensors.get("tier")
        counts = {0} if tier is None else {*tier.long().sum(1).tolist()}
        if counts != {fine} or (tier is not None and int(tier.max()) > 1):
            raise TqaiError(f"field 'policy.tier' is missing or names rows that are not there: {AGAIN}")

    def report(self, tiers: Sequence[BitTier]) -> dict[str, Any]:
        """What the methods did to ``tiers``: exact average bits, share of fine tokens, prediction, share of the blocks read."""
        if self.plain:
            return {}
        out: dict[str, Any] = {}
        if packed := sum(tier.packed for tier in tiers):
            for name, d in (("k", tiers[0].keys.shape[3]), ("v", tiers[0].values.shape[3])):
                held = sum(len(s) * getattr(s, f"codes_{name}").shape[3] for tier in tiers for s in tier.segments)
                out[f"bits_{name}"] = round(8 * held / (packed * d), 4)
            out["share_fine"] = round(sum(tier.packed for tier in tiers[1:]) / packed, 4)
        if self.terms and self.predicts is not None:
            left = self.residual_energy
            out |= {"predicted": self.predicts, "residual_energy": None if left is None else round(left, 4)}
        if self.reads:
            out["share_read"] = round(self.read / self.readable, 4) if self.readable else 1.0
        if self.monitor is not None:
            out |= {"flushes": len(self.decisions), "flushes_raised": sum(d["action"] == "raise" for d in self.decisions)}
        return out

    def fallbacks(self) -> list[str]:
        """Why a method had nothing to do here."""
        out = []
        if not self.has_fine and (self.scorer or self.monitor or isinstance(self.strategy, TokenSorter)) and not self.reads:
            out.append(f"no finer size than {max(self.fine)} bits: scorer and monitor decide nothing in this layer")
        if self.terms and self.predicts is False and self.residual_energy is not None:
            left = f"{self.residual_energy:.2f} of the keys' energy"
            out.append(f"{self.strategy.name} is off: it leaves {left}, its coefficients would cost more")
        return out


def order(first: Tensor) -> Tensor:
    """Numbers of the tokens ``first``, bool ``[B, n]``, the marked ones first, each kind in its own order."""
    return (~first).to(torch.uint8).argsort(dim=1, stable=True)


def term_weights(terms: int, span: int, device: torch.device) -> Tensor:
    """What the coefficients of a block weigh at its tokens: 1 for the mean, -1 to 1 for the slope; ``fp32 [terms, span]``."""
    ones = torch.ones(1, span, device=device)
    return ones if terms == 1 else torch.cat([ones, torch.linspace(-1, 1, span, device=device)[None]])
